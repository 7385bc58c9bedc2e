"""neox-lite eval: answers equal those of the harness's own `hf` model; what texts share is computed once; a run goes on."""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.commands import run_python

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError, UnsupportedError
from neox_lite_app.conversations.prompt_forms import FORMS
from neox_lite_app.evaluation import quality, scoring, tasks
from neox_lite_app.evaluation.answer_cache import AnswerCache
from neox_lite_app.evaluation.harness import NeoxLiteLM
from neox_lite_app.evaluation.scoring import Text, score
from neox_lite_app.paths import DEMO

HELDOUT = (DEMO / "heldout.txt").read_text(encoding="utf-8")
LINES = [line.strip() for line in HELDOUT.splitlines() if len(line.split()) > 6]


@pytest.fixture(autouse=True)
def own_answers(on_the_cpu, monkeypatch, own_caches):
    monkeypatch.setenv("NEOX_LITE_CACHE", str(own_caches))


@pytest.fixture(scope="module", params=["dense", "int4"])
def both(request, demo_int4):
    """(this package's, the harness's own) on the same folder, computing in float32."""
    folder = DEMO if request.param == "dense" else demo_int4
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32, exact=True)
    return NeoxLiteLM(model), HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)


@pytest.fixture
def int4(demo_int4, tmp_path):
    """Answers of a folder belong to this copy of it."""
    return shutil.copytree(demo_int4, tmp_path / "demo-int4")


@pytest.fixture(scope="module")
def dense():
    return GPTNeoXForCausalLM.from_pretrained(DEMO, dtype=torch.float32, exact=True)


def documents():
    """Of every task: questions with four endings or letters, last words of lines, pages."""
    draw, ends, letters = random.Random(0), [], []
    for i in range(12):
        words, gold = LINES[i].split(), draw.randrange(4)
        choices = [" ".join(LINES[j].split()[3:7]) for j in (i, i + 30, i + 60, i + 90)]
        choices[0], choices[gold] = choices[gold], choices[0]
        ends.append({"start": " ".join(words[:3]), "ends": choices, "gold": gold})
        letters.append({"start": " ".join(words), "gold": draw.randrange(4)})
    words = [{"start": line.rpartition(" ")[0], "word": line.rpartition(" ")[2]} for line in LINES[20:32]]
    pages = [{"text": HELDOUT[i * 2500 : (i + 1) * 2500]} for i in range(2)]
    return {"ends": ends, "letters": letters, "words": words, "pages": pages, "lines": words}


TASKS = {  # output type, doc_to_text, doc_to_target, metrics, and more of the task's file
    "ends": ("multiple_choice", "Begin: {{start}}\nEnd:", "{{gold}}", "acc acc_norm", {"doc_to_choice": "{{ends}}"}),
    "letters": ("multiple_choice", "{{start}}\nAnswer:", "{{gold}}", "acc", {"doc_to_choice": list("ABCD")}),
    "words": ("loglikelihood", "{{start}}", " {{word}}", "perplexity acc", {}),
    "pages": ("loglikelihood_rolling", "", "{{text}}", "word_perplexity byte_perplexity bits_per_byte", {"num_fewshot": 0}),
    "lines": ("generate_until", "{{start}}", "{{word}}", "exact_match",
              {"generation_kwargs": {"until": ["\n", ":"], "max_gen_toks": 12}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files as people write them, with their documents beside them."""
    out, found = tmp_path_factory.mktemp("tasks"), documents()
    for name, (kind, text, target, metrics, more) in TASKS.items():
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in found[name]), encoding="utf-8")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        task = {"task": name, "output_type": kind, "doc_to_text": text, "doc_to_target": target, **data, **more}
        task["metric_list"] = [{"metric": metric} for metric in metrics.split()]
        (out / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return out


@pytest.fixture
def counted(monkeypatch):
    """Tokens through the layers, and rows through the head, since the last look."""
    found = {"tokens": 0, "rows": [], "passes": 0}
    append, logits = quality.append, quality.Head.logits

    def counting(model, pool, block_tables, counts, ids, each=None):
        found["tokens"] += len(ids)
        found["passes"] += 1
        assert len(ids) == sum(counts) <= scoring.PASS_TOKENS
        return append(model, pool, block_tables, counts, ids, each)

    def counting_rows(head, x, rows=None):
        found["rows"].append(len(rows))
        return logits(head, x, rows)

    monkeypatch.setattr(scoring, "append", counting)
    monkeypatch.setattr(quality.Head, "logits", counting_rows)
    return found


def requests(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


LONG = HELDOUT[:6000]  # more than twice the context of 512 tokens
PAIRS = [
    ("KING RICHARD III:\n", "I am not in the giving vein to-day."),
    ("KING RICHARD III:\n", "I am not in the giving vein."),
    ("KING RICHARD III:\n", "I"),
    ("KING RICHARD III:\n", "A"),
    ("The context ends with a space ", "and goes on"),
    ("", "No context at all"),
    ("", "<|endoftext|>and its own beginning"),
    ("<|endoftext|>Once", " more"),
    (LONG, " and so on, to the end"),  # cut on the left
    ("He said:", LONG[:1200]),  # a continuation longer than its context
    ("x" * 40, " Grüße, 世界 \U0001f600 — naïve"),
    ("Übermäßig \U0001f469‍\U0001f680", "日本語のテキスト"),
]


def test_log_likelihoods_equal_those_of_hf(both):
    found, expected = (lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True) for lm in both)
    for pair, (value, greedy), (truth, is_greedy) in zip(PAIRS, found, expected, strict=True):
        assert value == pytest.approx(truth, abs=1e-4, rel=1e-6), pair  # float32 sums of hundreds keep six digits
        assert greedy == is_greedy, pair


def test_what_a_model_says_itself_is_greedy_for_both(both):
    (text,) = both[1].generate_until(
        requests("generate_until", ("KING RICHARD III:\n", {"until": [], "max_gen_toks": 8})), disable_tqdm=True
    )
    for lm in both:
        ((_, greedy),) = lm.loglikelihood(requests("loglikelihood", ("KING RICHARD III:\n", text)), disable_tqdm=True)
        assert greedy


def test_rolling_log_likelihoods_equal_those_of_hf(both):
    texts = [(LONG,), ("Short.",), ("",), ("Grüße, 世界 \U0001f600",), (HELDOUT[6000:8000],)]
    found, expected = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in both)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_generated_texts_equal_those_of_hf(both):
    prompts = ["KING RICHARD III:\n", "To be, or not", LONG, "KING RICHARD III:\nI am", "日本"]
    endings = [{"until": ["\n"], "max_gen_toks": 24}, {"until": [" the", ":"], "do_sample": False}, {"max_gen_toks": 3}]
    asked = [(prompt, ending) for prompt in prompts for ending in endings if prompt != LONG or ending is endings[0]]
    found, expected = (lm.generate_until(requests("generate_until", *asked), disable_tqdm=True) for lm in both)
    assert found == expected
    assert any(text == "" for text in found) or len(set(found)) > 5


def test_tasks_give_the_figures_of_hf_five_shot(both, folder):
    manager, names = TaskManager(include_path=str(folder), include_defaults=False), list(TASKS)
    found, expected = (
        evaluator.simple_evaluate(lm, tasks=names, num_fewshot=5, limit=3, task_manager=manager, bootstrap_iters=0)
        for lm in both
    )
    for name in names:
        assert found["n-shot"][name] == (0 if name == "pages" else 5)
        for a, b in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert a["prompt_hash"] == b["prompt_hash"]
            if name == "lines":
                assert a["filtered_resps"] == b["filtered_resps"]
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)


@pytest.mark.parametrize(("kind", "asked", "error", "message"), [
    ("loglikelihood", ("So", LONG), ArgumentError, r"a continuation has \d+ tokens, more than the 512"),
    ("generate_until", ("So", {"max_gen_toks": 512}), ArgumentError, "max_gen_toks is 512"),
    ("generate_until", ("So", {"num_beams": 4}), UnsupportedError, "num_beams"),
], ids=["too long", "no room", "beams"])  # fmt: skip
def test_what_cannot_be_scored_is_refused_by_name(dense, kind, asked, error, message):
    with pytest.raises(error, match=message):
        getattr(NeoxLiteLM(dense), kind)(requests(kind, asked))


def test_sampled_texts_differ_among_repeats_and_not_among_runs(dense):
    asked = requests("generate_until", *[("KING", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 3)
    first, again = (NeoxLiteLM(dense).generate_until(asked) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3


def ids(count, seed):
    draw = random.Random(seed)
    return [draw.randrange(2, 1500) for _ in range(count)]


def answered(question, *answers):
    return [Text(question + answer, len(answer)) for answer in answers]


SHARED = {  # texts, tokens that are computed, passes and rows through the head, None where those are any
    "a question, for all its answers": (
        answered(ids(300, 0), *(ids(n, n) for n in (5, 7, 9, 2))),
        *(300 + 4 + 6 + 8 + 1, None, 1 + 4 + 6 + 8 + 1),  # the question's last row says all first tokens
    ),
    "answers of one token, by no pass of their own": (answered(ids(200, 0), [5], [6], [7], [8]), 200, 1, 1),
    "examples that questions share": (
        [t for i in range(1, 6) for t in answered(ids(250, 0) + ids(20, i), ids(4, 100), ids(4, 200))],
        *(250 + 5 * (20 + 3 + 3), None, None),
    ),
    "a text alone, by one pass with the head on what is scored": ([Text(ids(400, 0), 3)], 399, 1, 3),
    "a common first word, again rather than before all that follows": (
        [Text([7, *ids(20, i)], 2) for i in range(4)],
        *(4 * 20, 1, None),
    ),
}


@pytest.mark.parametrize("what", SHARED)
def test_what_texts_share_is_computed_once(dense, counted, what):
    texts, tokens, passes, rows = SHARED[what]
    scores, computed = score(dense, texts)
    assert computed == counted["tokens"] == tokens
    assert passes in (None, counted["passes"]) and rows in (None, sum(counted["rows"]))
    for text, found in zip(texts, scores, strict=True):
        answer = torch.tensor(text.ids[-text.scored :])
        logits = dense(torch.tensor([text.ids[:-1]])).logits[0, -len(answer) :].log_softmax(-1)
        assert found.log_likelihood == pytest.approx(float(logits.gather(1, answer[:, None]).sum()), abs=1e-4)


def test_logits_are_held_in_bounded_memory(dense, counted, monkeypatch):
    monkeypatch.setattr(scoring, "HEAD_LOGITS", 100 * dense.config.vocab_size)
    text = [Text(ids(500, 0), 450)]
    few, _ = score(dense, text)
    assert max(counted["rows"]) == 100 and sum(counted["rows"]) == 450
    monkeypatch.undo()
    assert few[0].log_likelihood == pytest.approx(score(dense, text)[0][0].log_likelihood, rel=1e-6)


@pytest.mark.parametrize("pages", [4, 5, 9])
def test_a_pool_of_few_pages_gives_the_same_scores(dense, pages, monkeypatch):
    """Four pages are one context: what does not fit beside a text is computed again."""
    examples = ids(200, 0)
    texts = [Text(examples + ids(n, n), 5) for n in (30, 300, 70, 311, 8)]
    texts += [Text(texts[1].ids[:-5] + ids(5, seed), 5) for seed in (77, 78, 79)]
    expected, least = score(dense, texts)
    monkeypatch.setattr(dense, "cache_pages", pages)
    found, computed = score(dense, texts)
    assert computed >= least
    expected = [one.log_likelihood for one in expected]
    assert [one.log_likelihood for one in found] == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_eval_prints_a_table_or_one_object(run, folder):
    words = ("eval", DEMO, "--tasks", "ends,words", "--include-path", folder, "--num-fewshot", 2, "--limit", 6)
    code, out, err = run(*words)
    lines = ["task n-shot metric", "ends 2 acc", "ends 2 acc_norm", "words 2 perplexity", "words 2 acc"]
    assert code == 0 and [line.split()[:3] for line in out.splitlines()] == [line.split() for line in lines]
    code, out, err = run(*words, "--json")
    result = json.loads(out)
    assert "30 of 30 answers are known" in err
    assert (result["requests"], result["known_before"], result["computed_tokens"]) == (30, 30, 0)
    assert {row["task"]: row["documents"] for row in result["results"]} == {"ends": 6, "words": 6}
    assert {"model", "format", "head", "kv", "seconds", "settings", "versions", "task_hashes"} <= result.keys()


def test_results_and_answers_of_every_document_are_written(run, folder, tmp_path):
    out = tmp_path / "result.json"
    code, *_ = run("eval", DEMO, "--tasks", "lines", "--include-path", folder, "--limit", 3, "--output", out)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert code == 0 and result["results"][0]["metric"] == "exact_match"
    assert [sample["doc_id"] for sample in result["samples"]["lines"]] == [0, 1, 2]
    assert all(isinstance(sample["filtered_resps"][0], str) for sample in result["samples"]["lines"])


def test_mistakes_are_one_line(run, folder, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub.yaml").write_text('{"task": "hub_task", "dataset_path": "nobody/nothing", "test_split": "test"}')
    unsafe = json.loads((folder / "words.yaml").read_text()) | {"task": "code", "unsafe_code": True}
    (tmp_path / "code.yaml").write_text(json.dumps(unsafe))
    ends, own = ("--tasks", "ends", "--include-path", folder), ("--include-path", tmp_path, "--tasks")

    def error(*words):
        code, out, err = run("eval", DEMO, *words)
        assert (code, out) == (1, "")
        return err.splitlines()[-1]

    for words, message in (
        (("--tasks", "ends", "--include-path", tmp_path / "nowhere"), "no such folder"),
        ((*ends, "--output", tmp_path / "nowhere" / "x.json"), "no such folder"),
        (
            (*ends, "--num-fewshot", 999),
            r"task ends: has (\d+) examples beside each document, not 999: --num-fewshot \1$",
        ),
        ((*own, "hub_task"), "task hub_task: its documents cannot be fetched, because the hub cannot be reached"),
        ((*own, "code"), "task code: runs programs that the model writes"),
    ):
        assert re.search(message, error(*words)), message
    monkeypatch.setattr(tasks, "_manager", lambda args: TaskManager(include_path=str(folder), include_defaults=False))
    assert "no task is called 'end'; nearest is 'ends'" in error("--tasks", "end")
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "pip install 'neox-lite[eval]'" in error("--tasks", "ends")


def test_the_list_needs_no_model(run, folder, monkeypatch):
    monkeypatch.setattr(tasks, "_manager", lambda args: TaskManager(include_path=str(folder), include_defaults=False))
    assert run("eval", "--tasks", "list")[1].split() == ["ends", "letters", "lines", "pages", "words"]


def test_chats_are_written_in_the_models_form(run, folder, tmp_path):
    code, _, err = run(
        "eval", DEMO, "--tasks", "words", "--include-path", folder, "--limit", 2, "--num-fewshot", 1,
        "--apply-chat-template", "--output", tmp_path / "chat.json",
    )  # fmt: skip
    assert code == 0 and "'dialogue'" in err
    sample = json.loads((tmp_path / "chat.json").read_text())["samples"]["words"][0]
    context = sample["arguments"][0][0]
    assert context.count(FORMS["dialogue"].user.before) == 2
    assert context.endswith(FORMS["dialogue"].answer.before)


def test_compare_tells_differences_with_their_errors(run, folder, int4, tmp_path):
    words = ("--tasks", "ends,words,pages", "--include-path", folder, "--num-fewshot", 1)
    code, out, _ = run("eval", int4, "--compare", DEMO, *words, "--json")
    result = json.loads(out)
    rows = {(row["task"], row["metric"]): row for row in result["results"]}
    assert code == 0 and result["format"].startswith("int4") and result["source"]["format"] == "float16"
    samples = {}
    for name, path in (("source", DEMO), ("value", int4)):
        assert run("eval", path, *words, "--output", tmp_path / "alone.json")[0] == 0
        alone = json.loads((tmp_path / "alone.json").read_text())
        samples[name] = alone["samples"]["ends"]
        for row in alone["results"]:
            assert rows[row["task"], row["metric"]][name] == row["value"]
    row, pairs = rows["ends", "acc"], list(zip(samples["source"], samples["value"], strict=True))
    differences = [after["acc"] - before["acc"] for before, after in pairs]
    assert row["difference"] == pytest.approx(statistics.mean(differences))
    assert row["difference_stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(12))
    chosen = [[max(range(4), key=lambda i: s["filtered_resps"][i][0]) for s in pair] for pair in pairs]
    assert row["equal_answers"] == sum(before == after for before, after in chosen) / 12
    assert rows["words", "perplexity"]["difference_stderr"] > 0  # no mean: from draws of documents for both
    assert rows["pages", "word_perplexity"]["equal_answers"] is None


def test_a_model_may_be_compared_with_itself_in_another_setting(run, folder):
    words = ("--tasks", "words", "--include-path", folder, "--limit", 3, "--kv", "int8", "--json")
    result = json.loads(run("eval", DEMO, "--compare", DEMO, *words)[1])
    assert (result["source"]["kv"], result["kv"]) == ("fp16", "int8")
    assert {row["metric"]: row["difference"] != 0 for row in result["results"]}["perplexity"]


def test_the_error_of_a_difference_between_equals_is_zero():
    task = SimpleNamespace(aggregation=lambda: {"perplexity": lambda values: math.exp(-sum(values) / len(values))})
    samples, moved = (
        [{"doc_id": i, "filter": "none", "perplexity": -i - less} for i in range(5)] for less in (0.0, 0.1)
    )
    assert tasks.difference_error(task, "perplexity", samples, samples) == 0
    assert tasks.difference_error(task, "perplexity", samples, moved) > 0


KILLED = """
import os, signal, sys
from neox_lite_app.evaluation import scoring
from neox_lite_app.cli import main
from neox_lite_app.evaluation.answer_cache import AnswerCache

put, calls = AnswerCache.put, 0

def put_and_die(self, answers):
    global calls
    calls += 1
    if calls == 3:  # with the third block computed, and not yet written
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, answers)

AnswerCache.put, scoring.BLOCK_TOKENS = put_and_die, 256
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_the_same(run, folder, int4, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "BLOCK_TOKENS", 256)
    words = ["eval", str(int4), "--tasks", "ends", "--include-path", str(folder), "--num-fewshot", "2", "--json"]
    words += ["--threads", "1"]
    killed = run_python(KILLED, *words)
    assert killed.returncode == -signal.SIGKILL
    resumed = json.loads(run(*words, "--output", tmp_path / "resumed.json")[1])
    fresh = json.loads(run(*words, "--fresh", "--output", tmp_path / "fresh.json")[1])
    assert 0 < resumed["known_before"] < resumed["requests"] == 48
    assert (fresh["known_before"], fresh["requests"]) == (0, 48)
    assert 0 < resumed["computed_tokens"] < fresh["computed_tokens"]
    assert resumed["results"] == fresh["results"]
    answers = [json.loads((tmp_path / f"{name}.json").read_text())["samples"] for name in ("resumed", "fresh")]
    assert answers[0] == answers[1]  # to the last bit


def test_answers_of_another_model_or_setting_are_never_used(run, folder, int4):
    words = ("eval", int4, "--tasks", "words", "--include-path", folder, "--limit", 2, "--json")
    known = lambda *more: json.loads(run(*words, *more)[1])["known_before"]  # noqa: E731
    assert [known(), known(), known("--exact"), known("--kv", "int8"), known("--head", "int8")] == [0, 2, 0, 0, 0]
    weights = int4 / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    assert known() == 0


def test_a_file_of_answers_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NEOX_LITE_CACHE", str(tmp_path))
    answers = AnswerCache("me")
    answers.put({"a": [1.5, True]})
    assert AnswerCache("me").get(["a", "b"]) == {"a": [1.5, True]}
    assert AnswerCache("you").get(["a"]) == {}
    answers.close()
    answers.path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ArgumentError, match="--fresh starts over"):
        AnswerCache("me")
    assert AnswerCache("me", fresh=True).get(["a"]) == {}
