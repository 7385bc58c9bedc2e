"""The Auto names and `pipeline`: the same answers as transformers' around its own classes, and what is refused by name."""

import sys

import pytest
import torch
import transformers
from support.repositories import repository

import neox_lite
from neox_lite import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    pipeline,
)
from neox_lite.errors import ArgumentError, ConfigError, TokenizerError, UnsupportedError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, a classifier, an answerer and one whose config names a llama."""
    named = {
        "speaks": "EleutherAI/gpt-neox-20b",
        "classifies": "someone/neox-classifier",
        "answers": "someone/neox-answers",
        "llama": "someone/llama-model",
    }
    found = {name: tmp_path_factory.mktemp("model") / name for name in named}
    for name, repo_id in named.items():
        for file, data in repository(repo_id, found[name], 3).items():
            (found[name] / file).write_bytes(data)
    return found


@pytest.mark.parametrize("name", [n for n in neox_lite.__all__ if n.startswith("Auto")])
def test_every_auto_name_refuses_another_architecture(name, folders):
    with pytest.raises(ConfigError, match="model_type is 'llama', expected 'gpt_neox', the one architecture this runs"):
        getattr(neox_lite, name).from_pretrained(folders["llama"])


def test_an_auto_tokenizer_is_that_of_its_folder(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders["speaks"], padding_side="left", use_fast=False)
    assert (type(tokenizer), tokenizer.padding_side) == (neox_lite.GPTNeoXTokenizerFast, "left")
    (tmp_path / "tokenizer.json").write_bytes((folders["speaks"] / "tokenizer.json").read_bytes())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)  # a tokenizer alone is nobody's
    with pytest.raises(TokenizerError, match="trust_remote_code=True: code from a repository is never run; leave it"):
        AutoTokenizer.from_pretrained(folders["speaks"], trust_remote_code=True)


def test_classification_pipelines_answer_as_transformers_do(folders):
    answers = []
    for library in (neox_lite, transformers):
        model = library.AutoModelForSequenceClassification.from_pretrained(folders["classifies"])
        tokenizer = library.AutoTokenizer.from_pretrained(folders["classifies"])
        answers.append(
            library.pipeline("text-classification", model=model, tokenizer=tokenizer)("a good dog", top_k=None)
        )
    ours, theirs = ({one["label"]: one["score"] for one in answer} for answer in answers)
    assert list(ours) == list(theirs) and ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("classifies", {"model_kwargs": {"dtype": "bfloat16"}},
         ("text-classification", GPTNeoXForSequenceClassification, torch.bfloat16)),
        ("speaks", {"torch_dtype": torch.float32, "device_map": "auto"},
         ("text-generation", GPTNeoXForCausalLM, torch.float32)),
    ],
    ids=["classifies", "speaks"],
)  # fmt: skip
def test_a_pipeline_finds_its_task_and_passes_on_how_to_load(name, options, expected, folders):
    for model in (folders[name], str(folders[name])):
        found = pipeline(model=model, **options)
        assert (found.task, type(found.model), found.model.dtype) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "conversational"}, ArgumentError, "task is 'conversational', expected one of text-generation, text"),
        ({"model": "answers"}, ArgumentError, "transformers has none for GPTNeoXForQuestionAnswering; call the"),
        ({"model": torch.nn.Linear(1, 1)}, ArgumentError, "is a Linear, expected a model of neox_lite, a folder or"),
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code=...*code from checkpoints is never run"),
        ({"model_kwargs": {"bits": 4}}, ArgumentError, "from_pretrained knows no option 'bits'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_pipeline_can_do_is_refused(options, error, message, folders):
    given = {"model": folders["speaks"], **options}
    if options.get("model") == "answers":
        given["model"] = folders["answers"]
    with pytest.raises(error, match=message) as caught:
        pipeline(**given)
    assert "\n" not in str(caught.value)


def test_without_transformers_a_pipeline_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"pip install transformers, or call model\.generate"):
        pipeline("text-generation", model="o/m")
    with pytest.raises(ImportError, match="transformers"):
        _ = neox_lite.TextStreamer
    assert not hasattr(neox_lite, "Trainer")


def test_a_pipeline_leaves_a_placed_model_where_it_is(folders):
    places = {"": "cpu", "gpt_neox.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folders["speaks"], device_map=places)
    parts = ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.layers.0", "gpt_neox.layers.1", "embed_out")
    assert model.hf_device_map == dict.fromkeys(parts, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folders["speaks"])
    placement, prompt = model.placement, {"max_new_tokens": 5, "do_sample": False}
    spoken = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("One, two", **prompt)
    assert model.placement is placement is not None
    whole = AutoModelForCausalLM.from_pretrained(folders["speaks"])
    assert not hasattr(whole, "hf_device_map")
    assert spoken == pipeline("text-generation", model=whole, tokenizer=tokenizer)("One, two", **prompt)
