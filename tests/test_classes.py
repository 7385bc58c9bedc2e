"""Every class in every form of its weights: what quantization costs it, that transformers computes the same, both ways."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.peers import opened_by_transformers
from torch import Tensor
from torch.nn import functional

import neox_lite
from neox_lite import GPTNeoXConfig, GPTNeoXTokenizerFast
from neox_lite.checkpoint.reader import verify_folder
from neox_lite.hub import HEAD
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert

CLASSES = (
    "GPTNeoXModel",
    "GPTNeoXForCausalLM",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXForQuestionAnswering",
)
# What a format costs on the bundled model: KL in nats a token of the language model, and for every class the root mean square
# error of its outputs as a share of their deviation. The heads of the last three are random.
COST = {
    ("GPTNeoXModel", "int8"): (None, 0.0051),
    ("GPTNeoXModel", "int4"): (None, 0.0787),
    ("GPTNeoXModel", "nf4"): (None, 0.0717),
    ("GPTNeoXForCausalLM", "int8"): (0.000030, 0.0027),
    ("GPTNeoXForCausalLM", "int4"): (0.007257, 0.0396),
    ("GPTNeoXForCausalLM", "nf4"): (0.005757, 0.0336),
    ("GPTNeoXForSequenceClassification", "int8"): (None, 0.0101),
    ("GPTNeoXForSequenceClassification", "int4"): (None, 0.1258),
    ("GPTNeoXForSequenceClassification", "nf4"): (None, 0.1381),
    ("GPTNeoXForTokenClassification", "int8"): (None, 0.0052),
    ("GPTNeoXForTokenClassification", "int4"): (None, 0.0784),
    ("GPTNeoXForTokenClassification", "nf4"): (None, 0.0759),
    ("GPTNeoXForQuestionAnswering", "int8"): (None, 0.0048),
    ("GPTNeoXForQuestionAnswering", "int4"): (None, 0.0677),
    ("GPTNeoXForQuestionAnswering", "nf4"): (None, 0.0701),
}
FORMATS = ("int8", "int4", "nf4")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Text that the bundled model has not seen (4, 128)."""
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(DEMO)
    found = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8")[:20_000], return_tensors="pt").input_ids
    return found[0, : 4 * 128].view(4, 128)


@pytest.fixture(scope="module", params=CLASSES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as that class in float16, with a random head where it has none."""
    folder = tmp_path_factory.mktemp("dense") / request.param
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it has no such head
        names = {} if request.param in CLASSES[:2] else {"num_labels": 2 if "Question" in request.param else 5}
        model = getattr(neox_lite, request.param).from_pretrained(DEMO, dtype="float16", **names)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """The folder as its own class, computing in float32."""
    (name,) = GPTNeoXConfig.from_pretrained(folder).extra["architectures"]
    return getattr(neox_lite, name).from_pretrained(folder, **{"dtype": "float32", "exact": True, **options})


def outputs(model: Any, ids: Tensor) -> Tensor:
    """What the class is for: last hidden states, logits, or scores of starts and ends."""
    with torch.no_grad():
        found = model(ids, attention_mask=torch.ones_like(ids))
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits), -1).float()
    return (found.logits if "logits" in found else found.last_hidden_state).float()


def cost(source: Tensor, quantized: Tensor) -> tuple[float, float]:
    """(KL of their softmax in nats, root mean square difference as a share of the source's deviation)."""
    logs, others = (functional.log_softmax(x.double(), -1) for x in (source, quantized))
    kl = (logs.exp() * (logs - others)).sum(-1).mean()
    return float(kl), float((source - quantized).square().mean().sqrt() / source.std())


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_class_is_near_its_source_and_equals_transformers(
    dense: Path, ids: Tensor, format: str, tmp_path: Path
) -> None:
    name = dense.name
    convert(dense, tmp_path / "quantized", format=format)
    assert verify_folder(tmp_path / "quantized") == []
    model = load(tmp_path / "quantized")
    wanted, found = outputs(load(dense), ids), outputs(model, ids)
    kl, error = cost(wanted, found)
    expected_kl, expected_error = COST[name, format]
    assert error == pytest.approx(expected_error, rel=0.1)  # another processor adds in another order
    assert expected_kl is None or kl == pytest.approx(expected_kl, rel=0.1)
    head = model.get_submodule(model.head_name) if hasattr(model, "head_name") else None
    assert head is None or head.format.name == "dense"
    assert (tmp_path / "quantized" / HEAD).exists() == (name == "GPTNeoXForCausalLM")

    theirs = opened_by_transformers(tmp_path / "quantized", getattr(transformers, name))
    scale = found.abs().max()
    assert (outputs(theirs, ids) - found).abs().max() < 1e-5 * scale  # float32 sums in another order

    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again"), ids), found)
    while_loading = load(dense, quantization=format, dtype="float16").float()
    assert torch.equal(outputs(while_loading, ids), found)


def test_the_documents_figures_are_these() -> None:
    whole = (Path(__file__).parents[1] / "docs" / "coming-from-transformers.md").read_text(encoding="utf-8")
    page = whole.partition("## Every class, quantized")[2]
    for name in CLASSES:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert row.endswith(" | ".join(["", *(f"{COST[name, format][1]:.4f}" for format in FORMATS)]) + " |")
    kls = (f"{COST['GPTNeoXForCausalLM', format][0]:.6f}" for format in FORMATS)
    assert " | ".join(("| the same, KL in nats a token", *kls)) + " |" in page
