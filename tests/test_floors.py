"""The rooms of the house: who may import whom, what stays light, and which versions are the least that is safe."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"neox_lite": ROOT, "neox_lite_quant": ROOT / "quant", "neox_lite_app": ROOT / "app"}

# Lowest floor first: a room may import only rooms listed above it (and its own insides).
FLOORS = [
    "neox_lite.version",
    "neox_lite.errors",
    "neox_lite.files",
    "neox_lite.units",
    "neox_lite.user_cache",
    "neox_lite.hub",
    "neox_lite.config",
    "neox_lite.tokenizer",
    "neox_lite.checkpoint",
    "neox_lite.formats",
    "neox_lite.cache",
    "neox_lite.kernels",
    "neox_lite.outputs",
    "neox_lite.generation",
    "neox_lite.layers",
    "neox_lite.offload",
    "neox_lite.loading.save",
    "neox_lite.loading.options",
    "neox_lite.loading.quantize",
    "neox_lite.loading.skeleton",
    "neox_lite.loading.load",
    "neox_lite.modeling.pretrained",
    "neox_lite.modeling.heads",
    "neox_lite.modeling.auto",
    "neox_lite",
    "neox_lite_quant",
    "neox_lite_app.paths",
    "neox_lite_app.terminal",
    "neox_lite_app.load_for_command",
    "neox_lite_app.conversations",
    "neox_lite_app.models",
    "neox_lite_app.evaluation",
    "neox_lite_app.serving",
    "neox_lite_app.page",
    "neox_lite_app",
]
# The core's third-party imports, and the only ones allowed at the top of a module; others are imported where they are used.
TOP_LEVEL = {"torch", "tokenizers"}
LAZY = {"huggingface_hub", "numpy", "tqdm", "safetensors", "bitsandbytes", "transformers"}
# A backend's insides are imported when it is bound, so they may import what it is made of.
INSIDES = {"neox_lite.kernels.cpu": {"llvmlite", "numpy"}, "neox_lite.kernels.triton": {"triton"}}


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def room(module):
    """The longest floor that a module belongs to; the package itself is the room of its __init__."""
    fits = [f for f in FLOORS if module == f or module.startswith(f + ".")]
    return max(fits, key=len) if fits and not (max(fits, key=len) == "neox_lite" and module != "neox_lite") else None


def imports(module, path):
    """(imported module, whether at the top of the file, line); imports for type checkers only are left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(n) for node in tree.body for n in ([node] if not isinstance(node, ast.Try) else ast.walk(node))}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [
                f"{base}.{a.name}" if room(f"{base}.{a.name}") not in (None, room(base)) else base for a in node.names
            ]
            yield from ((name, id(node) in top, node.lineno) for name in dict.fromkeys(names))


def test_every_module_has_a_room():
    empty = [m for m, path in modules() if path.name == "__init__.py" and not list(imports(m, path))]
    assert [m for m, _ in modules() if room(m) is None and m not in empty] == []


def test_rooms_import_only_rooms_below_them():
    problems = []
    for module, path in modules():
        for name, _, line in imports(module, path):
            here, there = room(module), room(name)
            if name.partition(".")[0] in PACKAGES and (there is None or FLOORS.index(there) > FLOORS.index(here)):
                problems.append(f"{module}:{line} imports {name}, which stands above it")
    assert problems == []


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
