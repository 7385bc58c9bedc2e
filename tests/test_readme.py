"""The README's commands are the contract's, its Python runs, and every document's links lead somewhere."""

import re
from pathlib import Path

import pytest

from neox_lite_app.cli import build_parser
from neox_lite_app.demo import FOLDER as DEMO

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_two_commands_stand_there_to_the_letter():
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/neox-lite demo" in README.splitlines()
    tests = "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/python -m pytest"
    assert tests in README.splitlines()


def test_the_five_lines_of_python_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) == 5
    exec(code.replace("EleutherAI/pythia-160m", str(DEMO)), {})
    assert len(capsys.readouterr().out) > len("Once upon a time")


def test_every_command_line_shown_is_one_that_the_parser_takes():
    shown = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("neox-lite ")]
    assert len(shown) >= 2
    for line in shown:
        words = re.findall(r'"[^"]*"|\S+', line)[1:]
        build_parser().parse_args([word.strip('"') for word in words])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [t for t in targets if not t.startswith("http") and not (path.parent / t).exists()] == []
