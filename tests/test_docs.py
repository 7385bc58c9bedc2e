"""The documents are true: every block runs, every link leads somewhere, every flag exists.

The tag of a fenced block decides: `python` is executed, `sh` line by line, the last line of `sh fails` must end with exit code
1; `text output` is what the block before it printed, `text error` a message of the code; `text` and `json` are for reading.
"""

import ast
import json
import re
import shutil
from dataclasses import fields
from functools import cache

import generated
import pytest
import torch
from support.documents import PAGES, ROOT, Session, blocks_of, commands_of, prose_of
from support.fake_hub import FakeHub
from support.machine import known_machine

import neox_lite
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.generation.options import Options
from neox_lite.generation.sampling import Sampling
from neox_lite.loading.options import LoadOptions
from neox_lite_app.cli import build_parser, main
from neox_lite_app.conversations.conversation import Conversation, Store
from neox_lite_app.models.family import FAMILY
from neox_lite_app.paths import DEMO

TAGS = {("python",), ("sh",), ("sh", "fails"), ("text",), ("text", "output"), ("text", "error"), ("json",)}
CHANGES = {("python", "file"), ("diff",)}  # of the repository; tests/test_contributing.py makes them
# Commands that no test can run, by how they begin, and why.
NOT_RUN = {
    "python3 -m venv": "makes an environment",
    "pip install": "installs from the network",
    "git clone": "fetches this repository",
    "cd neox-lite": "goes into the clone",
    "neox-lite demo": "tests/test_cli.py runs it",
    "python -m pytest": "these are the tests",
    "bash .ci/run": "runs the tests",
    "python benchmarks/gpu.py": "takes minutes, or a GPU",
    "python -m benchmarks.": "takes minutes, or a GPU",
    "neox-lite bench --shape": "takes minutes",
    "neox-lite generate pythia-1.4b-int4 --device cuda --prompt": "needs a GPU",
    "neox-lite quantize global_step150000": "tests/test_import.py makes such files",
    "lm_eval": "fetches a data set",
    "neox-lite eval pythia-1.4b-int4 --tasks hellaswag": "fetches a data set",
    "neox-lite eval --tasks list": "takes seconds; tests/test_eval.py has a short list",
    "neox-lite serve gpt-neox-20b-int4 --engine vllm": "needs vLLM; tests/test_engine_vllm.py checks what it is given",
}
# Options of other programs that the documents name, and whose they are.
OTHERS = {
    "--listen": "text-generation-webui",
    "--share": "text-generation-webui",
    "--verbose": "text-generation-webui",
    "--multi-user": "text-generation-webui",
    "--trust-remote-code": "text-generation-webui",
    **{
        "--output-tensor-type": "llama-quantize",
        "--address": "ray",
        "--grammar": "llama.cpp",
        "--json-schema": "llama.cpp",
    },
    **{"--kl-divergence": "llama.cpp", "--mlock": "llama.cpp", "--no-mmap": "llama.cpp"},
    **{"--repeat-penalty": "llama.cpp", "--temp": "llama.cpp"},
}
SMALL = GPTNeoXConfig(
    vocab_size=1536,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=0,
    dtype="float16",
)
TOKEN = "hf_of-ann"
IDS = [page.name for page in PAGES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What every hub id stands for here: a random model of 0.8 million parameters with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    torch.manual_seed(0)
    GPTNeoXForCausalLM(SMALL).half().save_pretrained(folder)
    shutil.copy(DEMO / "tokenizer.json", folder)
    settings = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("pad_token")  # as the family's tokenizers, which have none
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    """What every document finds in its folder: a quantized model, and a text."""
    folder = tmp_path_factory.mktemp("prepared")
    assert main(["quantize", str(checkpoint), str(folder / "pythia-1.4b-int4")]) == 0
    (folder / "mytext.txt").write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hub(checkpoint):
    """The family's hub ids, and those of other models of the same owners that the documents name."""
    owners = "|".join(sorted({member.id.partition("/")[0] for member in FAMILY}))
    named = {id for page in PAGES for id in re.findall(rf"\b(?:{owners})/[\w.-]*\w", page.read_text(encoding="utf-8"))}
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with FakeHub(tokens={TOKEN: "ann"}) as hub:
        for id in named | {member.id for member in FAMILY}:
            hub.add(id, files)
        yield hub


@pytest.fixture
def session(hub, prepared, tmp_path, monkeypatch):
    """In an empty folder but for what is prepared, on a machine without a GPU whose speed is known, with a hub of its own."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    known_machine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hub.stand_in(monkeypatch, tmp_path, TOKEN)
    monkeypatch.setenv("NEOX_LITE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TERM", "dumb")
    Store().save(Conversation())
    running = Session({"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)})
    yield running
    running.close()


def not_run(command):
    return next((start for start in NOT_RUN if command.startswith(start)), None)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_every_block_runs(page, session):
    for block in blocks_of(page):
        match block.tag:
            case ("python",):
                session.python(block)
            case ("sh", *rest):
                commands = commands_of(block.code)
                session.printed = ""
                for command in commands:
                    if not_run(command) is None:
                        session.shell(command, fails=rest == ["fails"] and command is commands[-1])
            case ("text", "output"):
                assert_printed(block, session.printed)


def assert_printed(block, printed):
    """Every line shown stands in what was printed, in order; `…` is any text, and a line of it alone any lines."""
    found = [line.rstrip() for line in printed.replace("\r", "\n").splitlines()]
    for line in filter(None, (line.rstrip() for line in block.code.splitlines())):
        if line != "…":
            pattern = ".*".join(map(re.escape, line.split("…")))
            at = next((i for i, one in enumerate(found) if re.fullmatch(pattern, one)), None)
            assert at is not None, f"{block}: {line!r} was not printed, or not after the line before it, but\n{printed}"
            found = found[at + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_has_a_tag_that_says_what_it_is(page):
    known = TAGS | CHANGES if page.name == "CONTRIBUTING.md" else TAGS
    assert [f"{block}: {' '.join(block.tag) or 'no tag'}" for block in blocks_of(page) if block.tag not in known] == []
    indented = re.findall(
        r"(?<=\n)\n {4}[^\s*-].*", re.sub(r"(?m)^ *([*-]|\d+\.) .*\n(?:(?: .*)?\n)*", "", prose_of(page))
    )
    assert indented == [], "blocks have fences and a tag"


def test_what_is_not_run_stands_in_the_documents():
    commands = [
        command
        for page in PAGES
        for block in blocks_of(page)
        if block.tag[0] == "sh"
        for command in commands_of(block.code)
    ]
    assert [start for start in NOT_RUN if not any(not_run(command) == start for command in commands)] == []


# Messages --------------------------------------------------------------------------------------------------------------


@cache
def messages():
    """Every text of the code as a pattern, with anything where values are put in; short ones fit too much."""
    patterns = []
    for folder in ("neox_lite", "quant", "app"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                values = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [getattr(value, "value", None) for value in values]
                if sum(len(text) for text in texts if isinstance(text, str)) >= 12:
                    parts = (re.escape(text) if isinstance(text, str) else ".+" for text in texts)
                    patterns.append(re.compile("(neox-lite: warning: )?(.+: )?" + "".join(parts), re.DOTALL))
    return patterns


def test_quoted_messages_are_those_of_the_code():
    lines = [
        (block, re.sub("^neox-lite: error: |; …$", "", line))
        for page in PAGES
        for block in blocks_of(page)
        if block.tag == ("text", "error")
        for line in block.code.splitlines()
    ]
    assert [f"{block}: {line}" for block, line in lines if not any(p.fullmatch(line) for p in messages())] == []


# What is made from the code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", generated.PARTS)
def test_generated_pages_are_what_the_code_gives(page):
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == generated.render(page), (
        "python docs/generated.py --write"
    )


def test_everything_public_is_described():
    described = {cls.__name__ for cls in generated.CLASSES} | {"NeoxLiteError", "__version__"}
    page = (ROOT / "docs" / "coming-from-transformers.md").read_text(encoding="utf-8")
    beside = set(neox_lite.__all__) - described
    assert {name for name in beside if f"`{name}`" not in page} == set()
    assert {name for name in neox_lite.FROM_TRANSFORMERS if f"`{name}`" not in page} == set()
    assert described <= set(neox_lite.__all__)


def test_every_option_is_described():
    tables = {cls: generated.options(cls) for cls in (LoadOptions, Options)} | {Sampling: generated.parameters()}
    for cls, table in tables.items():
        rows = [row.split("|") for row in list(table)[2:]]
        assert [row[1] for row in rows if not row[-2].strip()] == []
        assert len(rows) == len([field for field in fields(cls) if field.name != "sampling"])


# Links -----------------------------------------------------------------------------------------------------------------


@cache
def anchors(page):
    """The names that headings have as targets of links, by GitHub's rule."""
    titles = re.findall(r"^#+ +(.*?) *#*$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*IDS, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(<?([^)>\s]+)>?[^)]*\)", prose_of(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_every_page_is_on_the_map():
    listed = {name for _, name in re.findall(r"\]\((\./)?([\w.-]+\.md)", (ROOT / "docs/README.md").read_text("utf-8"))}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == listed


# Commands and options --------------------------------------------------------------------------------------------------


@cache
def options():
    """Command -> its options."""
    commands = next(action for action in build_parser()._actions if action.choices)
    return {
        name: {flag for action in sub._actions for flag in action.option_strings}
        for name, sub in commands.choices.items()
    }


def named_in(page):
    """(text, command or None, option or None) for each command and option in inline code and in `text` blocks."""
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page))
    shown = [line for block in blocks_of(page) if block.tag == ("text",) for line in block.code.splitlines()]
    for text in [*inline, *(line for line in shown if "neox-lite " in line)]:
        command = re.search(r"\bneox-lite ([a-z]+)", text)
        flags = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)
        for flag in flags or [None]:
            yield text, command and command[1], flag


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_commands_and_options_exist(page):
    """An option is the named command's; without one, that of any command, or of a script that the page names."""
    text = page.read_text(encoding="utf-8")
    scripts = set(re.findall(r"(?:benchmarks|docs)/[\w/]+\.py", text))
    scripts |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (benchmarks[.\w]+)", text)}
    scripts |= {"benchmarks/gpu/measure.py"} & {s.replace("gpu.py", "gpu/measure.py") for s in scripts}
    theirs = {flag for script in scripts for flag in re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text("utf-8"))}
    every = set.union(*options().values()) | {"--version"} | theirs | OTHERS.keys()
    wrong = []
    for text, command, flag in named_in(page):
        if command is not None and command not in options():
            wrong.append(text)
        elif flag is not None and flag not in (options()[command] if command else every):
            wrong.append(f"{flag} in {text}")
    assert wrong == []


def test_other_programs_options_are_still_named():
    named = {flag for page in PAGES for *_, flag in named_in(page)}
    assert sorted(OTHERS.keys() - named) == []


def test_every_option_says_what_it_does():
    commands = next(action for action in build_parser()._actions if action.choices)
    silent = [
        f"{name} {action.option_strings[0]}"
        for name, sub in commands.choices.items()
        for action in sub._actions
        if action.option_strings and not action.help
    ]
    assert silent == []


# The README ------------------------------------------------------------------------------------------------------------


def test_the_readmes_two_commands_stand_there_to_the_letter():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/neox-lite demo" in readme
    assert "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/python -m pytest" in readme
