"""GGUF import: exact weights back, the tokenizer, other tools' files, refusals, hostile headers, and llama.cpp's tokens."""

import json
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from support.checkpoints import digests
from support.commands import run_python
from support.often import times
from test_gguf import IDS, Reader, expected, give_tokenizer, llama_cpp, write_source  # noqa: F401 - a fixture
from tokenizers import processors

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import ArgumentError, CheckpointError, ConfigError, FormatError, TokenizerError
from neox_lite_app.cli import main
from neox_lite_quant import convert, export_gguf, gguf_import, import_gguf
from neox_lite_quant.gguf_file import BF16, F16, F32, Q4_0, Q8_0, GgufFile, GgufTensor, write_gguf
from neox_lite_quant.gguf_tensors import blocks, from_blocks, own_name, places

pytestmark = pytest.mark.filterwarnings("ignore:.*(no tokenizer.json|NFC normalizer|not restored)")
INPUT = torch.tensor([IDS])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """A plain float16 GGUF file."""
    path = tmp_path_factory.mktemp("plain") / "m.gguf"
    export_gguf(source, path)
    return path


def logits(folder, **options):
    return GPTNeoXForCausalLM.from_pretrained(folder, exact=True, **options)(INPUT).logits


def tensors_of(folder):
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def rewritten(path, out, metadata=None, without=(), data=None):
    """The file once more, with other metadata (None drops a key), without some tensors, with others in their place."""
    file = GgufFile(path)
    metadata = {k: v for k, v in {**file.metadata, **(metadata or {})}.items() if v is not None}
    kept = [t for name, t in file.tensors.items() if name not in without and name not in (data or {})]
    tensors = [GgufTensor(t.name, t.kind, t.shape, lambda t=t: [file.rows(t.name).clone()]) for t in kept]
    tensors += [GgufTensor(n, kind, shape, lambda raw=raw: [raw]) for n, (kind, shape, raw) in (data or {}).items()]
    write_gguf(out, metadata, tensors)
    return out


def as_blocks(weight, bits):
    """A float matrix as (kind, shape, bytes) of Q4_0 or Q8_0."""
    from neox_lite.formats import GroupInt

    format = GroupInt(bits, 32)
    rows = format.encode(weight, torch.float16, "rtn")
    return {4: Q4_0, 8: Q8_0}[bits], tuple(weight.shape), blocks(format, rows)


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_quantized_folder_comes_back_with_identical_logits(source, tmp_path, format, group_size):
    convert(source, tmp_path / "there", format=format, group_size=group_size)
    export_gguf(tmp_path / "there", tmp_path / "m.gguf")
    report = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "there"))
    assert verify_folder(tmp_path / "back") == []
    there, back = tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back")
    assert report.bytes_out == sum(t.nbytes for t in back.values())
    for name, tensor in there.items():
        if name.endswith("weight_scale"):
            tensor = tensor.repeat_interleave(group_size // 32, dim=1)
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    if group_size == 32:
        assert GPTNeoXConfig.from_pretrained(tmp_path / "back").to_dict() == {
            **GPTNeoXConfig.from_pretrained(tmp_path / "there").to_dict(),
            **{"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02},
        }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu"},
        {"tie_word_embeddings": True, "attention_bias": False},
        {"rotary_emb_base": 500, "rotary_pct": 0.5, "layer_norm_eps": 1e-3},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    ],
    ids=["parallel", "sequential-erf", "tied", "rotary", "linear", "yarn"],
)
def test_a_plain_checkpoint_comes_back_with_identical_logits(tmp_path, changes):
    write_source(tmp_path / "there", **changes)
    export_gguf(tmp_path / "there", tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "there"))
    there, back = (GPTNeoXConfig.from_pretrained(tmp_path / name).to_dict() for name in ("there", "back"))
    same = back.keys() - {"bos_token_id", "eos_token_id", "initializer_range", "attention_bias"}
    assert {k: back[k] for k in same} == {k: there[k] for k in same}


def test_an_int8_head_comes_back_as_it_was(source, tmp_path, recwarn):
    convert(source, tmp_path / "there", format="int4", group_size=32)
    export_gguf(tmp_path / "there", tmp_path / "m.gguf", head="q8_0")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert any("1 tensors are rounded to float16 (embed_out.weight)" in str(w.message) for w in recwarn)
    assert torch.equal(logits(tmp_path / "back", head="int8"), logits(tmp_path / "there", head="int8"))
    recwarn.clear()
    import_gguf(tmp_path / "m.gguf", tmp_path / "exact", dtype="float32")
    wanted = logits(tmp_path / "there", head="int8", dtype=torch.float32)
    assert torch.allclose(logits(tmp_path / "exact"), wanted, rtol=0, atol=1e-5)  # another kernel, the same numbers
    assert not any("rounded" in str(w.message) for w in recwarn)


def test_blocks_are_undone_for_every_code():
    generator = torch.Generator().manual_seed(0)
    for kind, size in ((Q4_0, 18), (Q8_0, 34)):
        raw = torch.randint(0, 256, (64, 3 * size), dtype=torch.uint8, generator=generator)
        raw.view(64, 3, size)[..., 1] &= 0x3B  # scales that are numbers
        bits = 4 if kind == Q4_0 else 8
        from neox_lite.formats import GroupInt

        found = {key: make() for key, make in from_blocks(kind, raw).items()}
        assert torch.equal(blocks(GroupInt(bits, 32), found), raw)


def test_rows_of_heads_are_put_back_slice_by_slice():
    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    from neox_lite_quant.gguf_tensors import by_part

    written = torch.cat([torch.arange(start, stop) for start, stop in by_part(config)])
    back = torch.cat([written[places(config, start, start + 7)] for start in range(0, 189, 7)])
    assert back.tolist() == list(range(189))


def test_slices_of_any_size_give_the_same_folder(plain, tmp_path, monkeypatch):
    import_gguf(plain, tmp_path / "one")
    monkeypatch.setattr(gguf_import, "SLICE_ELEMENTS", 1000)
    import_gguf(plain, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


# -- the tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = ["the   theory of thick things: 3  of them<|endoftext|>x", "e\u0301 \u4e16 \U0001f680 ", "", "  \n\t"]


@pytest.mark.parametrize("rebuilt", [False, True], ids=["as-stored", "rebuilt"])
def test_the_tokenizer_comes_back(source, tmp_path, rebuilt):
    give_tokenizer(source, tmp_path / "there", added=("   ", "[theory]"))
    (tmp_path / "there" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    path = tmp_path / "m.gguf"
    export_gguf(tmp_path / "there", path)
    if rebuilt:  # as files of others, without tokenizer.json
        path = rewritten(path, tmp_path / "n.gguf", {"tokenizer.huggingface.json": None})
    import_gguf(path, tmp_path / "back")
    there, back = (GPTNeoXTokenizerFast.from_pretrained(tmp_path / name) for name in ("there", "back"))
    for text in TEXTS:
        ids = there.encode(text)
        assert back.encode(text) == ids and back.decode(ids) == there.decode(ids)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "all_special_ids"):
        assert getattr(back, name) == getattr(there, name), name
    assert back.get_vocab() == there.get_vocab()
    assert (GPTNeoXConfig.from_pretrained(tmp_path / "back").eos_token_id, there.eos_token_id) == (0, 0)


@pytest.mark.parametrize("rebuilt", [False, True], ids=["as-stored", "rebuilt"])
def test_tokens_around_every_text_come_back(source, tmp_path, rebuilt):
    tokenizer = give_tokenizer(source, tmp_path / "there")
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(tmp_path / "there" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>"}
    (tmp_path / "there" / "tokenizer_config.json").write_text(json.dumps(settings))
    path = tmp_path / "m.gguf"
    export_gguf(tmp_path / "there", path)
    if rebuilt:
        path = rewritten(path, tmp_path / "n.gguf", {"tokenizer.huggingface.json": None})
    import_gguf(path, tmp_path / "back")
    found = GPTNeoXTokenizerFast.from_pretrained(tmp_path / "back").encode("the")
    assert found == [0, *tokenizer.encode("the").ids[1:]]


def test_the_20b_tokenizer_comes_back(tmp_path, shared_data):
    write_source(tmp_path / "there", vocab_size=50432, hidden_size=32, num_attention_heads=1)
    text = (shared_data / "20B_tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "there" / "tokenizer.json").write_text(text, encoding="utf-8")
    export_gguf(tmp_path / "there", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "n.gguf", {"tokenizer.huggingface.json": None})
    there = GPTNeoXTokenizerFast.from_pretrained(tmp_path / "there")
    sample = (shared_data / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:50000]
    sample += "\n\n\t    é 日本 <|endoftext|>"
    for path in (tmp_path / "m.gguf", tmp_path / "n.gguf"):
        import_gguf(path, tmp_path / path.stem)
        back = GPTNeoXTokenizerFast.from_pretrained(tmp_path / path.stem)
        assert back.encode(sample) == there.encode(sample)
        assert back.decode(there.encode(sample)) == there.decode(there.encode(sample))
        ours, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (back, there))
        for part in ("model", "normalizer", "added_tokens"):
            assert ours[part] == theirs[part]


def test_a_tokenizer_of_another_kind_is_left_out_and_said(plain, tmp_path):
    path = rewritten(plain, tmp_path / "m.gguf", {"tokenizer.ggml.model": "llama"})
    with pytest.warns(UserWarning, match=r"of the kind 'llama', which is not restored; copy the tokenizer's files"):
        import_gguf(path, tmp_path / "back")
    assert not (tmp_path / "back" / "tokenizer.json").exists()


GOOD = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a"] * 2}, "names a token twice"),
        ({"tokens": [str(i) for i in range(200)]}, "not lists of one length and at most 131 entries"),
        ({"tokens": "ab"}, "not lists"),
        ({"tokens": [1, 2]}, "something else than texts"),
        ({"token_type": [1]}, "not lists of one length"),
        ({"merges": ["a c"]}, "make no tokenizer"),
        ({"merges": ["ab"]}, "make no tokenizer"),
        ({"merges": 7}, "make no tokenizer"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected olmo"),
        ({"add_space_prefix": True}, "add_space_prefix is set"),
        ({"eos_token_id": 9}, "eos_token_id is 9, which no token has"),
        ({"padding_token_id": True}, "pad_token_id is True|padding_token_id is True"),
        ({"unknown_token_id": [1]}, r"unknown_token_id is \[1\], which no token has"),
        ({"add_bos_token": True}, "make no tokenizer"),
        ({"token_type": [1, 5, 4]}, "make no tokenizer|leaves ids out"),
        ({"whole": "{}"}, "is not a tokenizer.json"),
    ],
)
def test_vocabularies_that_make_no_sense_are_refused(plain, tmp_path, changes, message):
    changes = {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    if "tokenizer.ggml.whole" in changes:
        changes = {"tokenizer.huggingface.json": changes["tokenizer.ggml.whole"]}
    path = rewritten(plain, tmp_path / "m.gguf", {**GOOD, **changes})
    with pytest.raises((TokenizerError, ConfigError), match=message):
        import_gguf(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tokenizer_json_of_another_vocabulary_is_refused(source, tmp_path):
    give_tokenizer(source, tmp_path / "there")
    export_gguf(tmp_path / "there", tmp_path / "m.gguf")
    tokens = GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]
    tokens[5], tokens[6] = tokens[6], tokens[5]
    path = rewritten(tmp_path / "m.gguf", tmp_path / "n.gguf", {"tokenizer.ggml.tokens": tokens})
    with pytest.raises(TokenizerError, match="are different vocabularies"):
        import_gguf(path, tmp_path / "back")


# -- files of other tools ---------------------------------------------------------------------------------------------


def test_mixed_types_become_mixed_formats(plain, source, tmp_path):
    model = GPTNeoXForCausalLM.from_pretrained(source)
    up, down = model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight, model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight
    data = {"blk.0.ffn_up.weight": as_blocks(up, 4), "blk.1.ffn_down.weight": as_blocks(down, 8)}
    import_gguf(rewritten(plain, tmp_path / "m.gguf", data=data), tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    found = {n: m.format.name for n, m in back.gpt_neox.layers.named_modules() if hasattr(m, "format")}
    assert found.pop("0.mlp.dense_h_to_4h") == "int4" and found.pop("1.mlp.dense_4h_to_h") == "int8"
    assert set(found.values()) == {"dense"} and len(found) == 6
    read, wanted = Reader(tmp_path / "m.gguf"), expected(back)
    for name in data:
        assert np.array_equal(read.decode(name), wanted[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_vocabulary_becomes_plain_and_says_what_is_rounded(plain, source, tmp_path, bits):
    model = GPTNeoXForCausalLM.from_pretrained(source)
    data = {
        "token_embd.weight": as_blocks(model.gpt_neox.embed_in.weight, bits),
        "output.weight": as_blocks(model.embed_out.weight, bits),
    }
    path = rewritten(plain, tmp_path / "m.gguf", data=data)
    with pytest.warns(UserWarning, match=r"2 tensors are rounded to float16 .*--dtype float32 keeps"):
        import_gguf(path, tmp_path / "half")
    import_gguf(path, tmp_path / "single", dtype="float32")
    read, stored = Reader(path), tensors_of(tmp_path / "single")
    assert np.array_equal(stored["gpt_neox.embed_in.weight"].numpy(), read.decode("token_embd.weight"))
    assert np.array_equal(stored["embed_out.weight"].numpy(), read.decode("output.weight"))
    assert (tmp_path / "half" / "neox_lite_head.safetensors").exists() == (bits == 8)
    assert GPTNeoXForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


@pytest.mark.parametrize(("kind", "dtype"), [(F32, torch.float32), (BF16, torch.bfloat16)], ids=["f32", "bf16"])
def test_plain_types_keep_their_numbers(plain, tmp_path, kind, dtype):
    read = Reader(plain)
    data = {}
    for name in (n for n, (_, shape, _) in read.tensors.items() if len(shape) == 2):
        weight = torch.from_numpy(read.decode(name)).to(dtype)
        data[name] = (kind, tuple(weight.shape), weight.view(torch.uint8))
    vectors = {n: torch.from_numpy(read.decode(n)).to(dtype).float() for n in read.tensors if n not in data}
    data |= {n: (F32, tuple(v.shape), v.view(torch.uint8)) for n, v in vectors.items()}
    import_gguf(rewritten(plain, tmp_path / "m.gguf", data=data), tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == dtype
    assert all(np.array_equal(values, data_of(data, name)) for name, values in expected(back).items())


def data_of(data, name):
    kind, shape, raw = data[name]
    return raw.view(torch.float32 if kind == F32 else torch.bfloat16).float().view(shape).numpy()


def test_the_activation_is_asked_for_where_the_file_does_not_say_it(plain, tmp_path):
    path = rewritten(plain, tmp_path / "m.gguf", {"gptneox.neox_lite.hidden_act": None})
    with pytest.warns(UserWarning, match=r"does not say which GELU .*--hidden-act gelu is the other one"):
        import_gguf(path, tmp_path / "one")
    import_gguf(path, tmp_path / "two", hidden_act="gelu")
    acts = [GPTNeoXConfig.from_pretrained(tmp_path / name).hidden_act for name in ("one", "two")]
    assert acts == ["gelu_fast", "gelu"]


def test_an_older_version_and_another_alignment_are_read(plain, tmp_path):
    raw = bytearray(plain.read_bytes())
    raw[4] = 2
    (tmp_path / "m.gguf").write_bytes(raw)
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    path = rewritten(plain, tmp_path / "n.gguf", {"general.alignment": 8})  # 32 is a multiple of it
    assert GgufFile(path).tensors.keys() == GgufFile(plain).tensors.keys()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llama"}, "general.architecture is llama, expected gptneox"),
        ({"general.architecture": 7}, "general.architecture is 7"),
        ({"gptneox.block_count": None}, "has no gptneox.block_count; convert the checkpoint again"),
        ({"gptneox.block_count": 3}, "block_count is 3, but there are tensors of 2 blocks"),
        ({"gptneox.block_count": [2]}, "block_count is"),
        ({"gptneox.vocab_size": 132}, r"embed_in.weight is \[131, 128\], expected \[132, 128\]"),
        ({"gptneox.attention.head_count": 3}, "hidden_size 128 is not divisible by num_attention_heads 3"),
        ({"gptneox.attention.head_count": 0}, "num_attention_heads is 0"),
        ({"gptneox.attention.head_count": 1 << 30}, "num_attention_heads"),
        ({"gptneox.embedding_length": "x"}, "hidden_size is 'x'"),
        ({"gptneox.context_length": (1 << 32) - 1}, "max_position_embeddings"),
        ({"gptneox.feed_forward_length": 64}, r"dense_h_to_4h.bias is \[256\]"),
        ({"gptneox.rope.dimension_count": 64}, "rope.dimension_count is 64, expected 2 to 32"),
        ({"gptneox.rope.dimension_count": 3}, "rotary dimensions, expected an even number"),
        ({"gptneox.rope.freq_base": 0.0}, "rope_theta"),
        ({"gptneox.rope.freq_base": float("nan")}, "rope_theta"),
        ({"gptneox.rope.scaling.type": "longrope"}, "rope_type 'longrope'"),
        ({"gptneox.rope.scaling.type": ["x"]}, "rope_type"),
        ({"gptneox.rope.scaling.type": "linear"}, "needs factor"),
        ({"gptneox.rope.scaling.finetuned": True}, "rope.scaling.finetuned is not part of GPT-NeoX"),
        ({"gptneox.attention.head_count_kv": 2}, "attention.head_count_kv is not part"),
        ({"gptneox.attention.layer_norm_epsilon": "x"}, "layer_norm_eps is 'x'"),
        ({"gptneox.neox_lite.hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"gptneox.use_parallel_residual": 1}, "use_parallel_residual is 1"),
        ({"split.count": 3}, "one part of several; join them first: llama-gguf-split --merge"),
        ({"general.alignment": 48}, "general.alignment is 48, expected a power of two"),
        ({"general.alignment": 0}, "general.alignment is 0"),
        ({"general.alignment": 4}, "general.alignment is 4"),
    ],
)
def test_metadata_of_something_else_is_refused(plain, tmp_path, changes, message):
    path = rewritten(plain, tmp_path / "m.gguf", changes)
    with pytest.raises((FormatError, ConfigError, CheckpointError), match=message):
        import_gguf(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("kind", "size", "name"), [(12, 144, "Q4_K"), (14, 210, "Q6_K"), (3, 640, "Q4_1"), (99, 32, "type 99")]
)
def test_types_without_an_exact_form_are_refused_by_name(plain, tmp_path, kind, size, name):
    raw = bytearray(plain.read_bytes())
    at = raw.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    assert struct.unpack_from("<I", raw, at) == (F16,)
    struct.pack_into("<I", raw, at, kind)
    (tmp_path / "m.gguf").write_bytes(raw)
    message = rf"has {name} \(blk.1.ffn_up.weight\), which no format here holds exactly; make a file of Q4_0.*--pure"
    with pytest.raises(FormatError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "back")


def test_tensors_of_something_else_are_refused(plain, tmp_path):
    one = (F32, (4,), torch.ones(4).view(torch.uint8))
    path = rewritten(plain, tmp_path / "a.gguf", data={"blk.0.attn_q.weight": one})
    with pytest.raises(FormatError, match=r"GPT-NeoX has no tensor blk.0.attn_q.weight"):
        import_gguf(path, tmp_path / "back")
    path = rewritten(plain, tmp_path / "b.gguf", without=["blk.0.ffn_up.weight"])
    with pytest.raises(CheckpointError, match=r"missing: gpt_neox.layers.0.mlp.dense_h_to_4h.weight"):
        import_gguf(path, tmp_path / "back")
    path = rewritten(plain, tmp_path / "c.gguf", without=["token_embd.weight"])
    with pytest.raises(CheckpointError, match=r"missing: gpt_neox.embed_in.weight"):
        import_gguf(path, tmp_path / "back")
    assert own_name("blk.01.ffn_up.weight") is own_name("ffn_up.weight") is own_name("blk.1.output.weight") is None


def test_numbers_that_are_none_are_refused(plain, source, tmp_path):
    layer = GPTNeoXForCausalLM.from_pretrained(source).gpt_neox.layers[0]
    kind, shape, raw = as_blocks(layer.mlp.dense_h_to_4h.weight, 4)
    raw[3, :2] = torch.tensor([0, 0x7C])  # infinity
    path = rewritten(plain, tmp_path / "m.gguf", data={"blk.0.ffn_up.weight": (kind, shape, raw)})
    with pytest.raises(FormatError, match=r"dense_h_to_4h.weight_scale: holds values that are not finite as float16"):
        import_gguf(path, tmp_path / "back")
    big = torch.full((128,), 1e6)
    path = rewritten(plain, tmp_path / "n.gguf", data={"output_norm.bias": (F32, (128,), big.view(torch.uint8))})
    with pytest.raises(FormatError, match=r"final_layer_norm.bias: holds values that are not finite as float16"):
        import_gguf(path, tmp_path / "back")
    assert not (tmp_path / "back" / "config.json").exists()
    with pytest.raises(ArgumentError, match=r"bfloat16, which cannot hold the file's scales"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "back", dtype="bfloat16")


def test_what_is_no_gguf_file_is_refused(plain, tmp_path):
    (tmp_path / "text").write_text("GGML is not GGUF, and this is long enough to be read")
    for name, message in {"text": "not a GGUF", "none": "cannot be read: No such", "": "not a regular file"}.items():
        with pytest.raises(CheckpointError, match=message):
            import_gguf(tmp_path / name, tmp_path / "back")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="holds a model that neox-lite did not write"):
        import_gguf(plain, tmp_path / "mine")


# -- hostile files ----------------------------------------------------------------------------------------------------


def string(text):
    return struct.pack("<Q", len(text)) + text


def header(version=3, tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def info(name=b"t", shape=(32,), kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = (1 << 64) - 1
HOSTILE = {
    "only-magic": (b"GGUF", "not a GGUF file"),
    "version-1": (header(1), "version 1 is not 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless-tensors": (header(tensors=HUGE), "tensors and 0 keys, more than"),
    "endless-keys": (header(keys=HUGE), "keys, more than"),
    "endless-key": (header(keys=1, body=struct.pack("<Q", HUGE)), "its header wants"),
    "key-past-the-end": (header(keys=1, body=struct.pack("<Q", 64) + b"short"), "its header wants 64 bytes"),
    "no-utf-8": (header(keys=1, body=string(b"\xff\xfe") + struct.pack("<IB", 0, 1)), "is not UTF-8"),
    "unknown-value": (header(keys=1, body=string(b"a") + struct.pack("<I", 77)), "of the unknown type 77"),
    "endless-array": (header(keys=1, body=string(b"a") + struct.pack("<IIQ", 9, 0, HUGE)), "too long"),
    "endless-strings": (header(keys=1, body=string(b"a") + struct.pack("<IIQ", 9, 8, 1 << 19)), "its header wants"),
    "nested-array": (header(keys=1, body=string(b"a") + struct.pack("<IIQ", 9, 9, 1)), "of another type"),
    "key-twice": (header(keys=2, body=2 * (string(b"a") + struct.pack("<IB", 0, 1))), "a appears twice"),
    "tensor-twice": (header(tensors=2, body=info() + info(offset=128) + bytes(512)), "a tensor appears twice"),
    "no-dimension": (header(tensors=1, body=info(shape=())), "0 dimensions"),
    "many-dimensions": (header(tensors=1, body=info(shape=(1,) * 9)), "9 dimensions"),
    "empty-dimension": (header(tensors=1, body=info(shape=(0,)) + bytes(64)), "no empty dimension"),
    "overflowing-shape": (header(tensors=1, body=info(shape=(HUGE, HUGE)) + bytes(64)), "truncated"),
    "half-a-block": (header(tensors=1, body=info(shape=(48,), kind=Q4_0) + bytes(64)), "rows of a multiple of 32"),
    "odd-offset": (header(tensors=1, body=info(offset=4) + bytes(256)), "offset of a multiple of 32"),
    "far-offset": (header(tensors=1, body=info(offset=1 << 62) + bytes(256)), "truncated"),
    "truncated-data": (header(tensors=1, body=info() + bytes(64)), "truncated"),
    "overlap": (
        header(tensors=2, body=info() + info(b"u", offset=96) + bytes(512)),
        "u begins at byte [0-9]+, inside of another tensor",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path, case):
    raw, message = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with a tokenizer, of a few KB of header."""
    folder = tmp_path_factory.mktemp("small")
    write_source(folder / "model", hidden_size=32, num_attention_heads=1, num_hidden_layers=1, intermediate_size=32)
    give_tokenizer(None, folder / "model")
    export_gguf(folder / "model", folder / "m.gguf")
    return folder / "m.gguf"


def test_every_truncation_is_refused(small, tmp_path):
    raw, path = small.read_bytes(), tmp_path / "m.gguf"
    lengths = {*range(0, 600, 7), *random.Random(0).sample(range(len(raw) - 32), times(100))}
    for length in sorted(lengths):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            GgufFile(path)


def test_mutated_headers_end_in_a_model_or_a_sentence(small, tmp_path):
    """Anything but a NeoxLiteError, or a folder that is whole, fails; each is tried under a limit of memory."""
    count = times(120)
    out = run_python(MUTATE, small, tmp_path, count)
    assert out.returncode == 0, out.stderr[-2000:]
    refused, taken = map(int, out.stdout.split())
    assert refused + taken == count and refused > count / 3


MUTATE = """
import random, resource, sys, time, warnings
from pathlib import Path
import torch
from neox_lite.errors import NeoxLiteError
from neox_lite_quant import import_gguf
warnings.simplefilter("ignore")
source, home, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
raw = source.read_bytes()
end = raw.index(b"output.weight") + 60
import_gguf(source, home / "warm")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
if used:
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
rng, refused, slowest = random.Random(1), 0, 0.0
for i in range(count):
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(4, end)
        changed[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            changed[at:at + 8] = rng.randrange(1 << 64).to_bytes(8, "little")
    (home / "m.gguf").write_bytes(changed)
    began = time.perf_counter()
    try:
        import_gguf(home / "m.gguf", home / "back")
    except NeoxLiteError as error:
        assert len(str(error)) < 2000 and "\\n" not in str(error), repr(error)
        refused += 1
    slowest = max(slowest, time.perf_counter() - began)
print(refused, count - refused)
print(f"slowest {slowest:.3f} s", file=sys.stderr)
"""


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_folder_and_tells_its_size(plain, tmp_path, capsys):
    assert main(["import", str(plain), str(tmp_path / "back"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["destination"] == str(tmp_path / "back")
    assert told.keys() == {"destination", "bytes_in", "bytes_out", "seconds", "peak_bytes"}
    assert main(["import", str(tmp_path / "none.gguf"), str(tmp_path / "back")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# -- llama.cpp itself -------------------------------------------------------------------------------------------------


def test_llama_cpp_chooses_our_greedy_tokens(llama_cpp, tmp_path):  # noqa: F811
    """A bounded form of benchmarks/peers/llama_cpp_tokens.py, on the bundled model."""
    from benchmarks.peers import llama_cpp_tokens as script

    prompts = script.demo_prompts(4)
    convert(script.DEMO, tmp_path / "int4", format="int4", group_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # llama.cpp's GELU is another
        plain, int4 = (script.compare(folder, tmp_path, prompts, 24) for folder in (script.DEMO, tmp_path / "int4"))
    assert plain["logits_identical_after_round_trip"] and int4["logits_identical_after_round_trip"]
    assert plain["ways"]["float32 activations, llama.cpp's GELU"]["equal_before_parting"] == 4 * 24
    for found in (*plain["ways"].values(), *int4["ways"].values()):
        assert found["same_choice"] >= 0.95 * 4 * 24
        assert all(
            p["our_margin"] < 0.1 for p in found["partings"]
        )  # near ties: llama.cpp rounds activations to 8 bits
