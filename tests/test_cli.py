"""The command line as scripts use it: JSON on stdout, progress on stderr, one line for what goes wrong."""

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from support.checkpoints import change_json, flip
from support.commands import PIPES, ROOT, command, environment, run_python, start

from neox_lite import GPTNeoXForCausalLM
from neox_lite.checkpoint.folder_writer import JOURNAL
from neox_lite_app import load_for_command
from neox_lite_app.cli import build_parser, main
from neox_lite_app.paths import DEMO
from neox_lite_app.terminal import bar

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def json_of(run):
    """A command's object, with its progress on stderr."""

    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out), err

    return call


def test_quantize_reports_its_figures(json_of, tmp_path):
    result, err = json_of("quantize", DEMO, tmp_path / "q", "--format", "int8", "--group-size", 64, "--method", "rtn")
    assert {"bytes_in", "bytes_out", "seconds", "peak_bytes"} <= result.keys()
    assert result["bytes_in"] > result["bytes_out"] > result["bytes_in"] / 4
    assert "int8 g64 rtn" in err and "100%" in err


DEFAULT = f"{DEMO.name}-int4-g128"
NAMED = {
    "given": [DEMO, "out"],
    "after options": [DEMO, "--format", "int8", "out"],
    "default": [DEMO],
    "dot": ["link/."],
}


@pytest.mark.parametrize("name", NAMED)
def test_a_dry_run_names_the_destination_and_writes_nothing(json_of, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(DEMO)
    result, _ = json_of("quantize", *NAMED[name], "--dry-run")
    assert result["destination"] == ("out" if "out" in NAMED[name] else DEFAULT) and result["bytes_out"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_the_next_command_can_be_pasted_whatever_the_folder_is_called(run, tmp_path):
    err = run("quantize", DEMO, tmp_path / "it's a name")[2]
    words = shlex.split(err.splitlines()[-1].partition("next: neox-lite ")[2])
    assert words[:2] == ["generate", f"{tmp_path}/it's a name"]


def test_bars_that_follow_each_other_do_not_move_the_cursor(capsys):
    with bar("one") as one, bar("two") as two:
        one(5, 5)
        two(5, 5)
    err = capsys.readouterr().err
    assert "one: 100%" in err and "two: 100%" in err and "\x1b" not in err


def test_an_interrupted_quantize_says_that_it_can_go_on(run, tmp_path, monkeypatch):
    def interrupted(source, destination, **options):
        Path(destination).mkdir()
        (Path(destination) / JOURNAL).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("neox_lite_app.models.convert.convert", interrupted)
    code, out, err = run("quantize", DEMO, tmp_path / "q")
    assert code == 130 and out == "" and "the same command goes on" in err


@pytest.mark.skipif(not Path("/dev/zero").is_char_device(), reason="no /dev/zero")
def test_a_text_without_an_end_is_refused_and_not_read(run, demo_int4):
    code, out, err = run("compare", DEMO, demo_int4, "--text", "/dev/zero")
    assert code == 1 and out == "" and "/dev/zero: is a device" in err


def test_verify_says_whole_or_names_what_is_not(run, demo_int4, tmp_path):
    code, out, _ = run("verify", demo_int4, "--json")
    assert code == 0 and json.loads(out) == {"ok": True, "problems": []}
    code, out, err = run("verify", DEMO, "--json")
    assert code == 0 and json.loads(out)["ok"] and "no hashes" in err
    for spoil, problem in (
        (lambda folder: flip(folder / "model.safetensors", 20_000), "model.safetensors"),
        (lambda folder: (folder / "neox_lite_manifest.json").unlink(), "no neox_lite_manifest.json"),
    ):
        folder = shutil.copytree(demo_int4, tmp_path / str(len(problem)))
        spoil(folder)
        code, out, _ = run("verify", folder, "--json")
        result = json.loads(out)
        assert code == 1 and not result["ok"] and any(problem in found for found in result["problems"])


def test_generate_prints_text_alone_on_stdout_and_speed_on_stderr(run, demo_int4):
    code, out, err = run("generate", demo_int4, "--prompt", "ROMEO:\n", "--max-new-tokens", 12)
    model = GPTNeoXForCausalLM.from_pretrained(demo_int4)
    ids = model.tokenizer("ROMEO:\n", return_tensors="pt").input_ids
    expected = model.tokenizer.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :])
    assert code == 0 and out == expected + "\n"
    assert re.search(r"12 new ones, [0-9.]+ tokens/s \(length\)", err)


def test_generate_json_holds_the_contract(json_of, demo_int4):
    sampled = ("--max-new-tokens", 8, "--temperature", 1.2, "--seed", 5)
    first, again = (json_of("generate", demo_int4, "--prompt", "O, ", *sampled)[0] for _ in range(2))
    assert set(first) == {"text", "tokens", "prompt_tokens", "finish_reason", "decode_tokens_per_s"}
    assert first["tokens"] == 8 and first["finish_reason"] == "length" and first["text"] == again["text"]


@pytest.mark.parametrize("drafter", [["--lookup"], ["--draft", DEMO]], ids=["lookup", "draft"])
def test_generate_with_drafts_prints_the_same_text_and_counts_them(run, json_of, demo_int4, drafter):
    words = ("generate", demo_int4, "--exact", "--prompt", "KING RICHARD III:\nO, O, O, ", "--max-new-tokens", 40)
    _, plain, _ = run(*words)
    code, out, err = run(*words, *drafter)
    assert code == 0 and out == plain
    assert re.search(r"40 new ones, .* tokens/s, \d\.\d\d tokens a pass, \d+ of \d+ drafted ones right \(length\)", err)
    counts = json_of(*words, *drafter)[0]["speculation"]
    assert counts.keys() == {"passes", "drafted", "accepted", "mean_tokens_per_pass"}
    assert counts["passes"] + counts["accepted"] == 39
    assert counts["mean_tokens_per_pass"] == 39 / counts["passes"]


def test_what_is_wrong_with_a_draft_is_said_of_the_draft(run, demo_int4, tmp_path, monkeypatch):
    narrow = shutil.copytree(DEMO, tmp_path / "narrow")
    change_json(narrow / "config.json", max_position_embeddings=256)
    words = ("generate", demo_int4, "--prompt", "O, ", "--context", 300, "--cpu-memory", "64GB")
    for draft, message in ((narrow, "context is 300, but"), ("/no/such/folder", "no such folder")):
        code, _, err = run(*words, "--draft", draft)
        assert code == 1 and "error: --draft: " in err and message in err
    load = load_for_command.GPTNeoXForCausalLM.from_pretrained

    def tight(name, **options):
        return load(name, **{**options, "max_memory": {"cpu": 1 << 20}} if name == str(DEMO) else options)

    monkeypatch.setattr(load_for_command.GPTNeoXForCausalLM, "from_pretrained", tight)
    code, _, err = run(*words, "--draft", DEMO)
    assert code == 1 and re.search(r"error: --draft: the model does not fit: \d+ MiB", err)


def test_generate_stops_before_a_stop_text_and_by_default_at_the_end_of_the_context(run, json_of, demo_int4):
    words = ("generate", demo_int4, "--prompt", "ROMEO:\n", "--max-new-tokens", 40)
    whole = run(*words)[1]
    result, _ = json_of(*words, "--stop", stop := whole[10:14])
    assert result["text"] == whole[: whole.index(stop)] and result["finish_reason"] == "stop"
    result, _ = json_of("generate", demo_int4, "--prompt", "O, ", "--context", 30)
    assert result["finish_reason"] == "stop" or result["tokens"] + result["prompt_tokens"] == 30


def test_perplexity_is_the_contract_s_definition(json_of, demo_int4, heldout):
    result, _ = json_of("perplexity", demo_int4, "--text", heldout, "--context", 64)
    model = GPTNeoXForCausalLM.from_pretrained(demo_int4)
    ids = model.tokenizer(heldout.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    losses = [
        torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="sum").double()
        for window in torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    ]
    assert result["context"] == 64 and result["tokens"] == 63 * len(losses)
    expected = float((sum(losses) / result["tokens"]).exp())
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)  # float32 sums


def test_cache_and_warming_are_said_on_stderr(json_of, demo_int4):
    words = ("--prompt", "O, ", "--max-new-tokens", 2, "--kv", "int8", "--warm")
    result, err = json_of("generate", demo_int4, *words)
    assert result["tokens"] == 2 and "int8 KV cache" in err and "read the weights: 100%" in err


def test_info_counts_parameters_as_the_model_does(run, json_of, demo_int4):
    result, _ = json_of("info", demo_int4)
    assert result["parameters"] == GPTNeoXForCausalLM.from_pretrained(DEMO).num_parameters()
    assert (result["format"], result["group_size"]) == ("int4", 128)
    assert "3.95 million parameters" in run("info", DEMO)[1]


def test_doctor_says_why_no_kernels_are_left(run, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_CPU", "nonsense")
    code, out, _ = run("doctor")
    assert code == 0 and "kernels  for this processor: none" in out and "NEOX_LITE_CPU" in out


def test_doctor_names_device_backend_and_reasons(run, json_of):
    result, _ = json_of("doctor")
    assert result["backends"]["cpu"]["reference"] is None
    assert result["gpu_why_not"] and result["packages"]["torch"] == torch.__version__
    assert "backend  on cpu: " in run("doctor")[1]


def test_the_demo_runs_to_its_end(json_of):
    result, err = json_of("demo")
    rows = result["rows"]
    assert [row["format"] for row in rows] == ["float16", "int8 g128", "int4 g128"]
    line = r"(?m)^(?:float16|int[48] g128) +\S+ +\S+ +\S+ +(\S+) +(\S+) +\S+ +\S+%"
    shown = re.findall(line, (ROOT / "README.md").read_text())
    # Other versions of torch round a little differently.
    figures = [pytest.approx((row["perplexity"], row["kl"]), rel=0.02, abs=2e-6) for row in rows]
    assert [tuple(map(float, row)) for row in shown] == figures
    assert rows[1]["kl"] < rows[2]["kl"] and result["tokens"] > 10 and result["backend"] and "100%" in err


DEMO_X = ["generate", DEMO, "--prompt", "x"]
CONFIG = DEMO / "config.json"


@pytest.mark.parametrize(("words", "message"), [
    (["generate", "no/such/folder", "--prompt", "x"], "no such folder"),
    (["generate", "no/such/folder", "--prompt", "x", "--temperature", -1], "temperature is -1"),
    (["generate", DEMO, "--prompt", "\udcff", "--max-new-tokens", 1], "surrogate"),
    ([*DEMO_X, "--max-new-tokens", 100_000], "do not fit the context of 512"),
    ([*DEMO_X, "--context", 513], "context is 513, but the model's own context is 512"),
    ([*DEMO_X, "--top-p", 1.5], "top_p is 1.5"),
    ([*DEMO_X, "--device", "cuda"], "no CUDA device"),
    ([*DEMO_X, "--device", "tpu"], "--device is 'tpu', expected 'auto', 'cpu', 'cuda'"),
    ([*DEMO_X, "--device", ""], "expected 'auto', 'cpu', 'cuda'"),
    ([*DEMO_X, "--gpu-memory", "8GiB"], "--gpu-memory: torch sees no GPU here"),
    ([*DEMO_X, "--device", "cpu", "--gpu-memory", "8GiB"], "--gpu-memory and --device cpu"),
    ([*DEMO_X, "--cpu-memory", ""], "--cpu-memory is '', expected a size such as 8GiB"),
    ([*DEMO_X, "--draft", ""], "--draft: '': no such folder"),
    ([*DEMO_X, "--head", "int8"], "the model has no int8 head"),
    (["demo", "--gpu-memory", ""], "--gpu-memory is '', expected a size such as 8GiB"),
    (["quantize", "no/such/folder", "/tmp/x"], "no such folder"),
    (["quantize", DEMO, CONFIG], "is a file"),
    (["verify", "/no/such/folder"], "no such folder"),
    (["verify", CONFIG], "is a file"),
    (["perplexity", DEMO, "--text", "/no/such/file"], "cannot be read"),
    (["perplexity", DEMO, "--text", DEMO / "model.safetensors"], "not UTF-8"),
    (["perplexity", DEMO, "--text", CONFIG, "--context", 9999], "context is 9999, but the model's own"),
    (["perplexity", DEMO, "--text", CONFIG, "--cpu-memory", "x"], "--cpu-memory is 'x', expected"),
    (["info", CONFIG], "is a file"),
    (["info", "/no/such/folder"], "no such folder"),
    (["info", DEMO, "--revision", "v2"], "revision 'v2' means nothing"),
])  # fmt: skip
def test_failures_are_one_line_and_exit_1(run, words, message):
    code, out, err = run(*words)
    lines = [line for line in err.splitlines() if "error" in line]
    assert (code, out, len(lines)) == (1, "", 1)
    assert lines[0].startswith("neox-lite: error: ") and message in lines[0]


@pytest.mark.parametrize("line", [
    "", "dance", "generate", "generate a --prompt x --kv int4", "generate a --prompt x --lookup --draft b",
    "generate a --prompt x --threads 99999999999", "demo --dance", "demo --head int8", "verify a b", "quantize a b c",
    "quantize a b --format int3", "plan --format int3", "plan --kv int4", "plan a b", "plan --context 0",
    "bench", "bench a --shape 20b", "bench --shape 20b a", "bench a --format int3", "bench a --batch 0", "bench a --decode 0",
    "bench a --batch 1,99999999999999999999", "bench a --prefill 128;512", "eval --tasks ends",
])  # fmt: skip
def test_wrong_usage_is_one_line_and_exits_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_an_early_failure_is_named_before_anything_is_read_and_shows_no_empty_progress_bar(run, heldout):
    assert len(run("quantize", DEMO, DEMO)[2].splitlines()) == 1
    code, _, err = run("compare", DEMO, "/no/such/folder", "--text", heldout)
    assert code == 1 and len(err.splitlines()) == 1 and "no such folder" in err


def test_output_is_escaped_where_its_encoding_lacks_a_character(tmp_path):
    folder = tmp_path / "日本é"
    shutil.copytree(DEMO, folder)
    for words in ((), ("--json",)):
        process = start("info", folder, *words, env=environment(PYTHONIOENCODING="ascii:strict"))
        out, _ = process.communicate()
        assert process.returncode == 0 and "\\u65e5" in out
    assert json.loads(out)["model"] == str(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = start("doctor", stdout=full)
        _, err = process.communicate()
    assert process.returncode == 1 and err == "neox-lite: error: output: No space left on device\n"


GENERATE = ["generate", DEMO, "--max-new-tokens", 1, "--prompt"]


@pytest.mark.parametrize(
    ("words", "closed", "code", "out", "err"),
    [
        ([*GENERATE, "x"], ">&-", 0, "", "1 new ones"),
        ([*GENERATE, "-"], "<&-", 1, "", "stdin is closed"),
        (["verify", DEMO], ">&-", 0, "", ""),
        (["verify", DEMO], "2>&-", 0, "as it should be\n", ""),
        (["verify", "/no/such/folder"], "2>&-", 1, "", ""),
    ],
)
def test_closed_streams_change_nothing_but_what_is_seen(words, closed, code, out, err):
    line = f"{shlex.join(command(*words))} {closed}"
    found = subprocess.run(line, shell=True, env=environment(), check=False, **PIPES)
    assert found.returncode == code and found.stdout.endswith(out) and bool(found.stdout) == bool(out)
    assert err in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(("device", "name"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_a_gpu_s_memory_limit_is_that_of_the_gpu_that_is_used(monkeypatch, device, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["generate", "m", "--prompt", "x", "--device", device, "--gpu-memory", "2KiB", "--cpu-memory", "3KiB"]
    assert load_for_command.placing(build_parser().parse_args(words))["max_memory"] == {name: 2048, "cpu": 3072}


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_nothing_of_a_gpu_can_be_had_anywhere(run, device):
    words = ("generate", DEMO, "--prompt", "x", "--max-new-tokens", 1, "--device", device, "--gpu-memory", 0)
    assert run(*words)[0] == 0


def test_ctrl_c_while_arguments_are_read_is_an_interrupt_too(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("neox_lite_app.cli.build_parser", interrupted)
    assert main(["doctor"]) == 130 and capsys.readouterr().err.endswith("interrupted\n")


def test_help_and_usage_errors_need_no_torch():
    code = "import sys; from neox_lite_app.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_ctrl_c_ends_an_answer_and_exits_130(demo_int4):
    process = start("generate", demo_int4, "--prompt", "O, ", "--temperature", 1.0)
    assert process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and err.endswith("interrupted\n")


def test_ctrl_c_while_torch_is_imported_ends_the_process_at_once():
    code = "import os, signal; from neox_lite_app import cli\nwith cli._plain_interrupt(): os.kill(os.getpid(), signal.SIGINT)"
    done = run_python(code)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_options_without_effect_in_greedy_decoding_are_named(run, demo_int4):
    code, _, err = run("generate", demo_int4, "--prompt", "O, ", "--max-new-tokens", 2, "--top-k", 5, "--seed", 1)
    assert code == 0 and "--top-k, --seed without effect in greedy decoding; add --temperature" in err


def test_a_reader_that_leaves_causes_no_traceback(demo_int4):
    process = start("generate", demo_int4, "--prompt", "O, ", "--max-new-tokens", 200)
    process.stdout.read(3)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=20)
    assert "Traceback" not in err and "Exception" not in err
