"""The Auto names and `pipeline`: the same answers as transformers' around its own classes, and what is refused by name."""

import sys
from pathlib import Path
from typing import Any

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
from neox_lite.errors import ArgumentError, ConfigError, NeoxLiteError, TokenizerError, UnsupportedError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, a classifier, an answerer and one that says it is a llama."""
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
def test_every_auto_name_refuses_another_architecture(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="model_type is 'llama', expected 'gpt_neox', the one architecture this runs"):
        getattr(neox_lite, name).from_pretrained(folders["llama"])


def test_an_auto_tokenizer_is_that_of_its_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["speaks"], padding_side="left", use_fast=False)
    assert (type(tokenizer), tokenizer.padding_side) == (neox_lite.GPTNeoXTokenizerFast, "left")
    (tmp_path / "tokenizer.json").write_bytes((folders["speaks"] / "tokenizer.json").read_bytes())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)  # a tokenizer alone is nobody's
    with pytest.raises(TokenizerError, match="trust_remote_code=True: code from a repository is never run; leave it"):
        AutoTokenizer.from_pretrained(folders["speaks"], trust_remote_code=True)


def test_classification_pipelines_answer_as_transformers_do(folders: dict[str, Path]) -> None:
    answers = []
    for library in (neox_lite, transformers):
        model = library.AutoModelForSequenceClassification.from_pretrained(folders["classifies"])
        tokenizer = library.AutoTokenizer.from_pretrained(folders["classifies"])
        answers.append(
            library.pipeline("text-classification", model=model, tokenizer=tokenizer)("a good dog", top_k=None)
        )
    ours, theirs = answers
    assert [one["label"] for one in ours] == [one["label"] for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=1e-5)


def test_a_pipeline_finds_its_task_and_passes_on_how_to_load(folders: dict[str, Path]) -> None:
    found = pipeline(model=folders["classifies"], model_kwargs={"dtype": "bfloat16"})
    assert (found.task, type(found.model)) == ("text-classification", GPTNeoXForSequenceClassification)
    assert found.model.dtype == torch.bfloat16
    spoken = pipeline(model=str(folders["speaks"]), torch_dtype=torch.float32, device_map="auto")
    assert (spoken.task, type(spoken.model), spoken.model.dtype) == (
        "text-generation",
        GPTNeoXForCausalLM,
        torch.float32,
    )


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        (
            {"task": "conversational"},
            ArgumentError,
            "task is 'conversational', expected one of text-generation, text-cla",
        ),
        ({"model": "answers"}, ArgumentError, "transformers has none for GPTNeoXForQuestionAnswering; call the"),
        (
            {"model": torch.nn.Linear(1, 1)},
            ArgumentError,
            "model is a Linear, expected a model of neox_lite, a folder or",
        ),
        (
            {"trust_remote_code": True},
            UnsupportedError,
            "trust_remote_code=...*code from checkpoints is never run; leave",
        ),
        ({"model_kwargs": {"bits": 4}}, ArgumentError, "from_pretrained knows no option 'bits'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_pipeline_can_do_is_refused(
    options: dict[str, Any], error: type[NeoxLiteError], told: str, folders: dict[str, Path]
) -> None:
    given = {"model": "speaks", **options}
    given["model"] = folders.get(given["model"], given["model"]) if isinstance(given["model"], str) else given["model"]
    with pytest.raises(error, match=told) as caught:
        pipeline(**given)
    assert "\n" not in str(caught.value)


def test_without_transformers_a_pipeline_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"pip install transformers, or call model\.generate"):
        pipeline("text-generation", model="o/m")
    with pytest.raises(ImportError, match="transformers"):
        _ = neox_lite.TextStreamer
    assert not hasattr(neox_lite, "Trainer")


def test_a_pipeline_leaves_a_placed_model_where_it_is(folders: dict[str, Path]) -> None:
    places = {"": "cpu", "gpt_neox.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folders["speaks"], device_map=places)
    parts = ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.layers.0", "gpt_neox.layers.1", "embed_out")
    assert model.hf_device_map == dict.fromkeys(parts, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folders["speaks"])
    placement, prompt = model.placement, {"max_new_tokens": 5, "do_sample": False}
    spoken = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("One, two", **prompt)
    assert model.placement is placement is not None
    whole = AutoModelForCausalLM.from_pretrained(folders["speaks"])
    assert whole.hf_device_map is None
    assert spoken == pipeline("text-generation", model=whole, tokenizer=tokenizer)("One, two", **prompt)
