"""benchmarks/published.py from end to end on the bundled model: LAMBADA scores against a plain twin, and its JSON."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "app" / "neox_lite_app" / "demo_model"
SCRIPT = ROOT / "benchmarks" / "published.py"


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import published

    return published


@pytest.fixture
def lambada(tmp_path):
    """Lines of the held-out text, each long enough to have words before the last."""
    lines = (DEMO / "heldout.txt").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(lines[i : i + 4]) for i in range(0, 160, 8)]
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if " " in text.strip()))
    return path


def test_last_words_are_scored_as_one_by_one(published, lambada):
    model = GPTNeoXForCausalLM.from_pretrained(DEMO)
    items = published.lambada_items(lambada)
    items[0] = ("Now is the winter of our discontent\nMade glorious summer.\n\nKING RICHARD", " III")  # which it knows
    found = published.score_lambada(model, items)
    losses, hits = [], 0
    for before, word in items:
        context = model.tokenizer(before).input_ids
        whole = model.tokenizer(before + word).input_ids
        loss, hit = 0.0, True
        for at in range(len(context), len(whole)):
            logits = model(torch.tensor([whole[:at]])).logits[0, -1]
            loss -= float(logits.log_softmax(-1)[whole[at]])
            hit = hit and int(logits.argmax()) == whole[at]
        losses.append(loss)
        hits += hit
    assert found["lambada_accuracy"] == hits / len(items) and 0 < hits < len(items)
    assert found["lambada_perplexity"] == pytest.approx(
        math.exp(sum(losses) / len(losses)), rel=0.02
    )  # 8-bit activations


def test_the_whole_runs_on_local_files(lambada, tmp_path):
    words = ["--home", tmp_path, "--models", DEMO, "--formats", "plain,int4", "--text", DEMO / "heldout.txt"]
    words += ["--lambada", lambada, "--items", 5, "--out", tmp_path / "published.json"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "published.json").read_text())
    assert (
        told["run"] is True
        and told["published"] == {}
        and [row["format"] for row in told["measured"]] == ["plain", "int4"]
    )
    for row in told["measured"]:
        assert row["lambada_items"] == 5 and row["context"] == 512
        assert 0 <= row["lambada_accuracy"] <= 1 and row["wikitext2_perplexity"] > 1


def test_without_a_home_it_says_that_it_was_not_run():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["run"] is False and told["measured"] == []
    assert told["published"]["EleutherAI/gpt-neox-20b"]["lambada_accuracy"] == 0.72
    committed = json.loads((ROOT / "benchmarks" / "results" / "published.json").read_text())
    assert committed["run"] is bool(committed["measured"]) and committed["published"] == told["published"]


@pytest.mark.parametrize("content", ["", "{}\n", '{"text": "word"}\n', "[1]\n", "no JSON\n"])
def test_texts_without_a_last_word_are_refused(published, tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ArgumentError):
        published.lambada_items(tmp_path / "bad.jsonl")
