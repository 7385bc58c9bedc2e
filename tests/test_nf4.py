"""nf4: bitsandbytes' bytes and products, folders that transformers wrote and those it opens, and what is refused by name."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.backends import stored
from support.checkpoints import change_json, change_tensors
from support.peers import TINY, opened_by_transformers, peer, random_ids

import neox_lite
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.reader import verify_folder
from neox_lite.errors import CheckpointError, FormatError
from neox_lite.formats import DENSE, NF4, Weight, formats_of, make_format, quantization_config
from neox_lite.formats.nf4 import ABSMAX, LEVELS, NESTED_ABSMAX, NESTED_MAP, STATE, dynamic_map
from neox_lite.kernels import nf4
from neox_lite.offload.plan import sizes_of
from neox_lite_app.cli import main
from neox_lite_quant import convert

SHAPE = {**TINY, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 320}
FIRST = "gpt_neox.layers.0.mlp.dense_h_to_4h"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
both = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def uneven(rows=192, columns=128, seed=0):
    """Gaussian rows whose sizes span three decades."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]


def encoded(double, weight, dtype=torch.float16):
    return stored(NF4(double), weight, dtype)


# Numbers --------------------------------------------------------------------------------------------------------------


def test_a_byte_holds_two_codes_the_first_one_in_its_high_bits():
    row = torch.tensor([*LEVELS, *LEVELS[::-1], *[0.5] * 32])[None] * 3
    stored = NF4().encode(row, torch.float16)
    assert stored["weight"][0, :16].tolist() == [*range(0x01, 0x100, 0x22), *range(0xFE, 0, -0x22)]
    assert stored[ABSMAX].tolist() == [[3.0]]


def test_halfway_between_two_levels_the_lower_one_is_taken():
    middle = (torch.tensor(LEVELS[11]) + torch.tensor(LEVELS[12])) / 2
    row = torch.tensor([1.0, middle, *[0.0] * 62])[None]
    assert NF4().encode(row, torch.float16)["weight"][0, 0] == 15 << 4 | 11


@both
def test_doubly_quantized_scales_are_within_half_a_level_of_the_single_ones(double):
    single, weight = encoded(False, uneven(640)), encoded(double, uneven(640))
    levels = dynamic_map()
    step = float((levels[1:] - levels[:-1]).max()) / 2 if double else 0
    spread = float((single.tensors[ABSMAX] - single.tensors[ABSMAX].mean()).abs().max())
    error = (weight.format.scales(weight.tensors) - single.tensors[ABSMAX]).abs().max()
    assert float(error) <= step * spread * 1.0001


@every_dtype
def test_codes_and_scales_are_those_of_bitsandbytes(bnb, dtype):
    weight = uneven().to(DTYPES[dtype])
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = encoded(False, weight, DTYPES[dtype])
    assert torch.equal(ours.tensors["weight"].view(-1, 1), packed)
    assert torch.equal(ours.tensors[ABSMAX].flatten(), state.absmax)
    theirs = bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist())
    assert json.loads(bytes(ours.tensors[STATE].tolist())) == json.loads(theirs)


def test_double_quantization_is_that_of_bitsandbytes_but_that_each_scale_takes_the_nearest_level(bnb):
    weight = uneven(640)
    _, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = encoded(True, weight, torch.float32)
    assert torch.equal(ours.tensors[NESTED_MAP][1:], state.state2.code[1:])  # 0.49 puts the first level elsewhere
    assert torch.equal(ours.tensors[NESTED_ABSMAX], state.state2.absmax)
    assert ours.format.offset == state.offset.item()
    exact = encoded(False, weight).tensors[ABSMAX].flatten()
    theirs = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    mine = ours.format.scales(ours.tensors).flatten()
    nearest = (mine - exact).abs() <= (theirs - exact).abs() * 1.001 + 1e-6
    assert bool((nearest | (state.absmax == 0)).all())
    assert float((ours.tensors[ABSMAX].flatten() == state.absmax).float().mean()) > 0.9  # its search stops early


@both
@every_dtype
def test_the_plain_twin_decodes_to_bitsandbytes_numbers(bnb, double, dtype):
    weight = encoded(double, uneven())
    state = nf4._state(bnb, weight, DTYPES[dtype])
    theirs = bnb.functional.dequantize_4bit(weight.tensors["weight"].view(-1, 1), state)
    assert torch.equal(weight.decode(DTYPES[dtype]), theirs)


@both
@pytest.mark.parametrize("tokens", [0, 1, 2, 70])
def test_products_by_bitsandbytes_are_those_of_the_plain_twin_in_float64(bnb, monkeypatch, double, tokens):
    monkeypatch.setitem(nf4.SLICE_ELEMENTS, "cpu", 50 * 128)  # four slices of rows, the last one short
    weight, x = encoded(double, uneven()), torch.randn(tokens, 128)
    wanted = x.double() @ weight.decode().double().T
    for found in (
        nf4.matmul(x, weight),
        bnb.matmul_4bit(x, weight.tensors["weight"].view(-1, 1).t(), nf4._state(bnb, weight, x.dtype)),
    ):
        assert found.shape == wanted.shape and found.dtype == torch.float32
        assert not tokens or relative(found, wanted) < 1e-6  # float32 sums of 128 products


@both
def test_kernels_are_given_scales_in_float32_whatever_a_file_has_and_no_copy_of_others(bnb, double):
    weight = encoded(double, uneven())
    state = nf4._state(bnb, weight, torch.float16)
    assert state.absmax.data_ptr() == weight.tensors["weight.absmax"].data_ptr()
    halved = {key: t.half() if t.is_floating_point() else t for key, t in weight.tensors.items()}
    state = nf4._state(bnb, Weight(weight.format, weight.shape, halved), torch.float16)
    assert (state.state2 if double else state).absmax.dtype == state.code.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@both
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_products_on_a_gpu_are_those_of_the_plain_twin_in_float64(bnb, double, tokens):
    weight, x = encoded(double, uneven()), torch.randn(tokens, 128)
    there = Weight(weight.format, weight.shape, {key: t.cuda() for key, t in weight.tensors.items()})
    found = nf4.matmul(x.half().cuda(), there)
    wanted = x.half().double() @ weight.decode().double().T
    assert relative(found.cpu(), wanted) < 2e-3  # float16 weights, activations and results


# Folders, both directions ---------------------------------------------------------------------------------------------


def by_transformers(folder, dtype="float32", double=False, cls="GPTNeoXForCausalLM", skip=None, **changes):
    """A random model that transformers quantized with bitsandbytes on the CPU and saved."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="transformers quantizes to nf4 with accelerate only")
    peer(cls, **{**SHAPE, **changes}).to(DTYPES[dtype]).save_pretrained(folder / "plain")
    scheme = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=changes.pop("kind", "nf4"),
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    model = getattr(transformers, cls).from_pretrained(
        folder / "plain", quantization_config=scheme, device_map="cpu", dtype=DTYPES[dtype]
    )
    model.save_pretrained(folder / "nf4")  # before any forward: one may lay the weights out anew
    return folder / "nf4"


def same_logits(folder):
    """A folder's model, ids, and transformers' logits, which it has as well; all in float32."""
    model, ids = GPTNeoXForCausalLM.from_pretrained(folder, dtype="float32"), random_ids(2, 40)
    with torch.no_grad():
        wanted = opened_by_transformers(folder)(ids).logits
    assert relative(model(ids).logits, wanted) < 1e-5  # sums in another order
    return model, ids, wanted


@both
@every_dtype
def test_a_folder_that_transformers_made_has_equal_logits(tmp_path, double, dtype):
    folder = by_transformers(tmp_path, dtype, double)
    model, ids, wanted = same_logits(folder)
    assert model.get_submodule(FIRST).format.name == ("nf4-double" if double else "nf4")
    assert relative(torch.cat([s.logits for s in steps(model, ids[:1])], 1), wanted[:1]) < 1e-5
    assert verify_folder(folder, needs_manifest=False) == []
    own = GPTNeoXForCausalLM.from_pretrained(folder)  # norms, cache and head in the folder's dtype
    assert relative(own(ids).logits, wanted) < {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]


def steps(model, ids):
    """One token at a time."""
    cache = None
    for token in ids.split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        yield out


@both
@every_dtype
def test_transformers_opens_a_folder_written_here_with_equal_logits(tmp_path, double, dtype):
    peer(**SHAPE).to(DTYPES[dtype]).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "nf4", format="nf4-double" if double else "nf4")
    same_logits(tmp_path / "nf4")[0].save_pretrained(tmp_path / "again")
    same_logits(tmp_path / "again")


def test_a_folder_that_transformers_made_is_the_one_that_is_written_here(tmp_path):
    theirs = load_file(by_transformers(tmp_path, "float16") / "model.safetensors")
    convert(tmp_path / "plain", tmp_path / "ours", format="nf4")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert {n.replace("embed_out", "lm_head") for n in ours} == {n.replace("embed_out", "lm_head") for n in theirs}
    for name, tensor in theirs.items():
        found = ours[name] if name in ours else ours[name.replace("lm_head", "embed_out")]
        if name.endswith("nf4"):
            assert json.loads(bytes(found.tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


@pytest.mark.parametrize(
    "skip",
    [["lm_head", "gpt_neox.layers.1.mlp.dense_h_to_4h"], ["lm_head", "dense"], ["lm_head", r"gpt_neox.layers.\d+.mlp"]],
)
def test_modules_that_were_skipped_are_plain(tmp_path, skip):
    model = same_logits(by_transformers(tmp_path, skip=skip))[0]
    kinds = {m.format == DENSE for m in model.gpt_neox.layers.modules() if isinstance(m, neox_lite.layers.Linear)}
    assert kinds == {True, False}


@pytest.mark.parametrize("cls", ["GPTNeoXForSequenceClassification", "GPTNeoXModel"])
def test_other_classes_load_too(tmp_path, cls):
    folder, ids = by_transformers(tmp_path, cls=cls), random_ids(1, 30)
    transformers = pytest.importorskip("transformers")
    model = getattr(neox_lite, cls).from_pretrained(folder)
    peer_model = opened_by_transformers(folder, getattr(transformers, cls))
    with torch.no_grad():
        assert relative(model(ids)[0], peer_model(ids)[0]) < 1e-5


def test_tied_and_sequential_checkpoints_are_read_and_written(tmp_path):
    changes = {"tie_word_embeddings": True, "use_parallel_residual": False}
    same_logits(by_transformers(tmp_path, **changes))
    convert(tmp_path / "plain", tmp_path / "ours", format="nf4-double")
    same_logits(tmp_path / "ours")


# Loading, saving, placing ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**{**SHAPE, "initializer_range": 0.1})).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["nf4", "nf4-double"])
def written(request, plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / request.param
    convert(plain, folder, format=request.param)
    return folder


def test_quantizing_while_loading_gives_the_same_weights_and_keeps_them(written, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    offline = GPTNeoXForCausalLM.from_pretrained(written)
    for _ in range(2):  # the second time from what was kept
        loaded = GPTNeoXForCausalLM.from_pretrained(plain, quantization=written.name)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in offline.state_dict().items())
        assert torch.equal(loaded(random_ids(1, 9)).logits, offline(random_ids(1, 9)).logits)
    assert len(list((tmp_path / "neox-lite").iterdir())) == 1


@both
def test_bitsandbytes_config_object_means_nf4_here(plain, tmp_path, monkeypatch, double):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    asked = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = GPTNeoXForCausalLM.from_pretrained(plain, quantization_config=asked)
    assert model.get_submodule(FIRST).format.name == ("nf4-double" if double else "nf4")


def test_a_state_dict_carries_everything_that_a_model_needs(written):
    model, ids = GPTNeoXForCausalLM.from_pretrained(written), random_ids(1, 9)
    built = GPTNeoXForCausalLM(model.config)
    built.load_state_dict(model.state_dict())
    assert torch.equal(built.float()(ids).logits, model.float()(ids).logits)
    assert set(load_file(written / "model.safetensors")) == set(model.state_dict())


def test_weights_are_used_where_the_file_is_mapped_and_layers_run_from_the_disk(written):
    model, ids = GPTNeoXForCausalLM.from_pretrained(written), random_ids(1, 9)
    places = {"gpt_neox": "cpu", "embed_out": "cpu", "gpt_neox.layers.1": "disk"}
    placed = GPTNeoXForCausalLM.from_pretrained(written, device_map=places)
    assert f"layers.0.mlp.dense_h_to_4h.{ABSMAX}" in model.source.origins
    assert torch.equal(placed(ids).logits, model(ids).logits)
    assert torch.equal(placed(ids).logits, model(ids).logits)  # once more, from the slots


def test_half_and_float_leave_codes_and_scales_alone(written):
    model = GPTNeoXForCausalLM.from_pretrained(written)
    before = {name: (t.dtype, t.data_ptr()) for name, t in model.state_dict().items() if "dense_4h_to_h.weight" in name}
    model.float().half()
    assert before == {name: (t.dtype, t.data_ptr()) for name, t in model.state_dict().items() if name in before}


def test_sizes_are_those_of_the_real_tensors(written):
    model = GPTNeoXForCausalLM.from_pretrained(written)
    sizes = sizes_of(model.config, formats_of(model.config.quantization_config), small_head=True)
    assert sizes.layers == tuple(sum(t.nbytes for t in layer.state_dict().values()) for layer in model.gpt_neox.layers)
    assert sizes.written == sizes.weights  # each pass on the CPU writes them out


def test_rows_that_are_no_whole_blocks_are_refused_by_name(tmp_path):
    GPTNeoXForCausalLM(GPTNeoXConfig(**{**SHAPE, "intermediate_size": 352})).save_pretrained(tmp_path / "odd")
    with pytest.raises(FormatError, match=r"dense_4h_to_h: in_features 352 is not divisible by nf4's block of 64"):
        convert(tmp_path / "odd", tmp_path / "out", format="nf4")


def test_a_group_size_means_nothing_to_nf4(plain, tmp_path):
    assert make_format("nf4", 64) == make_format("nf4") == NF4()
    with pytest.raises(FormatError, match="group_size is 128, but nf4 always has blocks of 64"):
        convert(plain, tmp_path / "out", format="nf4", group_size=128)


# Without bitsandbytes -------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_torch_multiplies_and_says_so_once(written, monkeypatch):
    ids = random_ids(1, 9)
    wanted = GPTNeoXForCausalLM.from_pretrained(written)(ids).logits
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    nf4.bitsandbytes.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"bitsandbytes cannot be imported.*pip install 'neox-lite\[nf4\]'"
        ) as told:
            found = GPTNeoXForCausalLM.from_pretrained(written)(ids).logits
        assert len(told) == 1 and relative(found, wanted) < 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GPTNeoXForCausalLM.from_pretrained(written)(ids)
    finally:
        nf4.bitsandbytes.cache_clear()


def test_importing_bitsandbytes_fetches_no_code_and_prints_nothing(bnb, tmp_path):
    """It would ask a package named kernels, where there is one, to fetch a kernel from the hub and load it."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*names, **options): print('fetched', flush=True)\n")
    code = (
        "from neox_lite.kernels import nf4; import sys; assert nf4.bitsandbytes() is not None; "
        "import kernels; assert kernels.get_kernel"
    )
    paths = [str(tmp_path), str(Path(__file__).parents[1]), str(Path(bnb.__file__).parents[1])]
    script = f"import sys; sys.path[:0] = {paths!r}; {code}"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout == "" and "kernels" not in out.stderr


# What is refused ------------------------------------------------------------------------------------------------------

GOOD = quantization_config(NF4())


@both
def test_a_config_reads_back_as_the_format_it_names(double):
    lookup = formats_of(json.loads(json.dumps(quantization_config(NF4(double), ["score"], torch.bfloat16))))
    assert lookup(FIRST) == NF4(double)
    assert lookup("score") == lookup("lm_head") == lookup("embed_out") == DENSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', expected 'nf4'"),
        ({"bnb_4bit_quant_type": ...}, "bnb_4bit_quant_type is 'fp4'"),  # bitsandbytes' default
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type is None, expected 'nf4'"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type is .*expected 'nf4'"),
        ({"load_in_4bit": False}, "load_in_4bit is False, expected True"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1, expected True"),
        ({"load_in_8bit": True, "load_in_4bit": False}, r"LLM.int8\(\).*neox-lite quantize SRC --format int8"),
        ({"_load_in_8bit": True}, r"LLM.int8\(\)"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16', expected 'uint8'"),
        ({"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype is 'int8', expected 'float32'"),
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant is 'yes', expected True or False"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is 'lm_head', expected a list"),
        ({"llm_int8_skip_modules": ["lm_head", 3]}, "llm_int8_skip_modules is .*expected a list"),
        ({"llm_int8_skip_modules": ["(lm_head"]}, r"llm_int8_skip_modules has the pattern '\(lm_head'"),
    ],
)
def test_other_schemes_of_bitsandbytes_are_refused_by_key(changes, message):
    with pytest.raises(FormatError, match=message):
        formats_of({key: value for key, value in {**GOOD, **changes}.items() if value is not ...})


def state(**changes):
    def change(tensors):
        name = f"{FIRST}.{STATE}"
        found = {**json.loads(bytes(tensors[name].tolist())), **changes}
        tensors[name] = as_bytes(json.dumps({key: v for key, v in found.items() if v is not None}))

    return change


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def put(key, make):
    def change(tensors):
        tensors[f"{FIRST}.{key}"] = make(tensors[f"{FIRST}.{key}"])

    return change


def spoiled(value, at=5):
    def make(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[at] = value
        return tensor

    return make


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("nf4", put(ABSMAX, lambda t: t[:-1]), r"weight.absmax is \[639\], expected \[640\]"),
        ("nf4", put(ABSMAX, lambda t: t.view(-1, 2)), r"weight.absmax is \[320, 2\], expected \[640\]"),
        ("nf4", put(ABSMAX, lambda t: t.double()), r"weight.absmax is float64, expected"),
        ("nf4", put(ABSMAX, lambda t: t.to(torch.uint8)), r"weight.absmax is uint8, expected"),
        ("nf4", put(ABSMAX, spoiled(float("nan"))), r"dense_h_to_4h.weight.absmax: holds values that are not finite"),
        ("nf4", put(ABSMAX, spoiled(float("-inf"))), r"dense_h_to_4h.weight.absmax: holds values that are not finite"),
        ("nf4", put("weight", lambda t: t[:-1]), r"dense_h_to_4h.weight is \[20479, 1\], expected \[20480, 1\]"),
        ("nf4", put("weight", lambda t: t.view(-1, 2).view(torch.bfloat16)), r"dense_h_to_4h.weight is \[10240, 1\]"),
        ("nf4", put("weight.quant_map", spoiled(0.3)), r"weight.quant_map: is not the table of nf4's 16 levels"),
        ("nf4", put("weight.quant_map", spoiled(float("nan"))), r"weight.quant_map: is not the table"),
        ("nf4", put("weight.quant_map", lambda t: t[:8]), r"weight.quant_map is \[8\], expected \[16\]"),
        ("nf4", state(quant_type="fp4"), r"bitsandbytes__nf4: quant_type is 'fp4', expected 'nf4'"),
        ("nf4", state(blocksize=128), r"blocksize is '128', expected 64"),
        ("nf4", state(blocksize=64.0), r"blocksize is '64.0', expected 64"),
        ("nf4", state(blocksize=True), r"blocksize is 'True', expected 64"),
        ("nf4", state(shape=[128, 320]), r"shape is '\[128, 320\]', expected \[320, 128\]"),
        ("nf4", state(shape=[1 << 40, 1 << 40]), r"shape is '\[1099511627776, 1099511627776\]', expected \[320, 128\]"),
        ("nf4", state(dtype="int8"), r"dtype is 'int8', expected 'float16'"),
        ("nf4", state(shape=None), r"expected an object with blocksize, dtype, quant_type, shape"),
        ("nf4", state(nested_offset=0.5), r"expected an object with blocksize, dtype, quant_type, shape"),
        ("nf4", put(STATE, lambda t: as_bytes("[]")), r"bitsandbytes__nf4: found a JSON list, expected an object"),
        ("nf4", put(STATE, lambda t: as_bytes('{"a": 1, "a": 2}')), r"bitsandbytes__nf4: .*key 'a' appears twice"),
        ("nf4", put(STATE, lambda t: as_bytes("[" * 256)), r"bitsandbytes__nf4: "),
        ("nf4", put(STATE, lambda t: as_bytes("\xff" * 9)[:9]), r"bitsandbytes__nf4: not valid JSON"),
        ("nf4", put(STATE, lambda t: t[:0]), r"bitsandbytes__nf4: not valid JSON"),
        ("nf4", put(STATE, lambda t: as_bytes(" " * 257)), r"bitsandbytes__nf4 is \[257\], expected \[256\]"),
        ("nf4", put(STATE, lambda t: t.view(-1, 2)), r"bitsandbytes__nf4 is \[128, 2\], expected \[256\]"),
        ("nf4-double", state(nested_offset="NaN"), r"nested_offset is 'NaN', expected a finite number"),
        ("nf4-double", state(nested_offset=1e300), r"nested_offset is '1e\+300', expected a finite number"),
        ("nf4-double", state(nested_offset=True), r"nested_offset is 'True', expected a finite number"),
        ("nf4-double", state(nested_blocksize=128), r"nested_blocksize is '128', expected 256"),
        ("nf4-double", state(nested_dtype="float16"), r"nested_dtype is 'float16', expected 'float32'"),
        (
            "nf4-double",
            put(NESTED_ABSMAX, spoiled(float("inf"), 1)),
            r"weight.nested_absmax: holds values that are not",
        ),
        ("nf4-double", put(NESTED_MAP, spoiled(float("nan"))), r"weight.nested_quant_map: holds values that are not"),
        ("nf4-double", put(NESTED_MAP, lambda t: t[:255]), r"weight.nested_quant_map is \[255\], expected \[256\]"),
        ("nf4-double", put(NESTED_ABSMAX, lambda t: t[:1]), r"weight.nested_absmax is \[1\], expected \[3\]"),
        ("nf4-double", put(ABSMAX, lambda t: t.float()), r"weight.absmax is float32, expected uint8"),
    ],
)
def test_a_quantization_state_that_cannot_be_is_refused_by_name(plain, tmp_path, format, change, message):
    convert(plain, tmp_path / "out", format=format)
    change_tensors(tmp_path / "out" / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("nf4", {"bnb_4bit_use_double_quant": True}, "missing: .*nested_absmax"),
        ("nf4-double", {"bnb_4bit_use_double_quant": False}, "unexpected: .*nested"),
        ("nf4", {"load_in_4bit": False, "load_in_8bit": True}, r"LLM.int8|too short"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused_by_name(plain, tmp_path, format, changes, message):
    convert(plain, tmp_path / "out", format=format)
    path = tmp_path / "out" / "config.json"
    change_json(path, quantization_config={**json.loads(path.read_text())["quantization_config"], **changes})
    if "load_in_8bit" in changes:  # refused before weights are read
        (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises((FormatError, CheckpointError), match=message):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "out")


def test_gguf_has_no_form_for_nf4(plain, tmp_path):
    from neox_lite_quant import export_gguf

    convert(plain, tmp_path / "out", format="nf4")
    with pytest.raises(FormatError, match="GGUF has no type that holds nf4"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_gguf(tmp_path / "out", tmp_path / "model.gguf")


@both
def test_verify_reads_a_folder_of_transformers_and_finds_a_table_of_other_levels(tmp_path, capsys, double):
    folder = by_transformers(tmp_path, double=double)
    assert main(["verify", str(folder)]) == 0
    change_tensors(folder / "model.safetensors", put("weight.quant_map", spoiled(0.3)))
    assert main(["verify", str(folder)]) == 1
    assert f"{FIRST}.weight.quant_map: is not the table" in capsys.readouterr().out
