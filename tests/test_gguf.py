"""GGUF export: exact weights, the file's bytes, what llama.cpp is told, refusals, and llama.cpp's own logits and ids."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import SHAPE
from support.checkpoints import write_source as write_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from neox_lite import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXTokenizerFast
from neox_lite.errors import ArgumentError, CheckpointError, FormatError, ShapeError, TokenizerError
from neox_lite.formats import GroupInt, pack
from neox_lite.kernels import reference
from neox_lite_app.cli import main
from neox_lite_quant import convert, export_gguf, gguf_export, gguf_file
from neox_lite_quant.gguf_file import F16, F32, Q4_0, Q8_0, GgufTensor, write_gguf
from neox_lite_quant.gguf_tensors import blocks

IDS = [i * 7 % 131 for i in range(40)]
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
ENDS = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
pytestmark = pytest.mark.filterwarnings("ignore:.*(no tokenizer.json|NFC normalizer)")


def write_source(folder, dtype=torch.float16, **config):
    """With the one activation that llama.cpp has."""
    write_model(folder, dtype, **{"hidden_act": "gelu_fast", **config})
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def int4(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "model"
    convert(source, folder, format="int4", group_size=128)
    return folder


# -- a plain reader, the naive twin of the writer ---------------------------------------------------------------------


SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}


class Reader:
    """A GGUF file, read value by value."""

    def __init__(self, path):
        self.raw, self.at = Path(path).read_bytes(), 4
        version, tensors, keys = self.take("<I")[0], *self.take("<QQ")
        assert (self.raw[:4], version) == (b"GGUF", 3)
        self.metadata = {self.string(): self.value(self.take("<I")[0]) for _ in range(keys)}
        infos = [(self.string(), self.take(f"<{self.take('<I')[0]}Q"), *self.take("<IQ")) for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        self.tensors = {name: (kind, shape[::-1], start + offset) for name, shape, kind, offset in infos}
        assert all(offset % 32 == 0 for *_, offset in self.tensors.values())

    def take(self, form):
        found = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return found

    def string(self):
        length = self.take("<Q")[0]
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind != 9:
            return self.take(SCALARS[kind])[0]
        inner, count = self.take("<IQ")
        return [self.value(inner) for _ in range(count)]

    def decode(self, name):
        """The float32 values of a tensor, block by block as ggml documents them."""
        kind, shape, offset = self.tensors[name]
        count = int(np.prod(shape))
        if kind in (F32, F16):
            values = np.frombuffer(self.raw, "<f4" if kind == F32 else "<f2", count, offset).astype(np.float32)
        else:
            size = 18 if kind == Q4_0 else 34
            block = np.frombuffer(self.raw, np.uint8, count // 32 * size, offset).reshape(-1, size)
            scale = block[:, :2].copy().view("<f2").astype(np.float32)
            codes = block[:, 2:]
            if kind == Q4_0:  # low nibbles are elements 0 to 15, high nibbles 16 to 31
                codes = np.concatenate((codes & 15, codes >> 4), axis=1).astype(np.float32) - 8
            else:
                codes = codes.view(np.int8).astype(np.float32)
            values = codes * scale
        return values.reshape(shape)


def expected(model):
    """llama.cpp's name -> float32 array, from a model that is loaded here."""
    config, found = model.config, {}
    modules = {ours: model.get_submodule(theirs) for ours, theirs in ENDS.items()}
    for i in range(config.num_hidden_layers):
        modules |= {f"blk.{i}.{k}": model.get_submodule(f"gpt_neox.layers.{i}.{v}") for k, v in LAYER.items()}
    for name, module in modules.items():
        found[f"{name}.weight"] = module.handle.decode() if hasattr(module, "handle") else module.weight
        if getattr(module, "bias", None) is not None:
            found[f"{name}.bias"] = module.bias
    for name, tensor in found.items():
        if "attn_qkv" in name:
            heads = tensor.reshape(config.num_attention_heads, 3, config.head_dim, -1)
            found[name] = torch.cat([heads[:, part].flatten(0, 1) for part in range(3)]).reshape(tensor.shape)
    return {name: tensor.float().numpy() for name, tensor in found.items()}


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("format", "kind"), [("int4", Q4_0), ("int8", Q8_0)])
def test_quantized_weights_keep_their_exact_values(source, tmp_path, format, kind, group_size):
    convert(source, tmp_path / "model", format=format, group_size=group_size)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", head="q8_0")
    read = Reader(tmp_path / "model.gguf")
    wanted = expected(GPTNeoXForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, head="int8"))
    assert read.tensors.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(read.decode(name), values), name
    assert {read.tensors[f"blk.1.{n}.weight"][0] for n in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")} == {kind}
    assert read.tensors["output.weight"][0] == Q8_0 and read.tensors["token_embd.weight"][0] == F16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_plain_checkpoints_become_float16(tmp_path, dtype):
    write_source(tmp_path / "model", dtype)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    read, model = Reader(tmp_path / "model.gguf"), GPTNeoXForCausalLM.from_pretrained(tmp_path / "model")
    for name, values in expected(model).items():
        wanted = values if values.ndim == 1 else values.astype(np.float16).astype(np.float32)
        assert np.array_equal(read.decode(name), wanted), name


def test_tied_heads_and_missing_biases_are_written_out(tmp_path):
    write_source(tmp_path / "model", tie_word_embeddings=True, attention_bias=False)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    read = Reader(tmp_path / "model.gguf")
    assert np.array_equal(read.decode("output.weight"), read.decode("token_embd.weight"))
    assert not read.decode("blk.0.attn_qkv.bias").any() and not read.decode("blk.1.attn_output.bias").any()
    assert read.decode("blk.0.ffn_up.bias").any()


def test_bfloat16_scales_are_taken_if_float16_holds_them(tmp_path):
    write_source(tmp_path / "source", torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "model", group_size=32)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    wanted = expected(GPTNeoXForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert np.array_equal(Reader(tmp_path / "model.gguf").decode("blk.0.ffn_up.weight"), wanted["blk.0.ffn_up.weight"])


# -- golden bytes -----------------------------------------------------------------------------------------------------


def test_golden_bytes_of_a_q4_0_block():
    codes = torch.tensor([[*range(-8, 8), *range(7, -9, -1)]], dtype=torch.int8)  # elements 0 to 15 rise, 16 to 31 fall
    rows = {"weight_packed": pack(codes, 4), "weight_scale": torch.tensor([[-0.5]], dtype=torch.float16)}
    assert bytes(blocks(GroupInt(4, 32), rows)[0].tolist()).hex() == "00b8" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"


def test_golden_bytes_of_a_q8_0_block():
    codes = torch.tensor([[-128, -1, 0, 1, 127, *range(27)]], dtype=torch.int8)
    rows = {"weight_packed": pack(codes, 8), "weight_scale": torch.tensor([[1.5]], dtype=torch.float16)}
    wanted = "003e" + "80ff00017f" + bytes(range(27)).hex()
    assert bytes(blocks(GroupInt(8, 32), rows)[0].tolist()).hex() == wanted


def test_a_larger_group_repeats_its_scale():
    rows = {
        "weight_packed": pack(torch.ones(1, 256, dtype=torch.int8), 8),
        "weight_scale": torch.tensor([[1.0, -2.0]], dtype=torch.float16),
    }
    scales = blocks(GroupInt(8, 128), rows).view(8, 34)[:, :2].tolist()
    assert scales == [[0, 0x3C]] * 4 + [[0, 0xC0]] * 4


def test_golden_bytes_of_a_whole_file(tmp_path):
    tensor = GgufTensor("t", F32, (1, 2), lambda: [torch.tensor([[1.0, -2.0]]).view(torch.uint8)])
    write_gguf(tmp_path / "f.gguf", {"a": 7, "b": True, "c": 0.5, "d": "x", "e": ["y"], "f": [-1]}, [tensor])
    header = (
        b"GGUF" + bytes.fromhex("03000000 0100000000000000 0600000000000000")
        + bytes.fromhex("0100000000000000") + b"a" + bytes.fromhex("04000000 07000000")
        + bytes.fromhex("0100000000000000") + b"b" + bytes.fromhex("07000000 01")
        + bytes.fromhex("0100000000000000") + b"c" + bytes.fromhex("06000000 0000003f")
        + bytes.fromhex("0100000000000000") + b"d" + bytes.fromhex("08000000 0100000000000000") + b"x"
        + bytes.fromhex("0100000000000000") + b"e"
        + bytes.fromhex("09000000 08000000 0100000000000000 0100000000000000") + b"y"
        + bytes.fromhex("0100000000000000") + b"f"
        + bytes.fromhex("09000000 05000000 0100000000000000 ffffffff")
        # name, 2 dimensions with the row's length first, type 0, offset 0
        + bytes.fromhex("0100000000000000") + b"t"
        + bytes.fromhex("02000000 0200000000000000 0100000000000000 00000000 0000000000000000")
    )  # fmt: skip
    padding = bytes(-len(header) % 32)
    data = bytes.fromhex("0000803f 000000c0") + bytes(24)
    assert (tmp_path / "f.gguf").read_bytes() == header + padding + data


def test_the_gguf_package_reads_the_same_file(int4, tmp_path):
    peer = pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'neox-lite[peers]')")
    give_tokenizer(int4, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", head="q8_0")
    ours, theirs = Reader(tmp_path / "model.gguf"), peer.GGUFReader(tmp_path / "model.gguf")
    contents = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert contents == ours.metadata
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        found = peer.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found, ours.decode(tensor.name)), tensor.name


# -- metadata ---------------------------------------------------------------------------------------------------------


def test_the_architecture_is_told_in_full(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"rotary_pct": 0.5, "rotary_emb_base": 500, "use_parallel_residual": False, "layer_norm_eps": 1e-3}
    write_source(tmp_path / "model", rope_scaling=rope, **changes)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = Reader(tmp_path / "model.gguf").metadata
    assert found.pop("gptneox.attention.layer_norm_epsilon") == pytest.approx(1e-3)  # stored as float32
    assert found == {
        "general.architecture": "gptneox",
        "general.name": "model",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "gptneox.context_length": 256,
        "gptneox.embedding_length": 128,
        "gptneox.block_count": 2,
        "gptneox.feed_forward_length": 256,
        "gptneox.vocab_size": 131,
        "gptneox.attention.head_count": 4,
        "gptneox.use_parallel_residual": False,
        "gptneox.rope.dimension_count": 16,
        "gptneox.rope.freq_base": 500.0,
        "gptneox.neox_lite.hidden_act": "gelu_fast",
        "gptneox.rope.scaling.type": "yarn",
        "gptneox.rope.scaling.factor": 4.0,
        "gptneox.rope.scaling.original_context_length": 64,
        "tokenizer.ggml.model": "no_vocab",
    }


def give_tokenizer(source, folder, model=None, split=None, added=("   ",)):
    """A copy of a model's folder with a small tokenizer of this family's kind."""
    if source is not None:
        shutil.copytree(source, folder)
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.normalizer = decoders.ByteLevel(), normalizers.NFC()
    if model is None:
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer.train_from_iterator(["the theory of thick things, then: 3 of them\n"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_the_vocabulary_is_that_of_tokenizer_json(source, tmp_path):
    with pytest.warns(UserWarning, match="does not apply the tokenizer's NFC normalizer"):
        size = give_tokenizer(source, tmp_path / "model").get_vocab_size()
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in Reader(tmp_path / "model.gguf").metadata.items()
        if k.startswith("tokenizer")
    }
    stored = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert (found["model"], found["pre"]) == ("gpt2", "olmo")
    assert len(found["tokens"]) == len(found["token_type"]) == 131
    ids = stored["model"]["vocab"] | {token["content"]: token["id"] for token in stored["added_tokens"]}
    assert found["tokens"][:size] == sorted(ids, key=ids.get)
    assert found["tokens"][size:] == [f"[PAD{i}]" for i in range(size, 131)]
    assert found["token_type"] == [3] + [1] * (size - 2) + [4] + [5] * (131 - size)  # control, normal, added, unused
    assert found["merges"] == [" ".join(m) for m in stored["model"]["merges"]]
    assert (found["bos_token_id"], found["eos_token_id"], found["add_bos_token"]) == (0, 0, False)


@pytest.mark.parametrize(("act", "warned"), [("gelu", True), ("gelu_new", False), ("gelu_pytorch_tanh", False)])
def test_an_activation_that_llama_cpp_lacks_is_announced(tmp_path, act, warned, recwarn):
    write_source(tmp_path / "model", hidden_act=act)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert any("exact GELU" in str(w.message) for w in recwarn) == warned


def test_a_folder_without_tokenizer_is_announced(source, tmp_path):
    with pytest.warns(UserWarning, match=r"no tokenizer.json; llama.cpp will have ids but no text"):
        export_gguf(source, tmp_path / "model.gguf")


# -- the writer -------------------------------------------------------------------------------------------------------


def test_slices_of_any_size_give_the_same_bytes(int4, tmp_path, monkeypatch):
    export_gguf(int4, tmp_path / "one.gguf", head="q8_0")
    monkeypatch.setattr(gguf_export, "SLICE_ELEMENTS", 1000)
    export_gguf(int4, tmp_path / "two.gguf", head="q8_0")
    assert (tmp_path / "one.gguf").read_bytes()[32:] == (tmp_path / "two.gguf").read_bytes()[32:]


def test_progress_ends_at_its_total(int4, tmp_path):
    seen = []
    report = export_gguf(int4, tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert report.bytes_out == (tmp_path / "m.gguf").stat().st_size
    assert report.bytes_in == sum(p.nbytes for p in GPTNeoXForCausalLM.from_pretrained(int4).state_dict().values())


def test_nothing_is_ever_replaced(source, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    for taken in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="exists already; delete it or choose another name"):
            export_gguf(source, taken)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_full_disk_is_found_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "free_bytes", lambda path: 1000)
    with pytest.raises(CheckpointError, match=r"needs [0-9]+ bytes, 1000 are free; choose another folder"):
        export_gguf(source, tmp_path / "new" / "m.gguf")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_export_leaves_nothing(source, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, tmp_path / "new" / "m.gguf", progress=interrupt)
    assert list((tmp_path / "new").iterdir()) == []


def test_data_of_another_size_than_announced_is_refused(tmp_path):
    tensor = GgufTensor("t", F32, (3,), lambda: [torch.ones(2).view(torch.uint8)])
    with pytest.raises(ShapeError, match="t: 8 bytes, expected 12"):
        write_gguf(tmp_path / "m.gguf", {}, [tensor])
    with pytest.raises(ShapeError, match="rows of 48 weights, expected a multiple of 32"):
        write_gguf(tmp_path / "m.gguf", {}, [GgufTensor("t", Q8_0, (2, 48), list)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1 << 32, -1, 1e300, "\ud800", ["a", "\udfff"], [1 << 31]])
def test_metadata_that_a_file_cannot_hold_is_refused_by_name(tmp_path, value):
    with pytest.raises(FormatError, match=r"some\.key: .* cannot be written to a GGUF file"):
        write_gguf(tmp_path / "m.gguf", {"some.key": value}, [])


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_scales_that_float16_cannot_hold_are_refused(tmp_path):
    write_source(tmp_path / "source", torch.bfloat16, initializer_range=1e-4)  # int8 scales near 1e-6
    convert(tmp_path / "source", tmp_path / "model", format="int8", group_size=32)
    message = r"layers.0.attention.query_key_value.weight_packed, rows 0 to 31: a scale of .* is not a float16 number"
    with pytest.raises(FormatError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_values_that_overflow_float16_are_refused(tmp_path):
    model = GPTNeoXForCausalLM.from_pretrained(write_source(tmp_path / "source", torch.float32))
    model.gpt_neox.embed_in.weight[5, 5] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FormatError, match=r"embed_in.weight, rows 0 to 130: .*not finite as float16"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "llama3", "factor": 2.0, **LLAMA3}, "rope_type 'llama3': llama.cpp's gptneox cannot compute it"),
        ({**YARN, "beta_fast": 16}, "rope_type 'yarn' with beta_fast: llama.cpp"),
        ({**YARN, "attention_factor": 1.0, "mscale": 1.0}, "with attention_factor, mscale"),
    ],
)
def test_rotary_forms_that_llama_cpp_lacks_are_refused(tmp_path, rope, message):
    write_source(tmp_path / "model", rope_scaling=rope)
    with pytest.raises(FormatError, match=message):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")


def test_tokenizers_of_another_kind_are_refused(source, tmp_path):
    give_tokenizer(source, tmp_path / "model", model=models.Unigram([("a", 0.0)]), split=pre_tokenizers.Metaspace())
    with pytest.raises(FormatError, match=r"a Unigram model after Metaspace splitting.*needs byte-level BPE"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    give_tokenizer(None, tmp_path / "model", added=[f"word{i}" for i in range(131)])
    with pytest.raises(TokenizerError, match=r"has id [0-9]+, but the model has 131 ids"):
        export_gguf(tmp_path / "model", tmp_path / "m.gguf")


def test_what_is_no_language_model_or_has_no_small_head_is_refused(source, int4, tmp_path):
    with pytest.raises(ArgumentError, match=r"has no neox_lite_head.safetensors; head='q8_0' is for"):
        export_gguf(source, tmp_path / "m.gguf", head="q8_0")
    with pytest.raises(ArgumentError, match="head is 'q4_0', expected 'f16' or 'q8_0'"):
        export_gguf(int4, tmp_path / "m.gguf", head="q4_0")
    write_source(tmp_path / "classifier", cls=GPTNeoXForSequenceClassification)
    with pytest.raises(ArgumentError, match=r"is a GPTNeoXForSequenceClassification; llama.cpp"):
        export_gguf(tmp_path / "classifier", tmp_path / "m.gguf")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_file_and_tells_its_size(int4, tmp_path, capsys):
    out = tmp_path / "m.gguf"
    assert main(["export", str(int4), str(out), "--to", "gguf", "--head", "q8_0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["destination"] == str(out) and told["bytes_out"] == out.stat().st_size
    assert told.keys() == {"destination", "bytes_in", "bytes_out", "seconds", "peak_bytes"}
    assert main(["export", str(int4), str(out)]) == 1
    assert capsys.readouterr().err.count("exists already") == 1
    with pytest.raises(SystemExit) as usage:
        main(["export", str(int4), str(out), "--to", "onnx"])
    assert usage.value.code == 2


# -- llama.cpp itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    reason = "llama-cpp-python is not installed (pip install 'neox-lite[peers]' builds it, which takes minutes)"
    module = pytest.importorskip("llama_cpp", reason=reason)
    silent = module.llama_log_callback(lambda *_: None)
    module.llama_log_set(silent, None)
    yield module
    assert silent  # kept alive as long as the library may call it


def llama_logits(llama, path, repack):
    """Logits (tokens, vocabulary) of IDS, with float32 keys and values."""
    options = llama.llama_model_default_params()
    options.use_extra_bufts = repack
    model = llama.llama_model_load_from_file(str(path).encode(), options)
    assert model, "llama.cpp did not open the file"
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch, options.type_k, options.type_v = 64, 1, 1, 0, 0
    context = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    try:
        assert llama.llama_decode(context, batch) == 0
        return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(IDS), SHAPE["vocab_size"])).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)


VARIANTS = {
    "parallel": {},
    "sequential-rotary100": {"use_parallel_residual": False, "rotary_pct": 1.0},
    "tied-no-attention-bias": {"tie_word_embeddings": True, "attention_bias": False},
    "rotary-base-500": {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    "rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope-yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_logits_from_a_plain_checkpoint(llama_cpp, tmp_path, variant):
    write_source(tmp_path / "model", **VARIANTS[variant])
    export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model.ops = reference
    wanted = model(torch.tensor([IDS])).logits[0].numpy()
    found = llama_logits(llama_cpp, tmp_path / "m.gguf", repack=True)
    assert (
        np.abs(found - wanted).max() < 0.006 * wanted.std()
    )  # llama.cpp rounds inputs of a product to float16: 0.0027


@pytest.mark.parametrize("repack", [True, False], ids=["repacked", "as-stored"])
@pytest.mark.parametrize(
    ("format", "group_size", "head"), [("int4", 32, "f16"), ("int4", 128, "q8_0"), ("int8", 64, "q8_0")]
)
def test_llama_cpp_computes_the_same_logits_from_a_quantized_folder(
    llama_cpp, source, tmp_path, format, group_size, head, repack
):
    convert(source, tmp_path / "model", format=format, group_size=group_size)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", head=head)
    small = {"f16": "fp16", "q8_0": "int8"}[head]
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, head=small)
    model.ops = reference
    wanted = model(torch.tensor([IDS])).logits[0].numpy()
    error = llama_logits(llama_cpp, tmp_path / "m.gguf", repack) - wanted
    # Its products round each 32 inputs to int8: half a step of max/127 is 0.5 % of the rms, and a layer has four of them.
    assert np.sqrt((error**2).mean()) < 0.02 * wanted.std() and np.abs(error).max() < 0.1 * wanted.std()


def test_llama_cpp_splits_text_as_the_tokenizer_does(llama_cpp, tmp_path, shared_data):
    write_source(tmp_path / "model", vocab_size=50432, hidden_size=32, num_attention_heads=1)
    shutil.copy(shared_data / "20B_tokenizer.json", tmp_path / "model" / "tokenizer.json")
    export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(tmp_path / "model")
    peer = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    text = (shared_data / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:50000]
    text += "  a    b\n\n\tc   <|endoftext|> é 日本 🚀\u200d 3333 don't I'LL" + " " * 30 + "x"
    ids = tokenizer.encode(text)
    assert peer.tokenize(text.encode(), add_bos=True, special=True) == ids
    assert peer.detokenize(ids, special=True).decode() == text
    assert (peer.token_bos(), peer.token_eos()) == (0, 0)


def test_llama_cpp_opens_a_file_without_texts(llama_cpp, source, tmp_path):
    export_gguf(source, tmp_path / "m.gguf")
    peer = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    peer.eval(IDS)
    assert peer.n_tokens == len(IDS) and peer.n_vocab() == 131
