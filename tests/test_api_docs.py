"""docs/api.md runs: every block of it, against a server of the demo model with the key that it names."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import application, demo_engine, serving

pytest.importorskip("openai", reason="needs pip install '.[test]'")

from neox_lite_app import fields
from neox_lite_app.cli import build_parser
from neox_lite_app.keys import Keys

TEXT = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def urls():
    """Without and with a key."""
    with (
        demo_engine() as engine,
        serving(application(engine)) as free,
        serving(application(engine, Keys(KEY))) as guarded,
    ):
        yield free, guarded


def test_every_block_is_of_a_kind_that_is_run():
    assert len(BLOCKS) >= 8
    starts = ("neox-lite ", "curl ", "NEOX_LITE_API_KEY=", "lm_eval ", "from openai", "import json")
    assert [code for _, code in BLOCKS if not code.startswith(starts)] == []


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "python"])
def test_python_runs(urls, code, capsys):
    exec(code.replace("http://127.0.0.1:7860", urls[0]), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("code", [code for _, code in BLOCKS if code.startswith("curl")])
def test_curl_is_answered(urls, code):
    command = code.replace("http://127.0.0.1:7860", urls[KEY in code]).replace("curl -s", "curl -s --fail-with-body")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and '"object"' in done.stdout, done.stdout


@pytest.mark.parametrize("code", [code for _, code in BLOCKS if "neox-lite serve" in code])
def test_commands_are_ones_that_the_parser_takes(code):
    for line in code.splitlines():
        build_parser().parse_args(line.partition("neox-lite ")[2].split())


def test_the_harness_is_pointed_at_an_endpoint_that_exists():
    (code,) = [code for _, code in BLOCKS if code.startswith("lm_eval")]
    assert "base_url=http://127.0.0.1:7860/v1/completions" in code and "local-completions" in code


def test_the_limits_that_it_names_are_those_of_the_code():
    assert f"{fields.MAX_SCHEMA:,} characters" in TEXT and f"regexes {fields.MAX_REGEX:,}" in TEXT
    assert f"up to {fields.MAX_STOPS} texts" in TEXT and f"1 to {fields.MAX_ANSWERS}" in TEXT
    assert f"up to {fields.MAX_BIASES} ids" in TEXT and f"1 to {fields.MAX_MESSAGES}" in TEXT


def test_every_field_stands_in_it():
    known = fields.COMPLETION.keys() | fields.CHAT.keys() | {"include_usage"}
    assert [
        name for name in sorted(known - {"add_generation_prompt", "model"}) if not re.search(f"[`.]{name}[`.]", TEXT)
    ] == []
