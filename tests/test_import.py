"""GGUF import: exact weights back, the tokenizer, other tools' files, refusals and hostile headers."""

import json
import random
import struct

import numpy as np
import pytest
import torch
from support.checkpoints import digests
from support.commands import run_python
from support.gguf import IDS, VARIANTS, Reader, as_blocks, expected, give_tokenizer, rewritten, write_source
from support.often import times
from support.refusals import refused
from tokenizers import processors

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite.errors import ArgumentError, CheckpointError, ConfigError, FormatError, TokenizerError
from neox_lite.formats import GroupInt
from neox_lite_quant import convert, export_gguf, gguf_import, import_gguf
from neox_lite_quant.gguf_file import BF16, F16, F32, Q4_0, Q8_0, GgufFile
from neox_lite_quant.gguf_tensors import blocks, by_part, from_blocks, own_name, places

pytestmark = pytest.mark.filterwarnings("ignore:.*(no tokenizer.json|NFC normalizer|not restored|exact GELU)")
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


@pytest.fixture(scope="module")
def model(source):
    return GPTNeoXForCausalLM.from_pretrained(source)


def round_trip(folder, **changes):
    """Write the folder's GGUF file, change it, and import it beside the folder: what was imported, and the report."""
    path, back = folder.parent / "m.gguf", folder.parent / "back"
    export_gguf(folder, path)
    if changes:
        path = rewritten(path, folder.parent / "changed.gguf", **changes)
    return back, import_gguf(path, back)


def logits(folder, **options):
    return GPTNeoXForCausalLM.from_pretrained(folder, exact=True, **options)(INPUT).logits


def tensors_of(folder):
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_quantized_folder_comes_back_with_identical_logits(source, tmp_path, format, group_size):
    convert(source, tmp_path / "there", format=format, group_size=group_size)
    folder, report = round_trip(tmp_path / "there")
    assert torch.equal(logits(folder), logits(tmp_path / "there"))
    assert verify_folder(folder) == []
    there, back = tensors_of(tmp_path / "there"), tensors_of(folder)
    assert report.bytes_out == sum(t.nbytes for t in back.values())
    for name, tensor in there.items():
        if name.endswith("weight_scale"):
            tensor = tensor.repeat_interleave(group_size // 32, dim=1)
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    if group_size == 32:
        assert GPTNeoXConfig.from_pretrained(folder).to_dict() == {
            **GPTNeoXConfig.from_pretrained(tmp_path / "there").to_dict(),
            **{"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02},
        }


@pytest.mark.parametrize("act", ["gelu", "gelu_fast"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_plain_checkpoint_comes_back_with_identical_logits(tmp_path, changes, act):
    folder, _ = round_trip(write_source(tmp_path / "there", **changes, hidden_act=act))
    assert torch.equal(logits(folder), logits(tmp_path / "there"))
    there, back = (GPTNeoXConfig.from_pretrained(path).to_dict() for path in (tmp_path / "there", folder))
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


@pytest.mark.parametrize(("kind", "bits", "size"), [(Q4_0, 4, 18), (Q8_0, 8, 34)])
def test_blocks_are_undone_for_every_code(kind, bits, size):
    raw = torch.randint(0, 256, (64, 3 * size), dtype=torch.uint8)
    raw.view(64, 3, size)[..., 1] &= 0x3B  # scales that are numbers
    found = {key: make() for key, make in from_blocks(kind, raw).items()}
    assert torch.equal(blocks(GroupInt(bits, 32), found), raw)


def test_rows_of_heads_are_put_back_slice_by_slice():
    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    written = torch.cat([torch.arange(start, stop) for start, stop in by_part(config)])
    back = torch.cat([written[places(config, start, start + 7)] for start in range(0, 189, 7)])
    assert back.tolist() == list(range(189))


def test_slices_of_any_size_give_the_same_folder_as_the_command_does(plain, tmp_path, monkeypatch, run):
    code, out, _ = run("import", plain, tmp_path / "one", "--json")
    told = json.loads(out)
    assert (code, told["destination"]) == (0, str(tmp_path / "one"))
    assert told.keys() == {"destination", "bytes_in", "bytes_out", "seconds", "peak_bytes"}
    monkeypatch.setattr(gguf_import, "SLICE_ELEMENTS", 1000)
    import_gguf(plain, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    code, _, err = run("import", tmp_path / "none.gguf", tmp_path / "back")
    assert (code, err.count("\n")) == (1, 1)


# -- the tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = ["the   theory of thick things: 3  of them<|endoftext|>x", "e\u0301 \u4e16 \U0001f680 ", "", "  \n\t"]
# as files of others are, without tokenizer.json
REBUILT = {"as-stored": {}, "rebuilt": {"metadata": {"tokenizer.huggingface.json": None}}}


@pytest.mark.parametrize("changes", REBUILT.values(), ids=REBUILT)
def test_the_tokenizer_comes_back(source, tmp_path, changes):
    give_tokenizer(source, tmp_path / "there", added=("   ", "[theory]"))
    (tmp_path / "there" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    folder, _ = round_trip(tmp_path / "there", **changes)
    there, back = (GPTNeoXTokenizerFast.from_pretrained(path) for path in (tmp_path / "there", folder))
    for text in TEXTS:
        ids = there.encode(text)
        assert back.encode(text) == ids and back.decode(ids) == there.decode(ids)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "all_special_ids"):
        assert getattr(back, name) == getattr(there, name), name
    assert back.get_vocab() == there.get_vocab()
    assert (GPTNeoXConfig.from_pretrained(folder).eos_token_id, there.eos_token_id) == ([0, 2], 0)


@pytest.mark.parametrize("changes", REBUILT.values(), ids=REBUILT)
def test_tokens_around_every_text_come_back(source, tmp_path, changes):
    tokenizer = give_tokenizer(source, tmp_path / "there")
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(tmp_path / "there" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>"}
    (tmp_path / "there" / "tokenizer_config.json").write_text(json.dumps(settings))
    folder, _ = round_trip(tmp_path / "there", **changes)
    found = GPTNeoXTokenizerFast.from_pretrained(folder).encode("the")
    assert found == [0, *tokenizer.encode("the").ids[1:]]


@pytest.mark.parametrize("changes", REBUILT.values(), ids=REBUILT)
def test_the_20b_tokenizer_comes_back(tmp_path, shared_data, changes):
    write_source(tmp_path / "there", vocab_size=50432, hidden_size=32, num_attention_heads=1)
    text = (shared_data / "20B_tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "there" / "tokenizer.json").write_text(text, encoding="utf-8")
    sample = (shared_data / "wikitext-2-valid.txt").read_text(encoding="utf-8")[:50000]
    sample += "\n\n\t    é 日本 <|endoftext|>"
    folder, _ = round_trip(tmp_path / "there", **changes)
    there, back = (GPTNeoXTokenizerFast.from_pretrained(path) for path in (tmp_path / "there", folder))
    assert back.encode(sample) == there.encode(sample)
    assert back.decode(there.encode(sample)) == there.decode(there.encode(sample))
    ours, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (back, there))
    assert all(ours[part] == theirs[part] for part in ("model", "normalizer", "added_tokens"))


def test_what_the_file_does_not_say_or_cannot_give_is_announced(plain, tmp_path):
    path = rewritten(plain, tmp_path / "m.gguf", {"gptneox.neox_lite.hidden_act": None})
    with pytest.warns(UserWarning, match=r"does not say which GELU .*--hidden-act gelu is the other one"):
        import_gguf(path, tmp_path / "one")
    import_gguf(path, tmp_path / "two", hidden_act="gelu")
    acts = [GPTNeoXConfig.from_pretrained(tmp_path / name).hidden_act for name in ("one", "two")]
    assert acts == ["gelu_fast", "gelu"]
    path = rewritten(plain, tmp_path / "n.gguf", {"tokenizer.ggml.model": "llama"})
    with pytest.warns(UserWarning, match=r"of the kind 'llama', which is not restored; copy the tokenizer's files"):
        import_gguf(path, tmp_path / "three")
    assert not (tmp_path / "three" / "tokenizer.json").exists()


GOOD = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
VOCABULARIES = [
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
    ({"huggingface.json": "{}"}, "is not a tokenizer.json"),
]


def import_is_refused(error, words, path, folder, **options):
    refused(error, words, import_gguf, path, folder, **options)
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize(("changes", "message"), VOCABULARIES)
def test_vocabularies_that_make_no_sense_are_refused(plain, tmp_path, changes, message):
    metadata = {f"tokenizer.{k if '.' in k else f'ggml.{k}'}": v for k, v in {**GOOD, **changes}.items()}
    path = rewritten(plain, tmp_path / "m.gguf", metadata)
    import_is_refused((TokenizerError, ConfigError), message, path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tokenizer_json_of_another_vocabulary_is_refused(source, tmp_path):
    give_tokenizer(source, tmp_path / "there")
    export_gguf(tmp_path / "there", tmp_path / "m.gguf")
    tokens = GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]
    tokens[5], tokens[6] = tokens[6], tokens[5]
    path = rewritten(tmp_path / "m.gguf", tmp_path / "n.gguf", {"tokenizer.ggml.tokens": tokens})
    import_is_refused(TokenizerError, "are different vocabularies", path, tmp_path / "back")


# -- files of other tools ---------------------------------------------------------------------------------------------


def test_mixed_types_become_mixed_formats(plain, model, tmp_path):
    up, down = model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight, model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight
    data = {"blk.0.ffn_up.weight": as_blocks(up, 4), "blk.1.ffn_down.weight": as_blocks(down, 8)}
    import_gguf(rewritten(plain, tmp_path / "m.gguf", data=data), tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    found = {n: m.format.name for n, m in back.gpt_neox.layers.named_modules() if hasattr(m, "format")}
    assert found.pop("0.mlp.dense_h_to_4h") == "int4" and found.pop("1.mlp.dense_4h_to_h") == "int8"
    assert set(found.values()) == {"dense"} and len(found) == 6
    read, wanted = Reader(tmp_path / "m.gguf"), expected(back)
    assert all(np.array_equal(read.decode(name), wanted[name]) for name in data)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_vocabulary_becomes_plain_and_says_what_is_rounded(plain, model, tmp_path, bits):
    weights = {"token_embd.weight": model.gpt_neox.embed_in.weight, "output.weight": model.embed_out.weight}
    data = {name: as_blocks(weight, bits) for name, weight in weights.items()}
    path = rewritten(plain, tmp_path / "m.gguf", data=data)
    with pytest.warns(UserWarning, match=r"2 tensors are rounded to float16 .*--dtype float32 keeps"):
        import_gguf(path, tmp_path / "half")
    import_gguf(path, tmp_path / "single", dtype="float32")
    read, stored = Reader(path), tensors_of(tmp_path / "single")
    for ours, theirs in (("gpt_neox.embed_in.weight", "token_embd.weight"), ("embed_out.weight", "output.weight")):
        assert np.array_equal(stored[ours].numpy(), read.decode(theirs))
    assert (tmp_path / "half" / "neox_lite_head.safetensors").exists() == (bits == 8)
    assert GPTNeoXForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


@pytest.mark.parametrize(("kind", "dtype"), [(F32, torch.float32), (BF16, torch.bfloat16)], ids=["f32", "bf16"])
def test_plain_types_keep_their_numbers(plain, tmp_path, kind, dtype):
    read = Reader(plain)
    values = {name: torch.from_numpy(read.decode(name)).to(dtype) for name in read.tensors}
    stored = {n: (kind, v) if v.dim() == 2 else (F32, v.float()) for n, v in values.items()}
    data = {n: (kind, tuple(v.shape), v.view(torch.uint8)) for n, (kind, v) in stored.items()}
    import_gguf(rewritten(plain, tmp_path / "m.gguf", data=data), tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == dtype
    assert all(np.array_equal(found, values[name].float().numpy()) for name, found in expected(back).items())


def test_an_older_version_and_another_alignment_are_read(plain, tmp_path):
    raw = bytearray(plain.read_bytes())
    raw[4] = 2
    (tmp_path / "m.gguf").write_bytes(raw)
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    path = rewritten(plain, tmp_path / "n.gguf", {"general.alignment": 8})  # 32 is a multiple of it
    assert GgufFile(path).tensors.keys() == GgufFile(plain).tensors.keys()


# -- refusals ---------------------------------------------------------------------------------------------------------


METADATA = [
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
    ({"gptneox.attention.causal": False}, "attention.causal is not part of GPT-NeoX"),
    ({"gptneox.attention.head_count_kv": 2}, "attention.head_count_kv is not part"),
    ({"gptneox.attention.layer_norm_epsilon": "x"}, "layer_norm_eps is 'x'"),
    ({"gptneox.neox_lite.hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"gptneox.use_parallel_residual": 1}, "use_parallel_residual is 1"),
    ({"split.count": 3}, "is one of 3 parts by its header, which its name does not say"),
    ({"general.alignment": 48}, "general.alignment is 48, expected a power of two"),
    ({"general.alignment": 0}, "general.alignment is 0"),
    ({"general.alignment": 4}, "general.alignment is 4"),
]


@pytest.mark.parametrize(("changes", "message"), METADATA)
def test_metadata_of_something_else_is_refused(plain, tmp_path, changes, message):
    path = rewritten(plain, tmp_path / "m.gguf", changes)
    import_is_refused((FormatError, ConfigError, CheckpointError), message, path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("kind", "name"), [(15, "Q8_K"), (26, "I32"), (99, "type 99")])
def test_types_that_nothing_decodes_are_refused_by_name(plain, tmp_path, kind, name):
    raw = bytearray(plain.read_bytes())
    at = raw.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 16
    assert struct.unpack_from("<I", raw, at) == (F16,)
    struct.pack_into("<I", raw, at, kind)
    (tmp_path / "m.gguf").write_bytes(raw)
    message = rf"has {name} \(blk.1.ffn_up.weight\), which nothing here decodes; quantize the original checkpoint"
    import_is_refused(FormatError, message, tmp_path / "m.gguf", tmp_path / "back")


FOUR = {"blk.0.attn_q.weight": (F32, (4,), torch.ones(4).view(torch.uint8))}
LARGE = {"output_norm.bias": (F32, (128,), torch.full((128,), 1e6).view(torch.uint8))}
TENSORS = [
    (FormatError, "GPT-NeoX has no tensor blk.0.attn_q.weight", {"data": FOUR}),
    (CheckpointError, "missing: gpt_neox.layers.0.mlp.dense_h_to_4h.weight", {"without": ["blk.0.ffn_up.weight"]}),
    (CheckpointError, "missing: gpt_neox.embed_in.weight", {"without": ["token_embd.weight"]}),
    (FormatError, "final_layer_norm.bias: holds values that are not finite as float16", {"data": LARGE}),
]


@pytest.mark.parametrize(("error", "words", "changes"), TENSORS, ids=["unknown", "no-weight", "no-embedding", "large"])
def test_tensors_of_something_else_are_refused(plain, tmp_path, error, words, changes):
    import_is_refused(error, words, rewritten(plain, tmp_path / "m.gguf", **changes), tmp_path / "back")
    assert own_name("blk.01.ffn_up.weight") is own_name("ffn_up.weight") is own_name("blk.1.output.weight") is None


def test_scales_that_are_no_numbers_are_refused(plain, model, tmp_path):
    kind, shape, raw = as_blocks(model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight, 4)
    raw[3, :2] = torch.tensor([0, 0x7C])  # infinity
    path = rewritten(plain, tmp_path / "m.gguf", data={"blk.0.ffn_up.weight": (kind, shape, raw)})
    words = r"dense_h_to_4h.weight_scale: holds values that are not finite as float16"
    import_is_refused(FormatError, words, path, tmp_path / "back")
    words = r"bfloat16, which cannot hold the file's scales"
    import_is_refused(ArgumentError, words, path, tmp_path / "back", dtype="bfloat16")


def test_what_is_no_gguf_file_is_refused(plain, tmp_path):
    (tmp_path / "text").write_text("GGML is not GGUF, and this is long enough to be read")
    for name, message in {"text": "not a GGUF", "none": "cannot be read: No such", "": "not a regular file"}.items():
        import_is_refused(CheckpointError, message, tmp_path / name, tmp_path / "back")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    import_is_refused(CheckpointError, "holds a model that neox-lite did not write", plain, tmp_path / "mine")


# -- hostile files ----------------------------------------------------------------------------------------------------


HUGE = (1 << 64) - 1


def string(text):
    return struct.pack("<Q", len(text)) + text


def header(version=3, tensors=0, keys=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def of_key(form, *values, name=b"a", keys=1):
    """A file with one key and these numbers after its name."""
    return header(keys=keys, body=keys * (string(name) + struct.pack(form, *values)))


def of_tensors(*infos, data=64):
    return header(tensors=len(infos), body=b"".join(infos) + bytes(data))


def info(name=b"t", shape=(32,), kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "only-magic": (b"GGUF", "not a GGUF file"),
    "version-1": (header(1), "version 1 is not 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless-tensors": (header(tensors=HUGE), "tensors and 0 keys, more than"),
    "endless-keys": (header(keys=HUGE), "keys, more than"),
    "endless-key": (header(keys=1, body=struct.pack("<Q", HUGE)), "its header wants"),
    "key-past-the-end": (header(keys=1, body=struct.pack("<Q", 64) + b"short"), "its header wants 64 bytes"),
    "no-utf-8": (of_key("<IB", 0, 1, name=b"\xff\xfe"), "is not UTF-8"),
    "unknown-value": (of_key("<I", 77), "of the unknown type 77"),
    "endless-array": (of_key("<IIQ", 9, 0, HUGE), "too long"),
    "endless-strings": (of_key("<IIQ", 9, 8, 1 << 19), "its header wants"),
    "nested-array": (of_key("<IIQ", 9, 9, 1), "of another type"),
    "key-twice": (of_key("<IB", 0, 1, keys=2), "a appears twice"),
    "tensor-twice": (of_tensors(info(), info(offset=128), data=512), "a tensor appears twice"),
    "no-dimension": (of_tensors(info(shape=()), data=0), "0 dimensions"),
    "many-dimensions": (of_tensors(info(shape=(1,) * 9), data=0), "9 dimensions"),
    "empty-dimension": (of_tensors(info(shape=(0,))), "no empty dimension"),
    "overflowing-shape": (of_tensors(info(shape=(HUGE, HUGE))), "truncated"),
    "half-a-block": (of_tensors(info(shape=(48,), kind=Q4_0)), "rows of a multiple of 32"),
    "odd-offset": (of_tensors(info(offset=4), data=256), "offset of a multiple of 32"),
    "far-offset": (of_tensors(info(offset=1 << 62), data=256), "truncated"),
    "truncated-data": (of_tensors(info()), "truncated"),
    "overlap": (of_tensors(info(), info(b"u", offset=96), data=512), "u begins at byte [0-9]+, inside of another"),
}


@pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(tmp_path, raw, message):
    (tmp_path / "m.gguf").write_bytes(raw)
    refused(CheckpointError, message, GgufFile, tmp_path / "m.gguf")


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
    for length in {*range(0, 600, 7), *random.Random(0).sample(range(len(raw) - 32), times(100))}:
        path.write_bytes(raw[:length])
        refused(CheckpointError, None, GgufFile, path)


def test_mutated_headers_end_in_a_model_or_a_sentence(small, tmp_path):
    """Anything but a NeoxLiteError, or a folder that is whole, fails; each is tried under a limit of memory."""
    count = times(120)
    out = run_python(MUTATE, small, tmp_path, count)
    assert out.returncode == 0, out.stderr[-2000:]
    refused, taken = map(int, out.stdout.split())
    assert refused + taken == count and refused > count / 3


MUTATE = """
import random, resource, sys, warnings
from pathlib import Path
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
rng, refused = random.Random(1), 0
for i in range(count):
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(4, end)
        changed[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            changed[at:at + 8] = rng.randrange(1 << 64).to_bytes(8, "little")
    (home / "m.gguf").write_bytes(changed)
    try:
        import_gguf(home / "m.gguf", home / "back")
    except NeoxLiteError as error:
        assert len(str(error)) < 2000 and "\\n" not in str(error), repr(error)
        refused += 1
print(refused, count - refused)
"""
