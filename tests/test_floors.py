"""The rooms of the house: who may import whom, what stays light, and which versions are the least that is safe."""

import ast
import re
import subprocess
import sys

import pytest
from rooms import FLOORS, MODULES, PACKAGES, PICTURE, ROOT, arrows, draw, imports, modules, needed, room

# The most lines that a room may have.
BUDGETS = {
    "neox_lite.version": 10,
    "neox_lite.errors": 80,
    "neox_lite.files": 300,
    "neox_lite.units": 80,
    "neox_lite.hub": 500,
    "neox_lite.user_cache": 90,
    "neox_lite.config": 620,
    "neox_lite.tokenizer": 760,
    "neox_lite.checkpoint": 1900,
    "neox_lite.formats": 950,
    "neox_lite.cache": 420,
    "neox_lite.kernels": 6700,
    "neox_lite.layers": 290,
    "neox_lite.generation": 2500,
    "neox_lite.offload": 2400,
    "neox_lite.core": 700,
    "neox_lite.loading": 1200,
    "neox_lite.modeling": 850,
    "neox_lite": 75,
    "neox_lite_quant": 3100,
    "neox_lite_app.paths": 20,
    "neox_lite_app.terminal": 110,
    "neox_lite_app.load_for_command": 160,
    "neox_lite_app.conversations": 1460,
    "neox_lite_app.models": 1700,
    "neox_lite_app.evaluation": 1900,
    "neox_lite_app.serving": 2900,
    "neox_lite_app.page": 1500,
    "neox_lite_app": 2500,
}
MAX_LINES = 500  # of a file, but for
LONGER = {
    "neox_lite.tokenizer",
    "neox_lite.config",
}
MAX_LINES_IN = {"neox_lite.core": 300, "neox_lite.loading": 300, "neox_lite.modeling": 300}
MAX_ROOMS, MAX_ARROWS = 20, 80  # of neox_lite itself
# The core's third-party imports, and the only ones allowed at the top of a module; others are imported where they are used.
TOP_LEVEL = {"torch", "tokenizers"}
LAZY = {"gguf", "huggingface_hub", "numpy", "tqdm", "safetensors", "bitsandbytes", "transformers"}
# A backend's insides are imported when it is bound, so they may import what it is made of.
INSIDES = {"neox_lite.kernels.cpu": {"llvmlite", "numpy"}, "neox_lite.kernels.triton": {"triton"}}


def test_every_module_has_a_room():
    empty = [m for m, path in modules() if path.name == "__init__.py" and not list(imports(m, path))]
    assert [m for m, _ in modules() if room(m) is None and m not in empty] == []


def test_rooms_import_only_rooms_below_them():
    floors = list(FLOORS)
    assert [
        f"{module}:{line} imports {name}, which stands above it"
        for module, line, name, here, there in arrows()
        if there is None or floors.index(there) > floors.index(here)
    ] == []


def test_files_of_a_room_do_not_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, path in modules():
        for name, at_top, _ in imports(module, path):
            if at_top and name in MODULES and name != module:
                below[module].add(name)
    while leaves := [module for module, others in below.items() if not others & below.keys()]:
        for module in leaves:
            del below[module]
    assert below == {}


def test_the_core_has_few_rooms_and_few_arrows_between_them():
    core = [floor for floor in FLOORS if floor.startswith("neox_lite.")]
    between = {(here, there) for *_, here, there in arrows() if {here, there} <= set(core) and here != there}
    assert (len(core) <= MAX_ROOMS, len(between) <= MAX_ARROWS) == (True, True), (len(core), len(between))


def test_the_picture_of_the_rooms_is_what_their_imports_make():
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run python docs/rooms.py"
    assert needed()["neox_lite.core"] >= {"neox_lite.offload"} and "neox_lite.cache" not in needed()["neox_lite.core"]


def test_files_and_rooms_keep_to_their_lines():
    lines = {module: (room(module), path.read_text().count("\n")) for module, path in modules()}
    rooms = {floor: sum(count for here, count in lines.values() if here == floor) for floor in FLOORS}
    assert {floor: count for floor, count in rooms.items() if count > BUDGETS[floor]} == {}
    long = {module: count for module, (here, count) in lines.items() if count > MAX_LINES_IN.get(here, MAX_LINES)}
    assert long.keys() <= LONGER, long


def test_the_core_imports_few_packages_and_heavy_ones_only_where_used():
    problems = []
    for module, path in modules():
        if module.startswith("neox_lite_app"):
            continue
        for name, at_top, line in imports(module, path):
            package = name.partition(".")[0]
            if package in sys.stdlib_module_names or package in PACKAGES:
                continue
            if package in INSIDES.get(module.rpartition(".")[0], ()):
                continue
            if package not in TOP_LEVEL | LAZY or (at_top and package not in TOP_LEVEL):
                problems.append(f"{module}:{line} imports {package}")
    assert problems == []


def test_importing_the_package_loads_nothing_heavy_beside_torch():
    heavy = {
        "llvmlite",
        "triton",
        "transformers",
        "gradio",
        "huggingface_hub",
        "safetensors",
        "bitsandbytes",
        "tqdm",
        "requests",
    }
    code = (
        "import torch, sys; before = set(sys.modules); import neox_lite; "
        f"print(*sorted({heavy!r} & (set(sys.modules) - before)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.split() == []


@pytest.mark.parametrize(
    ("package", "floor"), [("torch", "2.10"), ("gradio", "6.16"), ("starlette", "1.0.1"), ("jinja2", "3.1.6")]
)
def test_dependencies_start_at_versions_without_known_holes(package, floor):
    """torch before 2.10 has ways around weights_only; the others have published advisories below these."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(rf'"{package}>=([0-9.]+)"', text)
    assert found and set(found) == {floor}


def test_every_module_says_what_it_does_in_its_first_line():
    assert [m for m, path in modules() if not ast.get_docstring(ast.parse(path.read_text()))] == []
