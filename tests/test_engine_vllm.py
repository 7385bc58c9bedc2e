"""serve --engine vllm: the command line that an installed vLLM would get, recorded by a stand-in; never run on a GPU."""

import json
import shutil
import sys
from pathlib import Path

import jinja2
import pytest
from support.commands import environment, start

from neox_lite_app.cli import build_parser, main
from neox_lite_app.conversations.prompt_forms import FORMS
from neox_lite_app.paths import DEMO
from neox_lite_app.serving.vllm import LEFT_OUT, template_of
from neox_lite_quant import convert

STAND_IN = """#!{python}
import json, os, sys
json.dump({{"argv": sys.argv, "environment": dict(os.environ)}}, open({out!r}, "w"))
sys.exit(7)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A PATH with a `vllm` that writes down what it was called with, and ends with code 7."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, out=str(tmp_path / "record.json")))
    program.chmod(0o755)
    return tmp_path


def serve(home, *words, code=7, path=None, **variables):
    """Run the command; the stand-in's record, and stderr."""
    env = environment(PATH=str(home / "bin") if path is None else path, **variables)
    process = start("serve", *words, "--engine", "vllm", env=env)
    _, err = process.communicate()
    assert process.returncode == code, err
    record = home / "record.json"
    return json.loads(record.read_text()) if record.exists() else None, err


def flags(record):
    words = record["argv"][3:]
    assert len(words) % 2 == 0 and all(word.startswith("--") for word in words[::2])
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_command_line_is_the_recorded_one(stand_in):
    record, told = serve(stand_in, DEMO)
    template = flags(record).pop("--chat-template")
    assert record["argv"] == [
        *(str(stand_in / "bin" / "vllm"), "serve", str(DEMO), "--served-model-name", "demo_model"),
        *("--host", "127.0.0.1", "--port", "7860", "--max-model-len", "512", "--max-num-seqs", "64"),
        *("--dtype", "float16", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "1"),
        *("--chat-template", template),
    ]
    assert Path(template).read_text() == template_of(FORMS["dialogue"])
    assert "hand over to vLLM: " in told and "the chat page: vLLM serves the API alone" in told
    assert "not handed over: texts that end an answer" in told and "\\nUser:" in told


def test_every_flag_that_vllm_knows_is_handed_over(stand_in):
    words = [
        *("--host", "::1", "--port", "9000", "--context", "256", "--max-sequences", "8", "--form", "dolly"),
        "--no-page",
    ]
    words += ["--tensor-parallel", "2", "--pipeline-parallel", "4", "--distributed", "ray"]
    record, told = serve(stand_in, DEMO, *words)
    found = flags(record)
    assert Path(found.pop("--chat-template")).name.startswith("dolly-")
    assert found == {
        "--served-model-name": "demo_model",
        **{"--host": "::1", "--port": "9000", "--max-model-len": "256", "--max-num-seqs": "8", "--dtype": "float16"},
        **{"--tensor-parallel-size": "2", "--pipeline-parallel-size": "4"},
        "--distributed-executor-backend": "ray",
    }
    assert f"every machine needs it at {DEMO}" in told and "chat page" not in told


@pytest.mark.parametrize("how", ["flag", "environment", "auto"])
def test_the_key_is_in_the_environment_and_never_in_the_command_line(stand_in, how):
    words = {"flag": ["--api-key", "sesame-sesame"], "auto": ["--api-key", "auto"], "environment": []}[how]
    variables = {"NEOX_LITE_API_KEY": "sesame-sesame"} if how == "environment" else {}
    record, told = serve(stand_in, DEMO, "--host", "0.0.0.0", *words, **variables)
    key = record["environment"]["VLLM_API_KEY"]
    assert key == "sesame-sesame" or (how == "auto" and len(key) > 30 and f"shown this once: {key}" in told)
    assert not any(key in word for word in record["argv"]) and "NEOX_LITE_API_KEY" not in record["environment"]
    assert told.count(key) == (how == "auto")


def test_other_hosts_need_a_key_here_too(stand_in):
    record, told = serve(stand_in, DEMO, "--host", "0.0.0.0", code=1)
    assert record is None and "needs --api-key KEY" in told


def test_a_machine_without_vllm_is_told_what_to_install(tmp_path):
    record, told = serve(tmp_path, DEMO, code=1, path=str(tmp_path))
    assert record is None
    assert told == (
        "neox-lite: error: --engine vllm needs vLLM, which is not installed: pip install vllm, on Linux with a GPU "
        "(docs/ecosystem.md)\n"
    )


def test_every_flag_that_vllm_lacks_is_said(stand_in):
    words = [
        *("--gpu-memory", "8GiB", "--cpu-memory", "8GiB", "--kv", "int8", "--head", "int8", "--threads", "1"),
        "--exact",
    ]
    words += ["--warm", "--queue", "7", "--idle-unload", "60", "--allowed-host", "x.example", "--device", "cpu"]
    _, told = serve(stand_in, DEMO, *words)
    lines = [line for line in told.splitlines() if line.startswith("not handed over: ")]
    assert [line.removeprefix("not handed over: ") for line in lines[:-1]] == [text for _, text in LEFT_OUT.values()]


def test_every_argument_of_serve_is_handed_over_or_said():
    known = {"model", "revision", "host", "port", "api_key", "max_sequences", "context", "form", "engine"}
    known |= {"tensor_parallel", "pipeline_parallel", "distributed", "command", "module", "function"}
    known |= {"adapter"}  # refused: tests/test_adapter.py
    assert vars(build_parser().parse_args(["serve"])).keys() == known | LEFT_OUT.keys()


def test_a_template_of_the_folder_stays_its_own(stand_in, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(DEMO, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    assert "--chat-template" not in flags(serve(stand_in, folder)[0])
    assert "--chat-template" in flags(serve(stand_in, folder, "--form", "dolly")[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor-parallel", "3"], "--tensor-parallel is 3, which does not divide the 4 attention heads"),
        (["--pipeline-parallel", "5"], "--pipeline-parallel is 5, but the model has 4 layers"),
        (["--context", "1024"], "--context is 1024, but the model was made for 512"),
        (["--port", "0"], "--engine vllm needs a --port"),
    ],
)
def test_what_cannot_be_is_refused_before_vllm_starts(stand_in, words, message):
    record, told = serve(stand_in, DEMO, *words, code=1)
    assert record is None and message in told and told.count("\n") == 1


def test_groups_are_never_cut_by_tensor_parallelism(stand_in, tmp_path):
    convert(DEMO, tmp_path / "int4", format="int4", group_size=128)
    record, told = serve(stand_in, tmp_path / "int4", "--tensor-parallel", "4", code=1)
    assert record is None and "256 columns of attention.dense do not make 4 parts of whole groups of 128" in told
    assert flags(serve(stand_in, tmp_path / "int4", "--tensor-parallel", "2")[0])["--tensor-parallel-size"] == "2"


def test_a_model_is_needed_and_nf4_is_refused(stand_in, tmp_path):
    assert "--engine vllm needs MODEL" in serve(stand_in, code=1)[1]
    convert(DEMO, tmp_path / "nf4", format="nf4")
    assert "nf4 is not handed to vLLM; make a folder of int4 or int8" in serve(stand_in, tmp_path / "nf4", code=1)[1]


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
