"""Calibration: texts into windows, blocks beside the whole model, balanced columns, the folder that comes of it, refusals."""

import copy
import json
import os
import sys

import pytest
import torch
import transformers
from support import checkpoints
from support.checkpoints import IDS, SHAPE, digests, write_words
from support.peers import beside_transformers, difference
from support.refusals import refused

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import ArgumentError, FormatError
from neox_lite.formats import GroupInt
from neox_lite_quant import calibrate, convert, gptq
from neox_lite_quant.balance import Balanced
from neox_lite_quant.blockwise import Blockwise, memory_bytes, steps_of

LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
SHAPES = {
    "parallel": {},
    "sequential-tied": {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True},
    "without-attention-bias": {"attention_bias": False},
}


def write_source(folder, cls=GPTNeoXForCausalLM, **config):
    """With a context of 64, and a tokenizer."""
    ends = {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = checkpoints.write_source(folder, cls=cls, **ends, **config)
    write_words(folder)
    return model


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder, **request.param)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    write_source(folder)
    return folder


@pytest.fixture
def windows():
    return torch.randint(0, 131, (3, 40))


def exact_model(folder):
    return GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32, exact=True)


def largest(tensor):
    return float(tensor.abs().max())


def words(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(1, 131, (count,), generator=random).tolist())


def blockwise(folder, windows, scratch, format=None):
    config, lookup = GPTNeoXConfig.from_pretrained(folder), lambda name: format or GroupInt(4, 32)
    return Blockwise(Checkpoint.open(folder), config, lambda name: name, lookup, torch.float16, windows, scratch)


EIGHTH = GroupInt(8, 32)


def rounded(monkeypatch, seen):
    """Let the solver round to int8 in its place, and note the moments that it is given."""

    def quantize(weight, bias, moments, format, dtype):
        seen.append((moments.second.clone(), moments.first.clone(), moments.count))
        return EIGHTH.encode(weight, torch.float16, "mse") | ({"bias": bias.half()} if bias is not None else {})

    monkeypatch.setattr("neox_lite_quant.gptq.quantize", quantize)


# -- blocks beside the whole model ------------------------------------------------------------------------------------


def test_blocks_one_after_another_are_the_whole_model(source, windows, tmp_path, monkeypatch):
    """With weights that quantizing does not change, both streams end where the model's own hidden states do."""
    rounded(monkeypatch, [])
    blocks = blockwise(source, windows, tmp_path, EIGHTH)
    blocks.tensors(f"gpt_neox.layers.1.{LINEARS[-1]}")
    model = exact_model(source)
    expected = model(windows, output_hidden_states=True).hidden_states
    last, norm = blocks._streams[0], model.gpt_neox.final_layer_norm
    normed = torch.nn.functional.layer_norm(last, (128,), norm.weight, norm.bias, norm.eps)
    assert difference(normed, expected[-1]) < 1e-4  # float32 sums in another order
    assert 0 < difference(blocks._streams[1], last) < 0.1 * largest(last)


def test_moments_are_those_that_hooks_on_the_whole_model_gather(source, tmp_path, monkeypatch):
    """The first block's, of every layer: its inputs in transformers, while what stands before them is quantized already."""
    windows, seen = torch.randint(0, 131, (5, 40)), []
    rounded(monkeypatch, seen)
    monkeypatch.setattr("neox_lite_quant.blockwise.BATCH_ELEMENTS", 2 * 40 * 256)  # batches of 2, 2 and 1 windows
    blocks = blockwise(source, windows, tmp_path, EIGHTH)
    names = [name for stage in blocks._stages for name in stage]
    found = {name: blocks.tensors(f"gpt_neox.layers.0.{name}") for name in names}
    peer = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    layer, inputs = peer.gpt_neox.layers[0], {}
    for name in names:
        module = layer.get_submodule(name)
        # the block as it is in the end: its inputs are final
        module.weight.data = EIGHTH.decode(found[name], torch.float32)
        module.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        peer(windows)
    for name, (second, first, count) in zip(names, seen, strict=True):
        x = inputs[name].double()
        assert count == len(x) == 200
        assert largest(second - x.T @ x) < 1e-4 * largest(x.T @ x)
        assert largest(first - x.sum(0)) < 1e-4 * float(x.abs().sum(0).max())


def test_what_is_added_last_makes_up_for_the_stream_as_well(plain, windows, tmp_path, monkeypatch):
    """attention.dense and dense_4h_to_h add to the stream: the second of them is asked for its whole difference, too."""
    seen, quantize = [], gptq.quantize

    def remember(weight, bias, moments, format, dtype):
        seen.append(moments.shift_first / moments.count)
        return quantize(weight, bias, moments, format, dtype)

    apart = torch.linspace(-0.01, 0.01, 128)
    blocks = blockwise(plain, windows, tmp_path)
    blocks._streams[0] += apart  # as if earlier blocks had left the stream without this
    original = blocks._load(0)
    original.mlp.dense_4h_to_h.weight.data.zero_()  # without a share of its own, the stream's difference is all
    monkeypatch.setattr(blocks, "_load", lambda index: copy.deepcopy(original))
    monkeypatch.setattr("neox_lite_quant.gptq.quantize", remember)
    blocks.tensors(f"gpt_neox.layers.0.{LINEARS[0]}")
    assert largest(seen[3] - apart) < 1e-6


def test_progress_ends_at_its_total_and_the_scratch_file_leaves_nothing_behind(source, windows, tmp_path):
    seen, blocks = [], blockwise(source, windows, tmp_path)
    blocks._progress = lambda done, total: seen.append((done, total))
    blocks.tensors(f"gpt_neox.layers.1.{LINEARS[0]}")
    total = steps_of(GPTNeoXConfig.from_pretrained(source), 3, 40)
    assert seen == [(i + 1, total) for i in range(total)]
    del blocks
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_are_refused_by_layer(plain, windows, tmp_path):
    blocks = blockwise(plain, windows, tmp_path)
    blocks._streams[:, 1, 3] = float("inf")
    told = r"layers.0.attention.query_key_value: the inputs hold values that are not"
    refused(FormatError, told, blocks.tensors, f"gpt_neox.layers.0.{LINEARS[0]}")


# -- balanced columns -------------------------------------------------------------------------------------------------


def test_a_balanced_checkpoint_is_the_same_function(source):
    model = exact_model(source)
    expected = model(IDS).logits
    with Checkpoint.open(source) as checkpoint:
        balanced = Balanced(checkpoint, GPTNeoXConfig.from_pretrained(source), lambda name: name, torch.float16)
        state = model.state_dict()
        changed = [n for n in state if n in balanced and not torch.equal(balanced.tensor(n).float(), state[n])]
        model.load_state_dict({n: balanced.tensor(n).float() for n in state if n in balanced}, strict=False)
    kinds = {n.removeprefix("gpt_neox.layers.0.") for n in changed if ".layers.0." in n}
    assert {f"{name}.weight" for name in LINEARS[:3]} < kinds and "mlp.dense_4h_to_h.weight" not in kinds
    assert difference(model(IDS).logits, expected) < 1e-4 * largest(expected)


def test_rows_and_whole_tensors_of_a_balanced_checkpoint_agree(plain):
    with Checkpoint.open(plain) as checkpoint:
        balanced = Balanced(checkpoint, GPTNeoXConfig.from_pretrained(plain), lambda name: name, torch.float16)
        for name in balanced.names():
            whole, rows = balanced.tensor(name), balanced.info(name).shape[0]
            parts = torch.cat([balanced.rows(name, i, min(i + 50, rows)) for i in range(0, rows, 50)])
            assert torch.equal(parts, whole), name


def test_balancing_undoes_large_channels(plain, tmp_path):
    """Gains times 30 on some channels and their columns divided by 30: the same function costs no more in int4."""
    large, model = tmp_path / "large", GPTNeoXForCausalLM.from_pretrained(plain)
    for layer in model.gpt_neox.layers:
        norms = layer.input_layernorm, layer.post_attention_layernorm
        for norm, linear in zip(norms, (layer.attention.query_key_value, layer.mlp.dense_h_to_4h), strict=True):
            norm.weight[5:9] *= 30
            norm.bias[5:9] *= 30
            linear.weight[:, 5:9] /= 30
    model.save_pretrained(large)
    found = {}
    for name, folder, method in (("few", plain, "balance"), ("many", large, "balance"), ("mse", large, "mse")):
        convert(folder, tmp_path / name, method=method)
        found[name] = kl(folder, tmp_path / name)
    assert found["many"] < 1.3 * found["few"] and found["many"] < 0.5 * found["mse"]


def test_gains_of_zero_and_empty_columns_are_left_alone(tmp_path):
    model = write_source(tmp_path / "source")
    layer = model.gpt_neox.layers[0]
    layer.input_layernorm.weight[3] = 0
    layer.mlp.dense_h_to_4h.weight[:, 7] = 0
    layer.attention.dense.weight[:, 9] = 0
    model.save_pretrained(tmp_path / "zeros")
    convert(tmp_path / "zeros", tmp_path / "out", method="balance")
    assert verify_folder(tmp_path / "out") == [] and kl(tmp_path / "zeros", tmp_path / "out") < 0.1


# -- the folder -------------------------------------------------------------------------------------------------------


def kl(source, quantized):
    ids = torch.arange(200).view(5, 40) * 13 % 131
    p, q = (exact_model(folder)(ids).logits.double().log_softmax(-1) for folder in (source, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["balance", "gptq"])
def test_transformers_opens_the_folder_with_equal_logits(source, tmp_path, method):
    options = {"calibration_windows": 16} if method == "gptq" else {}
    convert(source, tmp_path / "model", method=method, **options)
    assert verify_folder(tmp_path / "model") == []
    ours, theirs = beside_transformers(tmp_path / "model", IDS)
    assert difference(ours, theirs) < 1e-5 * largest(theirs)


def test_gptq_is_nearer_to_the_source_than_mse_with_its_own_text_and_with_a_file(source, tmp_path):
    (tmp_path / "text.txt").write_text(words(3000))
    convert(source, tmp_path / "mse", method="mse")
    convert(source, tmp_path / "own", method="gptq", calibration_windows=32)
    convert(source, tmp_path / "file", method="gptq", calibration=tmp_path / "text.txt")
    distances = {name: kl(source, tmp_path / name) for name in ("mse", "own", "file")}
    assert distances["own"] < 0.8 * distances["mse"] and distances["file"] < 0.8 * distances["mse"]


def test_the_manifest_names_the_text(plain, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(700))
    convert(plain, tmp_path / "file", method="gptq", calibration=text, calibration_windows=5)
    convert(plain, tmp_path / "own", method="gptq", calibration_windows=3)
    keys = ("method", "calibration", "calibration_sha256", "windows", "context")
    manifests = [json.loads((tmp_path / n / "neox_lite_manifest.json").read_text()) for n in ("file", "own")]
    file, own = ([manifest[k] for k in keys] for manifest in manifests)
    assert file == ["gptq", "text.txt", calibrate.read_texts(text)[1], 5, 64]
    assert own == ["gptq", "own text", None, 3, 64]


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["neox_lite_quant.convert"], "SHARD_BYTES", 60_000)

    def ended(done, total):
        if done > total - 3:
            raise KeyboardInterrupt

    options = {"method": "gptq", "calibration_windows": 4}
    convert(plain, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        convert(plain, tmp_path / "ended", progress=ended, **options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "ended").glob("model-*.safetensors")}
    convert(plain, tmp_path / "ended", **options)
    assert 0 < len(kept) < len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert digests(tmp_path / "ended") == digests(tmp_path / "whole")


def test_the_memory_that_is_said_is_not_exceeded(plain, tmp_path):
    needed = convert(plain, tmp_path / "dry", method="gptq", dry_run=True)
    assert not (tmp_path / "dry").exists() and needed.scratch_bytes == 2 * 4 * 512 * 64 * 128
    before = convert(plain, tmp_path / "mse").peak_bytes
    report = convert(plain, tmp_path / "gptq", method="gptq", calibration_windows=64)
    assert report.peak_bytes - before < needed.peak_bytes


def test_memory_grows_with_a_block_and_not_with_the_number_of_blocks():
    shape = {"hidden_size": 6144, "num_attention_heads": 64, "intermediate_size": 24576}
    few, many = (GPTNeoXConfig(**{**SHAPE, **shape, "num_hidden_layers": n}) for n in (2, 44))
    assert memory_bytes(few, 128, 512) == memory_bytes(many, 128, 512) < 24 << 30


def test_too_little_memory_or_disk_is_said_before_anything_starts(plain, windows, tmp_path, monkeypatch):
    for module in ("calibrated", "calibrate"):
        monkeypatch.setattr(f"neox_lite_quant.{module}.free_memory", lambda: (1 << 20, 1 << 20))
    told = r"gptq takes up to .* GB of memory .*--method balance"
    refused(ArgumentError, told, convert, plain, tmp_path / "out", method="gptq")
    assert not (tmp_path / "out").exists()
    told, config = r"writing its own calibration text takes .* give --calibration FILE", GPTNeoXConfig.from_pretrained
    refused(ArgumentError, told, calibrate.own_text, plain, config(plain), 4)
    monkeypatch.setattr("neox_lite_quant.blockwise.free_bytes", lambda path: 1000)
    refused(ArgumentError, r"of disk while it runs.*--calibration-windows", blockwise, plain, windows, tmp_path)


# -- texts ------------------------------------------------------------------------------------------------------------


TEXTS = {
    "a.txt": ("one\ntwo", ["one\ntwo"]),
    "b.jsonl": ('{"text": "one\u2028x"}\n\n"two"\n', ["one\u2028x", "two"]),
    "c.json": ('["one", {"text": "two"}]', ["one", "two"]),
    "d.txt": ("\ufeffone", ["one"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_come_from_plain_files_lines_of_json_and_lists(tmp_path, name):
    content, expected = TEXTS[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert calibrate.read_texts(tmp_path / name)[0] == expected


def test_windows_are_spread_over_the_texts_with_ends_of_text_between(plain, tmp_path):
    lines = [words(100, seed=i) for i in range(10)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = GPTNeoXConfig.from_pretrained(plain)
    every = calibrate.from_file(tmp_path / "texts.jsonl", plain, config, 1000)
    assert every.windows.shape == (15, 64) and int((every.windows == 0).sum()) == 9  # 1009 ids, 15 whole windows
    three = calibrate.from_file(tmp_path / "texts.jsonl", plain, config, 3)
    assert torch.equal(three.windows, every.windows[[0, 5, 10]])


def test_own_text_is_the_same_every_time_and_avoids_ids_without_a_token(tmp_path):
    write_source(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] = {w: i for w, i in tokenizer["model"]["vocab"].items() if i < 100}
    path.write_text(json.dumps(tokenizer))
    config = GPTNeoXConfig.from_pretrained(tmp_path / "model")
    one, two = (calibrate.own_text(tmp_path / "model", config, 20).windows for _ in range(2))
    assert torch.equal(one, two) and one.shape == (20, 64) and int(one.max()) < 100 and len(one.unique()) > 50


def test_own_text_follows_the_models_distribution(plain):
    """What the model is sure of follows: drawn tokens are as likely as it says, on average."""
    model = GPTNeoXForCausalLM.from_pretrained(plain, dtype=torch.float32)
    windows = calibrate.own_text(plain, GPTNeoXConfig.from_pretrained(plain), 64).windows
    scores = model(windows).logits.float().log_softmax(-1)[:, :-1]
    drawn = scores.gather(-1, windows[:, 1:, None]).mean()
    expected = (scores.exp() * scores).sum(-1).mean()
    assert abs(float(drawn - expected)) < 0.1  # of 4000 draws


NO_TEXT = {
    "none.txt": (None, "none.txt: cannot be read: No such file"),
    "empty.txt": (b"", "empty.txt: holds no text"),
    "blank.jsonl": (b'{"text": "  "}\n', "blank.jsonl: holds no text"),
    "latin.txt": (b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
    "short.txt": (b"w1 w2", "has 2 tokens, fewer than one window of 64"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "other.jsonl": (b'{"content": "a"}', "line 1 is no text"),
    "number.json": (b"3", "holds int, expected a list of texts"),
    "deep.json": (b"[" * 100_000, "not JSON"),
    "huge.txt": ((64 << 20) + 1, "is larger than 64 MiB; a sample of it is enough"),
    ".": (None, "is no regular file"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_files_that_hold_no_text_are_refused_in_a_line(plain, tmp_path, name):
    content, message = NO_TEXT[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else b"")
    if isinstance(content, int):
        os.truncate(tmp_path / name, content)
    out = tmp_path / "out"
    refused(ArgumentError, message, convert, plain, out, method="gptq", calibration=tmp_path / name)
    assert not out.exists()


IGNORED = [
    ({"method": "mse", "calibration": "x.txt"}, "calibration is for method 'gptq', but the method is 'mse'"),
    ({"calibration_windows": 5}, "calibration is for method 'gptq'"),
    ({"method": "gptq", "calibration_windows": 0}, "calibration windows are 0, expected 1 to"),
    ({"method": "gptq", "format": "nf4"}, "method is 'gptq', expected one of"),
    ({"method": "balance", "format": "nf4"}, "method is 'balance', expected one of"),
]


@pytest.mark.parametrize(("options", "message"), IGNORED, ids=str)
def test_options_that_would_be_ignored_are_refused(plain, tmp_path, options, message):
    refused(ArgumentError, message, convert, plain, tmp_path / "out", **options)


def test_a_model_without_a_vocabulary_head_needs_a_text(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_source(source, GPTNeoXForSequenceClassification)
    refused(ArgumentError, r"has no vocabulary head.*give --calibration FILE", convert, source, out, method="gptq")
    (tmp_path / "text.txt").write_text(words(500))
    convert(source, out, method="gptq", calibration=tmp_path / "text.txt")
    assert verify_folder(out) == []
