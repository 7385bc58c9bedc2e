"""CONTRIBUTING.md's walks, followed to the letter in a copy of the repository, and the ways of a token and a weight."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neox_lite import GPTNeoXForCausalLM
from neox_lite.kernels import reference
from neox_lite_app.paths import DEMO

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARTS = ("neox_lite", "quant", "app", "tests", "docs", "pyproject.toml")


def blocks(language):
    """(path, code) of the blocks that begin with the file they belong to."""
    return re.findall(rf"^```{language}\n# (\S+\.py)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def changed(text, diff):
    """A text after a diff whose hunks, between lines of dots, are found by what they keep and take away."""
    for hunk in diff.split("...\n"):
        before, after = (
            "".join(line[1:] for line in hunk.splitlines(True) if line[0] in kinds) for kinds in (" -", " +")
        )
        assert text.count(before) == 1, f"stands {text.count(before)} times in the file:\n{before}"
        text = text.replace(before, after)
    return text


ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with all that CONTRIBUTING.md adds to it."""
    root = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        make = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        make(ROOT / part, root / part)
    for path, code in blocks("python file"):
        assert not (root / path).exists()
        (root / path).write_text(code, encoding="utf-8")
    for path, diff in blocks("diff"):
        (root / path).write_text(changed((root / path).read_text(encoding="utf-8"), diff), encoding="utf-8")
    assert len(blocks("python file")) >= 3 and len(blocks("diff")) >= 6
    return root


def test_a_command_and_an_endpoint_added_as_described_answer(copy):
    code = f"""
import sys
sys.path[:0] = {[str(copy), str(copy / "quant"), str(copy / "app")]!r}
from starlette.testclient import TestClient
from neox_lite.version import __version__
from neox_lite_app.cli import main
from neox_lite_app.serving.api import Api
assert TestClient(Api(None).app()).get("/version").json() == {{"version": __version__}}
sys.exit(main(["tokens", {str(DEMO)!r}, "To be or not", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["tokens"] == len(found["ids"]) > 3


def test_a_format_and_a_backend_added_as_described_pass_the_contracts(copy):
    files = [f"tests/test_{name}.py" for name in ("contracts", "formats", "quantize", "floors")]
    chosen = "mxint8 or (float64 and dense) or (float64 and int4) or offers_every_format or rooms_import"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", f"({chosen}) and not triton", *files],
        cwd=copy, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    for contract in (
        "logits_equal_the_reference_s[parallel-mxint8-cpu]",
        "logits_equal_the_reference_s[sequential-mxint8-float64]",
        "encode_gives_what_specs_promise",
        "a_quantized_model_saved_again_is_the_same_model",
        "the_command_line_offers_every_format",
        "rooms_import_only_rooms_below_them",
    ):
        assert re.search(rf"^PASSED .*{re.escape(contract)}", done.stdout, re.MULTILINE), contract


def described(heading):
    """(file, function) of each step of the list under a heading."""
    way = TEXT.partition(f"## {heading}")[2].partition("\n\nA backend")[0].partition("\n## ")[0]
    return [
        (path, name)
        for path, names in re.findall(r"`([\w/]+\.py)`,((?:\s+`[\w.]+`,?)+)", way)
        for name in re.findall(r"`([\w.]+)`", names)
    ]


def goes(heading, run):
    """Whether run() calls the functions under a heading, in their order."""
    called = []

    def watch(frame, event, argument):
        if event == "call" and "neox_lite" in (path := frame.f_code.co_filename):
            inside = re.split("/neox_lite(?:_app)?/", path)[-1]
            owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
            owner = owner if isinstance(owner, type) else type(owner)
            names = {"", *(f"{c.__name__}." for c in owner.__mro__)}
            called.append({(inside, prefix + frame.f_code.co_name) for prefix in names})

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    places = iter(called)
    for step in described(heading):
        assert any(step in names for names in places), f"{step} is not called after those before it"


USED = """
import numpy as np
import generated
from neox_lite.errors import ArgumentError
from neox_lite.generation.options import Options
from neox_lite.generation.sampling import candidates
from neox_lite_app.cli import build_parser
from neox_lite_app.page.settings import FIELDS, options_of
from neox_lite_app.serving import schema

try:
    Options.parse({"top_n_sigma": -1})
except ArgumentError as error:
    print("checked:", error)
for command in (["generate", "M", "--prompt", "x"], ["chat", "M"]):
    print("flag:", build_parser().parse_args([*command, "--top-n-sigma", "1.5"]).top_n_sigma)
asked = schema.completion({"prompt": "x", "top_n_sigma": 1.5}).options
print("field:", asked["top_n_sigma"])
try:
    schema.completion({"prompt": "x", "top_n_sigma": 101})
except schema.RequestError as error:
    print("refused:", error)
labels = [field.label for field in FIELDS if field.name == "top_n_sigma"]
print("control:", labels, options_of({"top_n_sigma": 2})["top_n_sigma"])
print("docs:", sum("`top_n_sigma`" in line for line in (*generated.parameters(), *generated.api_parameters())))
sampling = Options.parse(asked).sampling
logits = np.array([5, 4.9, 1, -np.inf, 0, 0, 0], np.float32)
print("filter:", candidates(logits, sampling)[0].tolist(), "host:", sampling.host_reason)
"""


def run(copy, *words):
    """A process of Python in the copy."""
    rooms = os.pathsep.join(str(copy / room) for room in (".", "quant", "app", "docs"))
    environment = {**ENVIRONMENT, "PYTHONPATH": rooms}
    return subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, timeout=600
    )


def test_a_sampling_parameter_added_as_described_is_an_option_a_flag_a_field_and_a_control(copy):
    done = run(copy, "-c", USED)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        "checked: top_n_sigma is -1.0, expected 0.0 to 100.0",
        "flag: 1.5",
        "flag: 1.5",
        "field: 1.5",
        "refused: top_n_sigma is 101, expected a number from 0 to 100",
        "control: ['Top-n-sigma'] 2.0",
        "docs: 2",
        "filter: [0, 1] host: top_n_sigma is the host's work",
    ]
    tests = run(copy, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not transformers", "tests/test_parameters.py")
    assert tests.returncode == 0, tests.stdout[-4000:]


def test_a_token_goes_the_way_that_is_described():
    assert len(described("One token's way")) == 17
    model = GPTNeoXForCausalLM.from_pretrained(DEMO)
    model.ops = reference
    events = model.stream(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    next(events), next(events)
    goes("One token's way", lambda: next(events))


def test_a_weight_goes_the_way_that_is_described(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert len(described("One weight's way")) == 16
    shutil.copytree(DEMO, tmp_path / "demo")

    def load_and_run():
        model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "demo", quantization="int8")
        # The first pass binds the kernels of the device, the second one those of the reference.
        model(torch.tensor([[5]]))
        model.ops = reference
        model(torch.tensor([[5]]))

    goes("One weight's way", load_and_run)
