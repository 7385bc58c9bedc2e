"""Every class in every form of its weights: what quantization costs it, that transformers computes the same, both ways."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from support.peers import opened_by_transformers
from torch.nn import functional

import neox_lite
from neox_lite import GPTNeoXConfig, GPTNeoXTokenizerFast
from neox_lite.checkpoint.reader import verify_folder
from neox_lite.hub import HEAD
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert

FORMATS = ("int8", "int4", "nf4")
# What each format costs on the bundled model: the root mean square error of a class's outputs as a share of their
# deviation, and KL in nats a token of the language model. The heads of the last three classes are random.
ERROR = {
    "GPTNeoXModel": (0.0051, 0.0787, 0.0717),
    "GPTNeoXForCausalLM": (0.0027, 0.0396, 0.0336),
    "GPTNeoXForSequenceClassification": (0.0101, 0.1258, 0.1381),
    "GPTNeoXForTokenClassification": (0.0052, 0.0784, 0.0759),
    "GPTNeoXForQuestionAnswering": (0.0048, 0.0677, 0.0701),
}
KL = (0.000030, 0.007257, 0.005757)


@pytest.fixture(scope="module")
def ids():
    """Text that the bundled model has not seen (4, 128)."""
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(DEMO)
    found = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8")[:20_000], return_tensors="pt").input_ids
    return found[0, : 4 * 128].view(4, 128)


@pytest.fixture(scope="module", params=ERROR)
def dense(request, tmp_path_factory):
    """The bundled model as that class in float16, with a random head where it has none."""
    folder, name = tmp_path_factory.mktemp("dense") / request.param, request.param
    torch.manual_seed(0)
    labels = (
        {"num_labels": 2 if "Question" in name else 5} if name not in ("GPTNeoXModel", "GPTNeoXForCausalLM") else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it has no such head
        getattr(neox_lite, name).from_pretrained(DEMO, dtype="float16", **labels).save_pretrained(folder)
    return folder


def load(folder, **options):
    """The folder as its own class, computing in float32."""
    (name,) = GPTNeoXConfig.from_pretrained(folder).extra["architectures"]
    return getattr(neox_lite, name).from_pretrained(folder, **{"dtype": "float32", "exact": True, **options})


def outputs(model, ids):
    """What the class is for: last hidden states, logits, or scores of starts and ends."""
    with torch.no_grad():
        found = model(ids, attention_mask=torch.ones_like(ids))
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits), -1).float()
    return (found.logits if "logits" in found else found.last_hidden_state).float()


def kl(source, quantized):
    logs, others = (functional.log_softmax(x.double(), -1) for x in (source, quantized))
    return float((logs.exp() * (logs - others)).sum(-1).mean())


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_class_is_near_its_source_and_equals_transformers(dense, ids, format, tmp_path):
    name, number = dense.name, FORMATS.index(format)
    convert(dense, tmp_path / "quantized", format=format)
    assert verify_folder(tmp_path / "quantized") == []
    model = load(tmp_path / "quantized")
    source, found = outputs(load(dense), ids), outputs(model, ids)
    # Another processor adds in another order.
    assert (source - found).square().mean().sqrt() / source.std() == pytest.approx(ERROR[name][number], rel=0.1)
    assert name != "GPTNeoXForCausalLM" or kl(source, found) == pytest.approx(KL[number], rel=0.1)
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


def test_the_documents_figures_are_these():
    whole = (Path(__file__).parents[1] / "docs" / "coming-from-transformers.md").read_text(encoding="utf-8")
    page = whole.partition("## Every class, quantized")[2]
    for name, errors in ERROR.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert row.endswith(" | ".join(["", *(f"{error:.4f}" for error in errors)]) + " |")
    assert " | ".join(("| the same, KL in nats a token", *(f"{value:.6f}" for value in KL))) + " |" in page
