"""GGUF export: exact weights, the file's bytes, what llama.cpp is told, refusals, and llama.cpp's own logits and ids."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from support.checkpoints import SHAPE
from support.gguf import IDS, VARIANTS, Reader, expected, give_tokenizer, write_source
from support.refusals import refused
from tokenizers import models, pre_tokenizers

from neox_lite import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXTokenizerFast
from neox_lite.errors import ArgumentError, CheckpointError, FormatError, ShapeError, TokenizerError
from neox_lite.formats import GroupInt, pack
from neox_lite.kernels import reference
from neox_lite_quant import convert, export_gguf, gguf_export, gguf_file
from neox_lite_quant.gguf_file import F16, F32, Q4_0, Q8_0, GgufTensor, write_gguf
from neox_lite_quant.gguf_tensors import blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*(no tokenizer.json|NFC normalizer)")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def int4(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "model"
    convert(source, folder, format="int4", group_size=128)
    return folder


def exported(folder, path, **options):
    """The folder as a GGUF file, read again."""
    export_gguf(folder, path, **options)
    return Reader(path)


def gguf_of(tmp_path, *given, **config):
    """A random model in tmp_path/model, read from its GGUF file."""
    return exported(write_source(tmp_path / "model", *given, **config), tmp_path / "m.gguf")


def export_is_refused(error, words, folder, **options):
    refused(error, words, export_gguf, folder, folder.parent / "m.gguf", **options)
    assert not (folder.parent / "m.gguf").exists()


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("format", "kind"), [("int4", Q4_0), ("int8", Q8_0)])
def test_quantized_weights_keep_their_exact_values(source, tmp_path, format, kind, group_size):
    convert(source, tmp_path / "model", format=format, group_size=group_size)
    read = exported(tmp_path / "model", tmp_path / "m.gguf", head="q8_0")
    wanted = expected(GPTNeoXForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, head="int8"))
    assert read.tensors.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(read.decode(name), values), name
    assert {read.tensors[f"blk.1.{n}.weight"][0] for n in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")} == {kind}
    assert read.tensors["output.weight"][0] == Q8_0 and read.tensors["token_embd.weight"][0] == F16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_plain_checkpoints_become_float16(tmp_path, dtype):
    read, model = gguf_of(tmp_path, dtype), GPTNeoXForCausalLM.from_pretrained(tmp_path / "model")
    for name, values in expected(model).items():
        wanted = values if values.ndim == 1 else values.astype(np.float16).astype(np.float32)
        assert np.array_equal(read.decode(name), wanted), name


def test_tied_heads_and_missing_biases_are_written_out(tmp_path):
    read = gguf_of(tmp_path, tie_word_embeddings=True, attention_bias=False)
    assert np.array_equal(read.decode("output.weight"), read.decode("token_embd.weight"))
    assert not read.decode("blk.0.attn_qkv.bias").any() and not read.decode("blk.1.attn_output.bias").any()
    assert read.decode("blk.0.ffn_up.bias").any()


def test_bfloat16_scales_are_taken_if_float16_holds_them(tmp_path):
    convert(write_source(tmp_path / "source", torch.bfloat16), tmp_path / "model", group_size=32)
    read, name = exported(tmp_path / "model", tmp_path / "m.gguf"), "blk.0.ffn_up.weight"
    wanted = expected(GPTNeoXForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert np.array_equal(read.decode(name), wanted[name])


# -- golden bytes -----------------------------------------------------------------------------------------------------


Q4_CODES = [*range(-8, 8), *range(7, -9, -1)]  # elements 0 to 15 rise, 16 to 31 fall
Q8_CODES = [-128, -1, 0, 1, 127, *range(27)]
GOLDEN = {
    "q4_0": (4, 32, Q4_CODES, [-0.5], "00b8" + "f0e1d2c3b4a5968778695a4b3c2d1e0f"),
    "q8_0": (8, 32, Q8_CODES, [1.5], "003e" + "80ff00017f" + bytes(range(27)).hex()),
    # a larger group repeats its scale
    "q8_0-128": (8, 128, [1] * 256, [1.0, -2.0], 4 * ("003c" + 32 * "01") + 4 * ("00c0" + 32 * "01")),
}


@pytest.mark.parametrize(("bits", "group_size", "codes", "scales", "hex"), GOLDEN.values(), ids=GOLDEN)
def test_golden_bytes_of_blocks(bits, group_size, codes, scales, hex):
    packed, scale = pack(torch.tensor([codes], dtype=torch.int8), bits), torch.tensor([scales], dtype=torch.float16)
    rows = {"weight_packed": packed, "weight_scale": scale}
    assert bytes(blocks(GroupInt(bits, group_size), rows).flatten().tolist()).hex() == hex


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
    ours = exported(tmp_path / "model", tmp_path / "m.gguf", head="q8_0")
    theirs = peer.GGUFReader(tmp_path / "m.gguf")
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
    found = gguf_of(tmp_path, rope_scaling=rope, **changes).metadata
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


def test_the_vocabulary_is_that_of_tokenizer_json(source, tmp_path):
    with pytest.warns(UserWarning, match="does not apply the tokenizer's NFC normalizer"):
        size = give_tokenizer(source, tmp_path / "model").get_vocab_size()
        metadata = exported(tmp_path / "model", tmp_path / "m.gguf").metadata
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer")}
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
def test_an_activation_that_llama_cpp_lacks_and_a_missing_tokenizer_are_announced(tmp_path, act, warned, recwarn):
    gguf_of(tmp_path, hidden_act=act)
    told = [str(w.message) for w in recwarn]
    assert any("exact GELU" in message for message in told) == warned
    assert any("no tokenizer.json; llama.cpp will have ids but no text" in message for message in told)


# -- the writer -------------------------------------------------------------------------------------------------------


def test_slices_of_any_size_give_the_same_bytes(int4, tmp_path, monkeypatch):
    export_gguf(int4, tmp_path / "one.gguf", head="q8_0")
    monkeypatch.setattr(gguf_export, "SLICE_ELEMENTS", 1000)
    export_gguf(int4, tmp_path / "two.gguf", head="q8_0")
    assert (tmp_path / "one.gguf").read_bytes()[32:] == (tmp_path / "two.gguf").read_bytes()[32:]


def test_progress_ends_at_its_total_and_the_command_tells_the_size(int4, tmp_path, run):
    seen, out = [], tmp_path / "m.gguf"
    report = export_gguf(int4, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert report.bytes_out == out.stat().st_size
    assert report.bytes_in == sum(p.nbytes for p in GPTNeoXForCausalLM.from_pretrained(int4).state_dict().values())
    code, _, err = run("export", int4, out)
    assert (code, err.count("exists already")) == (1, 1)
    out.unlink()
    code, shown, _ = run("export", int4, out, "--to", "gguf", "--head", "q8_0", "--json")
    told = json.loads(shown)
    assert (code, told["destination"], told["bytes_out"]) == (0, str(out), out.stat().st_size)
    assert told.keys() == {"destination", "bytes_in", "bytes_out", "seconds", "peak_bytes"}
    with pytest.raises(SystemExit) as usage:
        run("export", int4, out, "--to", "onnx")
    assert usage.value.code == 2


def test_nothing_is_ever_replaced_and_a_full_disk_is_found_before_anything_is_written(source, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("mine")
    for taken in (tmp_path / "m.gguf", tmp_path):
        refused(CheckpointError, "exists already; delete it or choose another name", export_gguf, source, taken)
    assert (tmp_path / "m.gguf").read_text() == "mine"
    monkeypatch.setattr(gguf_file, "free_bytes", lambda path: 1000)
    words = r"needs [0-9]+ bytes, 1000 are free; choose another folder"
    refused(CheckpointError, words, export_gguf, source, tmp_path / "new" / "m.gguf")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_export_leaves_nothing(source, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, tmp_path / "new" / "m.gguf", progress=interrupt)
    assert list((tmp_path / "new").iterdir()) == []


BAD_TENSORS = {
    "t: 8 bytes, expected 12": GgufTensor("t", F32, (3,), lambda: [torch.ones(2).view(torch.uint8)]),
    "rows of 48 weights, expected a multiple of 32": GgufTensor("t", Q8_0, (2, 48), list),
}


def test_data_and_metadata_that_a_file_cannot_hold_are_refused_by_name(tmp_path):
    for words, tensor in BAD_TENSORS.items():
        refused(ShapeError, words, write_gguf, tmp_path / "m.gguf", {}, [tensor])
    for value in (1 << 32, -1, 1e300, "\ud800", ["a", "\udfff"], [1 << 31]):
        words = r"some\.key: .* cannot be written to a GGUF file"
        refused(FormatError, words, write_gguf, tmp_path / "m.gguf", {"some.key": value}, [])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    write_source(tmp_path / "source", torch.bfloat16, initializer_range=1e-4)  # int8 scales near 1e-6
    convert(tmp_path / "source", tmp_path / "model", format="int8", group_size=32)
    words = r"layers.0.attention.query_key_value.weight_packed, rows 0 to 31: a scale of .* is not a float16 number"
    export_is_refused(FormatError, words, tmp_path / "model")
    model = GPTNeoXForCausalLM.from_pretrained(write_source(tmp_path / "source", torch.float32))
    model.gpt_neox.embed_in.weight[5, 5] = 1e6
    model.save_pretrained(tmp_path / "large")
    export_is_refused(FormatError, r"embed_in.weight, rows 0 to 130: .*not finite as float16", tmp_path / "large")


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0}
ROPES = {
    "rope_type 'llama3': llama.cpp's gptneox cannot compute it": LLAMA3,
    "rope_type 'yarn' with beta_fast: llama.cpp": {**YARN, "beta_fast": 16},
    "with attention_factor, mscale": {**YARN, "attention_factor": 1.0, "mscale": 1.0},
}


@pytest.mark.parametrize("words", ROPES)
def test_rotary_forms_that_llama_cpp_lacks_are_refused(tmp_path, words):
    export_is_refused(FormatError, words, write_source(tmp_path / "model", rope_scaling=ROPES[words]))


def test_tokenizers_classes_and_heads_that_a_file_cannot_hold_are_refused(source, int4, tmp_path):
    folder = tmp_path / "model"
    give_tokenizer(source, folder, model=models.Unigram([("a", 0.0)]), split=pre_tokenizers.Metaspace())
    export_is_refused(FormatError, r"a Unigram model after Metaspace splitting.*needs byte-level BPE", folder)
    give_tokenizer(None, folder, added=[f"word{i}" for i in range(131)])
    export_is_refused(TokenizerError, r"has id [0-9]+, but the model has 131 ids", folder)
    no_head = "has no neox_lite_head.safetensors; head='q8_0' is for"
    export_is_refused(ArgumentError, no_head, source, head="q8_0")
    export_is_refused(ArgumentError, "head is 'q4_0', expected 'f16' or 'q8_0'", int4, head="q4_0")
    classifier = write_source(tmp_path / "classifier", cls=GPTNeoXForSequenceClassification)
    export_is_refused(ArgumentError, r"is a GPTNeoXForSequenceClassification; llama.cpp", classifier)


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


def reference_logits(folder, **options):
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.ops = reference
    return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_logits_from_a_plain_checkpoint(llama_cpp, tmp_path, variant):
    gguf_of(tmp_path, **VARIANTS[variant])
    wanted, found = reference_logits(tmp_path / "model"), llama_logits(llama_cpp, tmp_path / "m.gguf", repack=True)
    # llama.cpp rounds inputs of a product to float16: 0.0027
    assert np.abs(found - wanted).max() < 0.006 * wanted.std()


@pytest.mark.parametrize("repack", [True, False], ids=["repacked", "as-stored"])
@pytest.mark.parametrize(
    ("format", "group_size", "head"), [("int4", 32, "f16"), ("int4", 128, "q8_0"), ("int8", 64, "q8_0")]
)
def test_llama_cpp_computes_the_same_logits_from_a_quantized_folder(
    llama_cpp, source, tmp_path, format, group_size, head, repack
):
    convert(source, tmp_path / "model", format=format, group_size=group_size)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", head=head)
    wanted = reference_logits(tmp_path / "model", head={"f16": "fp16", "q8_0": "int8"}[head])
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


def test_llama_cpp_chooses_our_greedy_tokens(llama_cpp, tmp_path):
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
        # near ties: llama.cpp rounds activations to 8 bits
        assert all(p["our_margin"] < 0.1 for p in found["partings"])
