"""CONTRIBUTING.md's walks, followed to the letter in a copy of the repository, and the ways of a token and a weight."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from support.serving import application, demo_engine, serving

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


def test_a_command_an_endpoint_and_a_parameter_added_as_described_answer(copy):
    code = f"""
import sys
import numpy as np
sys.path[:0] = {[str(copy), str(copy / "quant"), str(copy / "app")]!r}
from starlette.testclient import TestClient
from neox_lite.generation.sampling import Sampling, candidates
from neox_lite.version import __version__
from neox_lite_app.cli import build_parser, main
from neox_lite_app.serving.api import Api
assert TestClient(Api(None).app()).get("/version").json() == {{"version": __version__}}
words = ["generate", "M", "--prompt", "x", "--top-n-sigma", "2"]
sampling = Sampling(do_sample=True, top_k=0, top_n_sigma=build_parser().parse_args(words).top_n_sigma)
logits = np.array([3, 2.4, 2, -np.inf], np.float32)  # 3 less two deviations of 0.41 is 2.18
assert candidates(logits, sampling)[0].tolist() == [0, 1]
sys.exit(main(["tokens", {str(DEMO)!r}, "To be or not", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["tokens"] == len(found["ids"]) > 3


def test_a_format_a_backend_and_a_parameter_added_as_described_pass_the_contracts(copy):
    files = [f"tests/test_{name}.py" for name in ("kernels", "formats", "quantize", "floors", "parameters")]
    chosen = "mxint8 or [float64- or offers_every_format or rooms_import or parameters"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", f"({chosen}) and not triton", *files],
        cwd=copy, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    for contract in (
        "products_equal_float64[float64-mxint8-float16-float32]",
        "attention_equals_float64_over_pages_and_forks[float64-20-float32]",
        "logits_equal_the_reference_s[cpu-mxint8-parallel]",
        "logits_equal_the_reference_s[float64-mxint8-sequential]",
        "encode_gives_what_specs_promise",
        "the_folder_is_whole_and_the_same_model_when_it_is_saved_again",
        "the_command_line_offers_every_format",
        "rooms_import_only_rooms_below_them",
        "every_number_is_a_flag_a_field_a_control_and_a_line_of_the_docs",
        "every_parameter_has_what_applies_it",
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


class Watch:
    """Notes which functions are called, by whichever thread that starts after it."""

    def __init__(self):
        self.called = []

    def __call__(self, frame, event, argument):
        if event == "call" and "neox_lite" in (path := frame.f_code.co_filename):
            inside = re.split("/neox_lite(?:_app)?/", path)[-1]
            owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
            owner = owner if isinstance(owner, type) else type(owner)
            names = {"", *(f"{c.__name__}." for c in owner.__mro__)}
            self.called.append({(inside, prefix + frame.f_code.co_name) for prefix in names})

    def follows(self, heading):
        """Fail unless the functions under a heading were called in their order."""
        places = iter(self.called)
        for step in described(heading):
            assert any(step in names for names in places), f"{step} is not called after those before it"


def goes(heading, run):
    """Whether run() calls the functions under a heading, in their order."""
    watch = Watch()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    watch.follows(heading)


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


def test_a_request_goes_the_way_that_is_described():
    assert len(described("One request's way")) == 14
    watch = Watch()
    threading.setprofile(watch)
    try:
        with demo_engine() as engine, serving(application(engine)) as address:
            body = {"messages": [{"role": "user", "content": "To be"}], "max_tokens": 4, "stream": True}
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    finally:
        threading.setprofile(None)
    assert reply.text.endswith("data: [DONE]\n\n")
    watch.follows("One request's way")
