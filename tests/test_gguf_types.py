"""GGUF files as people have them: types that only the gguf package decodes, split files, keys that are left out or idle."""

import re

import numpy as np
import pytest
import torch
from support.checkpoints import IDS, change_json, write_bpe, write_source
from support.peers import difference

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import NeoxLiteError
from neox_lite_quant import export_gguf, import_gguf
from neox_lite_quant.gguf_file import DECODED, TYPE_NAMES, GgufFile, GgufTensor, write_gguf

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:.*(no tokenizer.json|NFC normalizer)")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "hidden_act": "gelu_fast"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder, **SHAPE)
    return folder


@pytest.fixture
def exported(source, tmp_path):
    export_gguf(source, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def rewrite(path, new, kinds=None, metadata=None, drop=(), split=None):
    """A copy of a GGUF file with random blocks of other types in some tensors. split: names of those in a second file."""
    file = GgufFile(path)
    keys = {k: v for k, v in {**file.metadata, **(metadata or {})}.items() if k not in drop}
    tensors, values = [], {}
    for name, tensor in file.tensors.items():
        kind, raw = tensor.kind, file.rows(name)
        if (chosen := (kinds or {}).get(name)) is not None:
            kind, raw = chosen, random_blocks(chosen, tensor.shape)
            values[name] = torch.from_numpy(
                gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind)).reshape(tensor.shape)
            )
        tensors.append(GgufTensor(name, kind, tensor.shape, lambda raw=raw: [raw]))
    if split is None:
        write_gguf(new, keys, tensors)
        return values
    parts = [[t for t in tensors if (t.name in split) is second] for second in (False, True)]
    for i, part in enumerate(parts):
        own = {"split.no": i, "split.count": 2, "split.tensors.count": len(tensors)}
        write_gguf(new.with_name(f"{new.stem}-{i + 1:05}-of-00002.gguf"), {**(keys if i == 0 else {}), **own}, part)
    return values


def random_blocks(kind, shape):
    """Random codes with small scales: (rows, bytes) uint8 of a quantized type."""
    weights, size = DECODED[kind]
    generator = np.random.default_rng(kind)
    raw = generator.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    one = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    at = {10: (80, 82), 11: (108,), 14: (208,), 34: (52,), 35: (64,), 39: ()}.get(kind, (0, 2))  # where scales are
    for start in at:
        raw[..., start : start + 2] = one
    if kind == 39:
        raw[..., 0] = 121
    return torch.from_numpy(raw.reshape(shape[0], -1))


def weights_of(folder):
    return GPTNeoXForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


TYPES = {TYPE_NAMES[kind]: kind for kind in DECODED if kind not in (16, 17, 18, 19, 21, 22, 23, 29)}


@pytest.mark.parametrize("name", list(TYPES))
def test_types_that_no_format_holds_are_decoded_as_the_gguf_package_does_and_said(exported, tmp_path, name):
    kind = TYPES[name]
    values = rewrite(exported, tmp_path / "new.gguf", {"output.weight": kind, "blk.0.ffn_down.weight": kind})
    with pytest.warns(UserWarning, match=f"2 tensors of {name} are decoded to float32"):
        import_gguf(tmp_path / "new.gguf", tmp_path / "folder", dtype="float32")
    found = weights_of(tmp_path / "folder")
    assert torch.equal(found["embed_out.weight"], values["output.weight"])
    assert torch.equal(found["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"], values["blk.0.ffn_down.weight"])


def test_rows_of_query_key_value_come_back_in_their_order_from_any_type(exported, tmp_path):
    kind = TYPES["Q4_K"]
    values = rewrite(exported, tmp_path / "new.gguf", {"blk.1.attn_qkv.weight": kind})
    with pytest.warns(UserWarning, match="decoded"):
        import_gguf(tmp_path / "new.gguf", tmp_path / "folder", dtype="float32")
    found = weights_of(tmp_path / "folder")["gpt_neox.layers.1.attention.query_key_value.weight"]
    heads, size = 4, 64
    expected = values["blk.1.attn_qkv.weight"].view(3, heads, size, 256).transpose(0, 1).reshape(3 * heads * size, 256)
    assert torch.equal(found, expected)


def test_without_the_gguf_package_the_message_says_how_to_get_it(exported, tmp_path, monkeypatch):
    rewrite(exported, tmp_path / "new.gguf", {"output.weight": TYPES["Q6_K"]})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with (
        pytest.warns(UserWarning, match="decoded"),
        pytest.raises(
            NeoxLiteError, match=re.escape("Q6_K is decoded by the gguf package: pip install 'neox-lite[gguf]'")
        ),
    ):
        import_gguf(tmp_path / "new.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder" / "config.json").exists()


def test_the_first_part_of_a_split_file_stands_for_all(source, exported, tmp_path):
    names = [name for name in GgufFile(exported).tensors if name.startswith("blk.1.") or name == "output.weight"]
    rewrite(exported, tmp_path / "new.gguf", split=names)
    import_gguf(tmp_path / "new-00001-of-00002.gguf", tmp_path / "folder")
    ours = [GPTNeoXForCausalLM.from_pretrained(folder)(IDS).logits for folder in (source, tmp_path / "folder")]
    assert torch.equal(*ours)


@pytest.mark.parametrize(
    ("change", "given", "words"),
    [
        (
            lambda first, second: first.rename(first.with_name("lone.gguf")),
            "lone.gguf",
            "is one of 2 parts by its header",
        ),
        (lambda first, second: second.unlink(), "new-00001-of-00002.gguf", "00002-of-00002"),
        (lambda first, second: second.write_bytes(first.read_bytes()), "new-00001-of-00002.gguf", "is not part 2 of 2"),
        (
            lambda first, second: None,
            "new-00002-of-00002.gguf",
            r"a later part of a model; give new-00001-of-00002\.gguf",
        ),
    ],
    ids=["renamed", "missing", "twice", "second"],
)
def test_parts_that_do_not_go_together_are_refused(exported, tmp_path, change, given, words):
    rewrite(exported, tmp_path / "new.gguf", split=["output.weight"])
    change(*(tmp_path / f"new-0000{i}-of-00002.gguf" for i in (1, 2)))
    with pytest.raises(NeoxLiteError, match=words):
        import_gguf(tmp_path / given, tmp_path / "folder")


def test_a_file_that_does_not_say_how_much_of_a_head_is_rotated_means_all_of_it(exported, tmp_path):
    rewrite(exported, tmp_path / "new.gguf", drop=["gptneox.rope.dimension_count"])
    import_gguf(tmp_path / "new.gguf", tmp_path / "folder")
    config = GPTNeoXForCausalLM.from_pretrained(tmp_path / "folder").config
    assert config.rotary_dim == config.head_dim


def test_keys_that_repeat_what_is_so_are_no_news(source, exported, tmp_path):
    keys = {"gptneox.attention.causal": True, "gptneox.rope.scaling.finetuned": True}
    rewrite(exported, tmp_path / "new.gguf", metadata=keys)
    import_gguf(tmp_path / "new.gguf", tmp_path / "folder")
    ours = [GPTNeoXForCausalLM.from_pretrained(folder)(IDS).logits for folder in (source, tmp_path / "folder")]
    assert difference(*ours) == 0
    rewrite(exported, tmp_path / "other.gguf", metadata={"gptneox.attention.causal": False})
    with pytest.raises(NeoxLiteError, match=r"gptneox\.attention\.causal is not part of GPT-NeoX"):
        import_gguf(tmp_path / "other.gguf", tmp_path / "other")


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_the_first_further_end_id_is_exported_and_comes_back(tmp_path, where):
    write_source(tmp_path / "source", **SHAPE, vocab_size=300, eos_token_id=260)
    write_bpe(tmp_path / "source", eos_token="<|endoftext|>")
    (tmp_path / "source" / "generation_config.json").write_text("{}")
    change_json(tmp_path / "source" / where, eos_token_id=[260, 5, 9])
    with pytest.warns(UserWarning, match=r"llama.cpp will not stop at the ids \[9\]"):
        export_gguf(tmp_path / "source", tmp_path / "model.gguf")
    assert GgufFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.eot_token_id"] == 5
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    assert GPTNeoXForCausalLM.from_pretrained(tmp_path / "folder").generation_config.eos_token_id == [260, 5]
