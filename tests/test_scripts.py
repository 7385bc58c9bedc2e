"""Scripts as people have them, from transformers' GPT-NeoX page and from the cards of the family: with another import line
they print what they print under transformers, or say in one line what to do.

The scripts are tests/scripts/*.py. A local hub serves small checkpoints of each one's shape under its real id. For each script:
what it prints and what it warns of. "as transformers": that, with the import line as it was.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fake_hub import FakeHub
from support.repositories import REPOSITORIES, repository

ROOT = Path(__file__).resolve().parents[1]
LEAVE_OUT = "UnsupportedError: from_pretrained(trust_remote_code=...): code from checkpoints is never run; leave it out"
WITHOUT_CUDA = "ArgumentError: cuda(): torch sees no CUDA device here; leave .cuda() out to run on the CPU"
AS_TRANSFORMERS = (
    *("documentation_cpu", "small_configuration", "pipeline", "transformers_pipeline", "sequence_classification"),
    *("token_classification", "question_answering", "pythia", "dolly_instruct", "redpajama", "transition_scores"),
    *("stablelm", "oasst", "polyglot", "open_calm", "line", "h2ogpt", "streamers", "generation_config"),
)
PRINTED = {  # where transformers has no like, or needs what is not there
    "flash_attention": "torch.float16 gpt_neox torch.Size([1, 13])\n",
    "neoxt_chat": "10 int8\n",
    "four_bits": "True torch.Size([1, 9])\n",
}
EXPLAINED = {
    "configuration": "ArgumentError: GPTNeoXModel(config): 20554567680 weights of 4 bytes take 82.2 GB, 17.2 GB of memory are "
    "free; give a smaller config, or load a checkpoint with from_pretrained(..., quantization='int4')",
    "dolly": LEAVE_OUT,
    "rinna": "TokenizerError: rinna/japanese-gpt-neox-3.6b: no tokenizer.json (found spiece.model, but sentencepiece "
    "tokenizers are not supported); pass ids to the model, or convert once with transformers: "
    "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
    "padding_token": "AttributeError: GPTNeoXTokenizerFast has no add_special_tokens: no model has embeddings for new tokens; "
    "set one that exists: tokenizer.pad_token = tokenizer.eos_token",
    "beams": "UnsupportedError: num_beams: beam search is not supported; use do_sample=True or greedy decoding",
}
WARNED = {
    "token_classification": ["truncation does nothing without max_length, as model_max_length is not set"],
    "flash_attention": ["attn_implementation is without effect: the kernels are chosen for the device"],
    "neoxt_chat": ["load_in_8bit means quantization='int8' here (int groups of 128)"],
    "h2ogpt": ["offload_folder is without effect: weights are mapped from their own files"],
}
NAMES = [*AS_TRANSFORMERS, *PRINTED, *EXPLAINED, "documentation", "another_architecture"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with FakeHub() as server:
        make = lambda repo_id, seed: repository(repo_id, tmp_path_factory.mktemp("source") / "files", seed)  # noqa: E731
        for number, repo_id in enumerate(REPOSITORIES):
            server.add(repo_id, make(repo_id, number))
            if "pythia" in repo_id:
                server.add(repo_id, make(repo_id, 99), "step3000")
        yield server


@pytest.fixture(scope="module")
def results(hub, tmp_path_factory):
    """What came of each script, all run in one other process: huggingface_hub reads its environment once."""
    place = tmp_path_factory.mktemp("place")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "script_runner.py")]
    wanted = NAMES + [f"transformers:{name}" for name in AS_TRANSFORMERS]
    done = subprocess.run(command + wanted, env=env, cwd=place, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    found["place"] = place
    return found


def test_every_script_is_run():
    assert set(NAMES) == {path.stem for path in (ROOT / "tests" / "scripts").glob("*.py")}


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_a_script_prints_what_it_prints_under_transformers(name, results):
    ours, theirs = results[name], results[f"transformers:{name}"]
    assert (ours["error"], theirs["error"]) == (None, None)
    assert ours["out"] == theirs["out"] != ""


@pytest.mark.parametrize("name", [*PRINTED, *EXPLAINED])
def test_a_script_that_means_something_else_here_prints_or_says_why_it_cannot_in_one_line(name, results):
    found, printed = results[name], PRINTED.get(name)
    assert found["error"] == EXPLAINED.get(name) and (printed is None or found["out"] == printed)


@pytest.mark.parametrize("name", [*AS_TRANSFORMERS, *PRINTED])
def test_a_script_is_warned_of_what_has_no_effect(name, results):
    assert results[name]["warnings"] == WARNED.get(name, [])


def test_the_pages_example_runs_on_a_gpu_and_says_so_where_there_is_none(results):
    found = results["documentation"]
    if torch.cuda.is_available():
        assert found["error"] is None
        assert found["out"].startswith("GPTNeoX20B is a 20B-parameter autoregressive Transformer model")
    else:
        assert found["error"] == WITHOUT_CUDA


def test_another_architecture_is_refused_by_its_name(results):
    message = "model_type is 'llama', expected 'gpt_neox', the one architecture this runs"
    assert results["another_architecture"]["error"].endswith(message)


def test_cache_dir_is_where_the_files_went(results):
    kept = results["place"] / "pythia-70m-deduped" / "step3000" / "models--EleutherAI--pythia-70m-deduped"
    assert {path.name for path in kept.glob("snapshots/*/*")} >= {"config.json", "model.safetensors", "tokenizer.json"}
