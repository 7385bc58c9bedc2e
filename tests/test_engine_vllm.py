"""serve --engine vllm: the command line that an installed vLLM would get, recorded by a stand-in; never run on a GPU."""

import os
import shutil
from pathlib import Path

import jinja2
import pytest
from support.checkpoints import change_json
from support.commands import start

from neox_lite_app.cli import build_parser, main
from neox_lite_app.conversations.prompt_forms import FORMS
from neox_lite_app.paths import DEMO
from neox_lite_app.serving.vllm import LEFT_OUT, template_of
from neox_lite_quant import convert


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A program of that name, alone in the PATH."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


@pytest.fixture
def serve(vllm, monkeypatch, capsys):
    """Run the command; what vLLM would get in place of this process, and stderr."""
    records = []

    def replace(program, command, environment):
        records.append({"argv": [program, *command[1:]], "environment": environment})
        raise SystemExit(7)

    def call(*words):
        records.clear()
        try:
            code = main(["serve", *map(str, words), "--engine", "vllm"])
        except SystemExit as end:
            code = end.code
        assert code == (7 if records else 1)
        return (records or [None])[0], capsys.readouterr().err

    monkeypatch.setattr(os, "execve", replace)
    return call


def flags(record):
    words = record["argv"][3:]
    assert len(words) % 2 == 0 and all(word.startswith("--") for word in words[::2])
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_command_becomes_vllm(vllm):
    process = start("serve", DEMO, "--engine", "vllm")
    _, err = process.communicate()
    assert process.returncode == 7 and f"hand over to vLLM: {vllm} serve" in err


def test_the_command_line_is_the_recorded_one(serve, vllm):
    record, told = serve(DEMO)
    template = flags(record).pop("--chat-template")
    assert record["argv"] == [
        *(str(vllm), "serve", str(DEMO), "--served-model-name", "demo_model"),
        *("--host", "127.0.0.1", "--port", "7860", "--max-model-len", "512", "--max-num-seqs", "64"),
        *("--dtype", "float16", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "1"),
        *("--chat-template", template),
    ]
    assert Path(template).read_text() == template_of(FORMS["dialogue"])
    assert "hand over to vLLM: " in told and "the chat page: vLLM serves the API alone" in told
    assert "not handed over: texts that end an answer" in told and "\\nUser:" in told


def test_every_flag_that_vllm_knows_is_handed_over(serve):
    words = "--host ::1 --port 9000 --context 256 --max-sequences 8 --form dolly --no-page"
    words += " --tensor-parallel 2 --pipeline-parallel 4 --distributed ray"
    record, told = serve(DEMO, *words.split())
    found = flags(record)
    assert Path(found.pop("--chat-template")).name.startswith("dolly-")
    assert found == {
        **{"--served-model-name": "demo_model", "--dtype": "float16", "--host": "::1", "--port": "9000"},
        **{"--max-model-len": "256", "--max-num-seqs": "8", "--distributed-executor-backend": "ray"},
        **{"--tensor-parallel-size": "2", "--pipeline-parallel-size": "4"},
    }
    assert f"every machine needs it at {DEMO}" in told and "chat page" not in told


@pytest.mark.parametrize("how", ["flag", "environment", "auto"])
def test_the_key_is_in_the_environment_and_never_in_the_command_line(serve, monkeypatch, how):
    words = {"flag": ["--api-key", "sesame-sesame"], "auto": ["--api-key", "auto"], "environment": []}[how]
    if how == "environment":
        monkeypatch.setenv("NEOX_LITE_API_KEY", "sesame-sesame")
    record, told = serve(DEMO, "--host", "0.0.0.0", *words)
    key = record["environment"]["VLLM_API_KEY"]
    assert key == "sesame-sesame" or (how == "auto" and len(key) > 30 and f"shown this once: {key}" in told)
    assert not any(key in word for word in record["argv"]) and "NEOX_LITE_API_KEY" not in record["environment"]
    assert told.count(key) == (how == "auto")


def test_a_machine_without_vllm_is_told_what_to_install(serve, vllm):
    vllm.unlink()
    record, told = serve(DEMO)
    missing = "--engine vllm needs vLLM, which is not installed: pip install vllm, on Linux with a GPU"
    assert record is None and told == f"neox-lite: error: {missing} (docs/ecosystem.md)\n"


def test_every_flag_that_vllm_lacks_is_said(serve):
    words = "--gpu-memory 8GiB --cpu-memory 8GiB --kv int8 --head int8 --threads 1 --exact --warm --queue 7"
    words += " --idle-unload 60 --allowed-host x.example --device cpu"
    _, told = serve(DEMO, *words.split())
    lines = [line for line in told.splitlines() if line.startswith("not handed over: ")]
    assert [line.removeprefix("not handed over: ") for line in lines[:-1]] == [text for _, text in LEFT_OUT.values()]


def test_every_argument_of_serve_is_handed_over_or_said():
    known = {"model", "revision", "host", "port", "api_key", "max_sequences", "context", "form", "engine"}
    known |= {"tensor_parallel", "pipeline_parallel", "distributed", "command", "module", "function"}
    known |= {"adapter"}  # refused: tests/test_adapter.py
    assert vars(build_parser().parse_args(["serve"])).keys() == known | LEFT_OUT.keys()


def test_a_template_of_the_folder_stays_its_own(serve, tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "own")
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    assert "--chat-template" not in flags(serve(folder)[0])
    assert "--chat-template" in flags(serve(folder, "--form", "dolly")[0])


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("", "", "--engine vllm needs MODEL"),
        ("demo", "--host 0.0.0.0", "needs --api-key KEY"),
        ("demo", "--port 0", "--engine vllm needs a --port"),
        ("demo", "--tensor-parallel 3", "--tensor-parallel is 3, which does not divide the 4 attention heads"),
        ("demo", "--pipeline-parallel 5", "--pipeline-parallel is 5, but the model has 4 layers"),
        ("demo", "--context 1024", "--context is 1024, but the model was made for 512"),
        ("nf4", "", "nf4 is not handed to vLLM; make a folder of int4 or int8"),
        # Groups are never cut.
        ("int4", "--tensor-parallel 4", "columns of attention.dense do not make 4 parts of whole groups of 128"),
    ],
)
def test_what_cannot_be_is_refused_before_vllm_starts(serve, tmp_path, model, words, message):
    if model in ("int4", "nf4"):
        convert(DEMO, tmp_path / model, format=model)
    folder = {"": [], "demo": [DEMO]}.get(model, [tmp_path / model])
    record, told = serve(*folder, *words.split())
    assert record is None and message in told.splitlines()[-1] and told.count("neox-lite: error: ") == 1
    if model == "int4":
        assert flags(serve(*folder, "--tensor-parallel", "2")[0])["--tensor-parallel-size"] == "2"


def test_flags_of_several_gpus_are_for_vllm_alone(capsys):
    with pytest.raises(SystemExit) as usage:
        main(["serve", str(DEMO), "--tensor-parallel", "2"])
    assert usage.value.code == 2 and "--tensor-parallel is for --engine vllm" in capsys.readouterr().err


TALKS = [
    [("user", "Who are you?")],
    [("user", "a\nb"), ("assistant", "x\n\ny"), ("user", "  'q' \"w\" {{ z }} ")],
    [("system", "Be brief.\nAlways."), ("user", "ü €"), ("assistant", ""), ("user", "again")],
]


@pytest.mark.parametrize("trim", [True, False], ids=["trimmed", "untrimmed"])
@pytest.mark.parametrize("name", FORMS)
def test_the_template_writes_what_the_form_writes(name, trim):
    """trimmed: transformers and vLLM drop line breaks after blocks of a template."""
    environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
    template = environment.from_string(template_of(FORMS[name]))
    for talk in TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        wanted = FORMS[name].render(messages)
        assert template.render(messages=messages, add_generation_prompt=True) == wanted
