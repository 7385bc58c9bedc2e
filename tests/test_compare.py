"""Folders beside their source: what is measured, that memory and scratch space are bounded, and what is drawn."""

import json
import math
import shutil
import weakref
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from support.peers import peer

from neox_lite import GPTNeoXForCausalLM
from neox_lite_app.evaluation import compare
from neox_lite_app.evaluation.compare import weight_errors
from neox_lite_app.evaluation.quality import cut, last_states, log_probabilities, quality_of
from neox_lite_app.evaluation.quality_plot import draw, linear_axis, log_axis
from neox_lite_app.paths import DEMO
from neox_lite_quant import convert

FORMATS = {"int8": ("int8", 128), "g32": ("int4", 32), "g128": ("int4", 128)}
KEYS = {"path", "format", "bits_per_weight", "head", "bytes", "perplexity", "kl", "kl_error", "top1"}
LINEARS = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    for name, (format, size) in FORMATS.items():
        convert(DEMO, root / name, format=format, group_size=size)
    return {name: root / name for name in FORMATS}


@pytest.fixture
def run(run, heldout):
    def call(*words):
        fixed = () if "--text" in words else ("--text", heldout, "--context", 64)
        return run("compare", *words, *fixed)

    return call


@pytest.fixture
def result_of(run):
    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def both(folders):
    """The source and its int4 folder, computing in float32."""
    return [GPTNeoXForCausalLM.from_pretrained(folder, exact=True) for folder in (DEMO, folders["g128"])]


def test_rows_are_those_of_both_models_side_by_side(result_of, folders, heldout):
    rows = result_of(DEMO, *folders.values(), "--windows", 5, "--exact")["rows"]
    source = GPTNeoXForCausalLM.from_pretrained(DEMO, exact=True)
    windows = cut(source, heldout.read_text(encoding="utf-8"), 64)[:5]
    assert [row["path"] for row in rows] == [str(DEMO), *map(str, folders.values())]
    assert [row["bits_per_weight"] for row in rows] == [16, 8.125, 4.5, 4.125]
    assert (rows[0]["kl"], rows[0]["top1"]) == (0, 1) and rows[0].keys() == rows[1].keys() == KEYS
    for row in rows[1:]:
        model = GPTNeoXForCausalLM.from_pretrained(row["path"], exact=True)
        both = quality_of(source, model, windows, row["path"])
        assert (row["kl"], row["perplexity"]) == pytest.approx((both.kl, both.perplexity), rel=1e-9)
        assert (row["top1"], row["bytes"], row["head"]) == (both.top1, both.bytes, "float16")


def test_the_distance_is_the_definition_of_kl_and_its_error_that_of_a_mean_of_windows(both, heldout):
    source, model = both
    windows = cut(source, heldout.read_text(encoding="utf-8"), 64)[:6]
    truth, found = (torch.stack([m(w[None]).logits[0, :-1].double().log_softmax(-1) for w in windows]) for m in both)
    means = (truth.exp() * (truth - found)).sum(-1).mean(1)  # of each window
    quality = quality_of(source, model, windows, "")
    assert quality.kl == pytest.approx(float(means.mean()), rel=1e-4)  # float32 log-softmax
    assert quality.kl_error == pytest.approx(float(means.std()) / math.sqrt(6), rel=1e-3)  # differences of those
    assert quality_of(source, model, windows[:1], "").kl_error is None


def test_states_window_by_window_are_what_the_model_computes():
    model = GPTNeoXForCausalLM.from_pretrained(DEMO)
    windows = cut(model, (DEMO / "heldout.txt").read_text(encoding="utf-8"), 32)[:3]
    seen = {}
    for _ in last_states(model, windows, None, lambda window, layer, x: seen.update({(window, layer): x.clone()})):
        pass
    out = model(windows, output_hidden_states=True)
    assert sorted(seen) == [(w, n) for w in range(3) for n in range(4)]
    for (window, layer), x in seen.items():
        if layer < 3:  # the last of transformers' hidden states is after the final norm
            assert float((x - out.hidden_states[layer + 1][window]).abs().max()) < 2e-2  # those are rounded to float16
    for scores, logits in zip(log_probabilities(model, windows), out.logits, strict=True):
        # one product for all windows, or one each
        assert float((scores - logits[:-1].log_softmax(-1)).abs().max()) < 1e-4


def test_an_int8_head_counts_and_is_named(result_of, folders):
    source, small = result_of(DEMO, folders["g32"], "--windows", 3, "--head", "int8")["rows"]
    assert (source["head"], small["head"]) == ("float16", "int8 g128")
    assert source["bytes"] - small["bytes"] > 256 * 1536 * 0.9  # the head's other half


def test_errors_by_layer_are_those_of_the_weights_and_of_the_states(result_of, folders, both, heldout):
    result = result_of(DEMO, folders["int8"], folders["g128"], "--layers", "--exact", "--windows", 3)
    plain, int8, int4 = result["rows"]
    assert "layers" not in plain and result["layer_windows"] == result["windows"] == 3
    windows = cut(both[0], heldout.read_text(encoding="utf-8"), 64)[:3]
    a, b = (model(windows, output_hidden_states=True).hidden_states for model in both)
    for layer in int4["layers"]:
        assert list(layer["weights"]) == LINEARS
        for name, found in layer["weights"].items():
            x, y = (m.gpt_neox.layers[layer["layer"]].get_submodule(name).handle.decode().double() for m in both)
            assert found["error"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
            assert found["format"] == "int4 g128"
        if layer["layer"] < 3:  # the last of transformers' hidden states is after the final norm
            x, y = (states[layer["layer"] + 1].float() for states in (a, b))
            expected = float(((x - y).norm(dim=-1) / x.norm(dim=-1)).mean())
            assert layer["hidden"] == pytest.approx(expected, rel=1e-2)  # those are rounded to float16
    for small, large in zip(int8["layers"], int4["layers"], strict=True):
        assert 0 < small["hidden"] < large["hidden"] / 5


def test_a_folder_beside_itself_has_no_errors_but_those_of_a_smaller_cache(run, result_of):
    row = result_of(DEMO, DEMO, "--layers", "--windows", 2)["rows"][1]
    assert row["kl"] == 0 and row["top1"] == 1
    assert all(layer["hidden"] == 0 for layer in row["layers"])
    assert all(w["error"] == 0 for layer in row["layers"] for w in layer["weights"].values())
    _, out, err = run(DEMO, DEMO, "--windows", 2, "--kv", "int8", "--json")
    source, small = json.loads(out)["rows"]
    assert source["kl"] == 0 < small["kl"] < 1e-3 and err.count("int8 KV cache") == 1


def test_the_text_table_has_a_line_for_each_layer(run, folders):
    code, out, err = run(DEMO, folders["g32"], "--layers", "--windows", 2)
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[:3] == ["format", "bits/weight", "head"] and lines[1].split()[0] == "float16"
    at = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    assert [line.split()[0] for line in lines[at + 1 :]] == ["0", "1", "2", "3"]
    assert all(line.count("%") == 5 for line in lines[at + 1 :]) and "[1/2]" in err and "[2/2]" in err


def test_states_after_layers_are_stored_of_as_many_windows_as_there_is_room_for(result_of, folders, monkeypatch):
    for room, windows in ((3 * 4 * 64 * 256 * 4, 3), (1, 1)):  # windows, layers, tokens, hidden, bytes
        monkeypatch.setattr(compare, "LAYER_BYTES", room)
        assert result_of(DEMO, folders["g32"], "--layers", "--windows", 5)["layer_windows"] == windows


def test_weights_of_any_two_folders_are_comparable(folders):
    (first, *_) = weight_errors(str(folders["int8"]), str(folders["g128"]), lambda done, total: None)
    assert 0.05 < first["attention.dense"].error < 0.15


def test_the_source_is_gone_before_the_first_folder_is_loaded(run, folders, monkeypatch):
    loaded, load = [], compare.load

    def watched(name, *rest, **options):
        assert all(model() is None for model in loaded), "a model is held while the next one is loaded"
        model = load(name, *rest, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(compare, "load", watched)
    assert run(DEMO, folders["int8"], folders["g32"], "--windows", 2)[0] == 0 and len(loaded) == 3


def test_a_source_whose_states_find_no_room_is_refused(run, folders, monkeypatch):
    monkeypatch.setattr(compare, "free_bytes", lambda path: 1000)
    code, out, err = run(DEMO, folders["g32"], "--windows", 2)
    assert code == 1 and out == "" and "131072 bytes" in err and "1000 are free; use fewer --windows" in err


def test_an_interrupt_leaves_nothing_behind(run, folders, monkeypatch, tmp_path):
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.Reference, "log_probabilities", stop)
    code, out, err = run(DEMO, folders["g32"], "--windows", 2)
    assert code == 130 and out == "" and err.endswith("interrupted\n") and list(tmp_path.iterdir()) == []


def test_what_cannot_be_compared_is_said_before_the_source_is_scored(run, folders, tmp_path):
    peer(max_position_embeddings=32).save_pretrained(tmp_path / "other")
    peer(vocab_size=1536, max_position_embeddings=32).save_pretrained(tmp_path / "short")
    peer(vocab_size=1536).save_pretrained(tmp_path / "shape")
    (tmp_path / "folder.svg").mkdir()
    shutil.copytree(folders["g32"], tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused = {
        (tmp_path / "truncated",): "truncated?",
        (folders["g32"], "--plot", tmp_path / "folder.svg"): "Is a directory",
        (folders["g32"], "--plot", tmp_path / ("a" * 300 + ".svg")): "too long",
        (tmp_path / "other",): "vocab_size is 131, but",
        (tmp_path / "short",): "--context is 64, but",
        (tmp_path / "shape", "--layers"): "num_hidden_layers is 2, but",
        (folders["g32"], "--plot", tmp_path / "a.png"): "ends in .svg",
        (folders["g32"], "--plot", tmp_path / "no" / "a.svg"): "no such folder",
        (tmp_path / "missing",): "no such folder",
        (DEMO, "--text", "/no/such/text"): "cannot be read",
    }
    for words, said in refused.items():
        code, out, err = run(DEMO, *words)
        assert code == 1 and out == "" and len(err.splitlines()) == 1 and said in err, words
    assert run(DEMO, tmp_path / "shape")[0] == 0  # another shape with the same ids is a fair comparison


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_names_every_folder_and_every_linear_layer(run, folders, tmp_path):
    code, out, _ = run(DEMO, *folders.values(), "--windows", 2, "--plot", tmp_path / "q.svg")
    found = texts((tmp_path / "q.svg").read_text(encoding="utf-8"))
    assert code == 0 and set(FORMATS) <= set(found) and "layer" not in out
    assert {"Error of query_key_value", "Error of dense_4h_to_h", "bits a weight, linear layers"} <= set(found)


def test_the_picture_survives_names_and_numbers_of_any_kind():
    nothing = {"kl": 0.0, "kl_error": None, "bits_per_weight": 16.0}
    names = ["<b>&\"'", "x" * 300, *(f"model-{i}" for i in range(30))]
    rows = [{"path": "source", **nothing}, *({"path": f"/a/{n}", **nothing} for n in names)]
    for kl in (0.0, 1e-12, 3.0, math.nan, math.inf):
        for row in rows[2:]:
            row |= {"kl": kl, "kl_error": kl}
        layer = {"layer": 0, "hidden": kl, "weights": {n: {"error": kl, "format": "int4"} for n in LINEARS}}
        svg = draw(rows, [[layer]] * (len(rows) - 1))
        assert texts(svg)[1] == names[0] and "nan" not in svg.partition("</style>")[2]


def test_folders_of_one_name_are_told_apart():
    rows = [{"path": path, "kl": 0.1, "kl_error": None, "bits_per_weight": 4.0} for path in ("s", "a/int4", "b/int4")]
    assert {"a/int4", "b/int4"} <= set(texts(draw(rows, [])))


@pytest.mark.parametrize("low, high", [(1e-9, 1e-9), (3e-5, 0.2), (0.011, 0.0111), (1.0, 10.0), (1e-12, 50.0)])
def test_a_logarithmic_axis_contains_its_values_and_has_ticks(low, high):
    axis = log_axis([low, high], 100, 0)
    assert axis.low < low <= high < axis.high and 2 <= len(axis.ticks) <= 20
    assert 0 < axis(high) <= axis(low) < 100


def test_a_linear_axis_has_round_ticks_within_its_ends():
    assert linear_axis(3.6, 8.7, 0, 100).ticks == (4, 5, 6, 7, 8)
    assert linear_axis(0, 43, 0, 100, 10).ticks == tuple(range(0, 44, 5))


def test_outputs_that_are_no_numbers_are_an_error_that_names_the_folder(run, folders, tmp_path):
    shutil.copytree(folders["int8"], tmp_path / "broken")
    with torch.no_grad():
        model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "broken", head="fp16")
        model.embed_out.weight.data[7] = math.nan
        model.save_pretrained(tmp_path / "nan")
    code, out, err = run(folders["int8"], tmp_path / "nan")
    assert code == 1 and "nan: outputs are not finite: see neox-lite verify" in err and "int8" in out
