"""The quantizer: the folder's form, equality with transformers + compressed-tensors, bounded memory, refusals."""

import contextlib
import json
import math
import os
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import IDS, change_tensors, digests, flip, write_source
from support.peers import beside_transformers, difference
from support.refusals import refused

from neox_lite import GPTNeoXForCausalLM
from neox_lite.checkpoint.folder_writer import ShardWriter
from neox_lite.checkpoint.reader import verify_folder
from neox_lite.errors import ArgumentError, CheckpointError, FormatError
from neox_lite.formats import FORMATS, GROUPED
from neox_lite_quant import convert


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder, shard_size="200KB")
    return folder


@pytest.fixture
def int4(source, tmp_path):
    """A folder in int4, to be changed."""
    convert(source, tmp_path / "int4")
    return tmp_path / "int4"


open_model = GPTNeoXForCausalLM.from_pretrained


WAYS = [
    *((format, size, method) for format in GROUPED for size in (32, 128) for method in ("rtn", "mse")),
    *((format, None, None) for format in FORMATS if format not in GROUPED),
]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def quantized(request, source, tmp_path_factory):
    format, group_size, method = request.param
    folder = tmp_path_factory.mktemp("quantized") / "model"
    report = convert(source, folder, format=format, group_size=group_size, method=method)
    return folder, report


def test_the_folder_is_whole_and_the_same_model_when_it_is_saved_again(quantized, tmp_path):
    folder, report = quantized
    assert verify_folder(folder) == []
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert 0 <= weights - report.bytes_out <= 4096 * len(list(folder.glob("*.safetensors"))) * 2  # headers
    model = open_model(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(model(IDS).logits, open_model(tmp_path / "again")(IDS).logits)


def test_transformers_opens_the_folder_with_equal_logits(quantized):
    folder, _ = quantized
    methods = pytest.importorskip("transformers.quantizers.auto", reason="transformers").AUTO_QUANTIZER_MAPPING
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    if not any(known.startswith(method) for known in methods):  # bitsandbytes_4bit, ..._8bit
        pytest.skip(f"transformers does not know {method}")
    assert difference(*beside_transformers(folder, IDS)) < 1e-5  # float32 sums in another order


def test_a_folder_saved_in_another_dtype_keeps_to_one_dtype(int4, tmp_path):
    model = open_model(int4, dtype=torch.float32, exact=True)
    model.save_pretrained(tmp_path / "float32")
    ours, theirs = beside_transformers(tmp_path / "float32", IDS)
    assert torch.equal(ours, model(IDS).logits)
    assert difference(ours, theirs) < 1e-5  # float32 sums in another order
    refused(ArgumentError, "the rest torch", model.bfloat16().save_pretrained, tmp_path / "bfloat16")


def test_the_free_space_is_checked_for_all_files_before_anything_is_written(source, tmp_path, monkeypatch):
    needed = convert(source, tmp_path / "out", dry_run=True).bytes_out  # the small head too
    monkeypatch.setattr("neox_lite.checkpoint.folder_writer.free_bytes", lambda path: needed - 1)
    refused(CheckpointError, f"{needed - 1} are free; choose another folder", convert, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_head_and_a_weight_shape_that_lie_are_refused(int4):
    for shape in ((131,), (131, 0)):
        save_file({"embed_out.weight_scale": torch.ones(shape)}, int4 / "neox_lite_head.safetensors")
        told = r"head.safetensors: embed_out.weight_scale is \[131.*expected"
        refused(CheckpointError, told, open_model, int4, head="int8")
    lie = {"gpt_neox.layers.0.mlp.dense_h_to_4h.weight_shape": torch.tensor([128, 256])}
    change_tensors(next(int4.glob("model*.safetensors")), lambda tensors: tensors | lie)
    told = r"dense_h_to_4h.weight_shape: is \[128, 256\], expected \[256, 128\]"
    refused(CheckpointError, told, open_model, int4)


def test_quantizing_while_loading_gives_the_same_weights(source, int4, capsys):
    offline, loaded = open_model(int4).state_dict(), open_model(source, quantization="int4").state_dict()
    assert offline.keys() == loaded.keys()
    assert all(torch.equal(offline[k], loaded[k]) for k in offline)
    assert "quantize to int4: 100%" in capsys.readouterr().err


def test_what_a_killed_load_left_in_the_cache_is_taken_over(source, own_caches):
    open_model(source, quantization="int4")
    (cached,) = (own_caches / "neox-lite").iterdir()
    left = cached.with_name(f"{cached.name}.partial")
    cached.rename(left)
    (left / "neox_lite_manifest.json").rename(left / "neox_lite_manifest.json.partial")
    (left / "config.json").unlink()
    open_model(source, quantization="int4")
    assert [p.name for p in (own_caches / "neox-lite").iterdir()] == [cached.name] and verify_folder(cached) == []


def test_packed_weights_start_at_multiples_of_64_bytes_and_shapes_come_last(int4):
    raw = next(int4.glob("model*.safetensors")).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert (8 + length) % 4096 == 0
    order = sorted(header, key=lambda n: header[n]["data_offsets"][0])
    kinds = [n.rpartition(".")[2] for n in order]
    assert kinds.index("weight_scale") > max(i for i, k in enumerate(kinds) if k == "weight_packed")
    assert set(kinds[-sum(k == "weight_shape" for k in kinds) :]) == {"weight_shape"}
    assert all((8 + length + header[n]["data_offsets"][0]) % 64 == 0 for n in order if n.endswith("weight_packed"))


def test_the_small_head_lies_outside_the_index_and_is_used_on_request(int4, tmp_path):
    with safe_open(int4 / "neox_lite_head.safetensors", "pt") as head:
        assert set(head.keys()) == {"embed_out.weight_packed", "embed_out.weight_scale", "embed_out.weight_shape"}
    shared, small = open_model(int4), open_model(int4, head="int8")
    assert small.embed_out.format.name == "int8" and shared.embed_out.format.name == "dense"
    expected = shared(IDS).logits
    # 8 bits: well below 1 % of a row's range
    assert 0 < difference(small(IDS).logits, expected) < 0.02 * float(expected.abs().max())
    refused(ArgumentError, "head='fp16'", small.save_pretrained, tmp_path / "again")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_sixteen_bit_dtypes_stay_and_float32_becomes_float16(tmp_path, stored):
    written = "bfloat16" if stored == "bfloat16" else "float16"
    write_source(tmp_path / "source", getattr(torch, stored))
    convert(tmp_path / "source", tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("model*.safetensors")), "pt") as file:
        dtypes = {str(file.get_tensor(n).dtype) for n in file.keys() if not n.endswith(("packed", "shape"))}  # noqa: SIM118
    assert dtypes == {f"torch.{written}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written


def test_a_dry_run_tells_sizes_a_time_and_memory_and_writes_nothing(source, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    report, one = (convert(source, out, dry_run=True, threads=n) for n in (2, 1))
    assert report.seconds > 0 and report.peak_bytes > one.peak_bytes
    needed = report.peak_bytes
    monkeypatch.setattr("neox_lite_quant.estimate.free_memory", lambda: (1 << 40, needed - 1))
    told = f"needs {needed} bytes of memory, {needed - 1} are free"
    refused(ArgumentError, told, convert, source, out, threads=2)
    assert not out.exists()
    done = convert(source, out, threads=1, progress=lambda *counts: seen.append(counts))
    assert report.bytes_out == done.bytes_out < report.bytes_in
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_a_folder_written_before_is_replaced(source, int4):
    convert(source, int4, format="int8")
    assert open_model(int4).gpt_neox.layers[0].mlp.dense_h_to_4h.format.bits == 8
    assert verify_folder(int4) == []


def test_bad_sources_and_methods_are_refused_by_name(source, int4, tmp_path):
    refused(FormatError, "quantized already", convert, int4, tmp_path / "out")
    write_source(tmp_path / "odd", hidden_size=96, num_attention_heads=3)
    told = r"gpt_neox.layers.0.attention.query_key_value: in_features 96 .* try"
    refused(FormatError, told, convert, tmp_path / "odd", tmp_path / "out")
    refused(ArgumentError, "method is 'awq'", convert, source, tmp_path / "out", method="awq")


VALUES = [
    ("layers.1.mlp.dense_h_to_4h.weight", math.nan, r"1.mlp.dense_h_to_4h.weight, rows 0 to 255.*finite"),
    ("layers.0.mlp.dense_4h_to_h.weight", 1e30, "overflows float16"),
    ("final_layer_norm.weight", math.inf, "final_layer_norm.weight: holds values that are not finite"),
    ("embed_in.weight", 1e6, "embed_in.weight: holds values that are not finite as float16"),
]


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_values_that_cannot_be_stored_are_refused_and_leave_no_folder(tmp_path, name, value, message):
    write_source(tmp_path / "source", torch.float32)
    path = tmp_path / "source" / "model.safetensors"
    change_tensors(path, lambda tensors: tensors[f"gpt_neox.{name}"].view(-1)[3].fill_(value))
    refused(FormatError, message, convert, tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- a run that is ended, and the next one ------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    """Weight files of one module each, so that a tiny model has many."""
    monkeypatch.setattr(sys.modules["neox_lite_quant.convert"], "SHARD_BYTES", 1)


@contextlib.contextmanager
def ended_after(count):
    """End a run before its count-th weight file is opened; yields the names of those opened."""
    opened, real = [], ShardWriter.__enter__

    def enter(self):
        if len(opened) == count:
            raise KeyboardInterrupt
        opened.append(self.path.name)
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "__enter__", enter)
        yield opened


@pytest.fixture
def ended(source, tmp_path, small_shards):
    """A folder whose run ended before the fourth weight file."""
    with ended_after(3), pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    return tmp_path / "out"


def test_a_run_that_was_ended_goes_on_where_it_was_and_ends_in_the_same_bytes(source, tmp_path, small_shards):
    convert(source, tmp_path / "whole")
    count = len(list((tmp_path / "whole").glob("*.safetensors")))
    for ended in (1, count // 2, count - 1):
        folder = tmp_path / str(ended)
        with ended_after(ended), pytest.raises(KeyboardInterrupt):
            convert(source, folder)
        with ended_after(count) as opened:
            convert(source, folder)
        assert len(opened) == count - ended
        assert digests(folder) == digests(tmp_path / "whole")


@pytest.mark.parametrize("other", [{"format": "int8"}, {"group_size": 32}, {"method": "rtn"}, "source"])
def test_other_options_or_another_source_begin_anew_and_say_so(source, ended, tmp_path, caplog, other):
    options = {} if other == "source" else other
    if other == "source":
        source = tmp_path / "source"
        write_source(source, initializer_range=0.2)
    convert(source, ended, **options)
    assert "another source or other options; starting over" in caplog.text
    convert(source, tmp_path / "whole", **options)
    assert digests(ended) == digests(tmp_path / "whole")


def test_a_weight_file_that_changed_since_is_written_again(source, ended):
    flip(sorted(ended.glob("*.safetensors"))[1], -1)
    convert(source, ended)
    assert verify_folder(ended) == []


@pytest.mark.parametrize("format", ["int4", "nf4-double"])
def test_the_number_of_threads_changes_no_byte(source, tmp_path, monkeypatch, format):
    monkeypatch.setattr("neox_lite.loading.quantize.SLICE_ELEMENTS", 2048)
    for threads in (1, 2, 7):
        convert(source, tmp_path / str(threads), format=format, threads=threads)
        assert digests(tmp_path / str(threads)) == digests(tmp_path / "1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("source", "being read"),
        ("file/out", "is no folder"),
        ("link", "link to what is not there"),
        ("foreign", "did not write"),
        ("not-writable", "cannot be written to"),
    ],
)
def test_a_destination_that_cannot_be_is_said_before_any_work(source, tmp_path, monkeypatch, name, message):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "pytorch_model.bin").write_text("kept")
    if name == "not-writable":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("neox_lite_quant.calibrate.own_text", lambda *_: pytest.fail("the work began"))
    destination = source if name == "source" else tmp_path / name
    refused(CheckpointError, message, convert, source, destination, method="gptq")
    assert (tmp_path / "file").read_text() == (tmp_path / "foreign" / "pytorch_model.bin").read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()
