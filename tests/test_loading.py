"""from_pretrained and save_pretrained: the same model both ways between here and transformers, and every misfit named."""

import ctypes
import mmap
import os
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import change_json, change_tensors, write_shards
from support.commands import run_python
from support.peers import TINY, difference, ours, pair, peer, random_ids
from support.refusals import refused

import neox_lite
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel
from neox_lite.errors import ArgumentError, CheckpointError, ConfigError, FormatError, UnsupportedError
from neox_lite.formats import DENSE
from neox_lite.layers import Linear

# Both sides compute in float32 with the same weights: only the order of additions differs (see test_model.py).
EQUAL = 2e-5
TASKS = [
    "GPTNeoXForCausalLM",
    "GPTNeoXModel",
    "GPTNeoXForSequenceClassification",
    "GPTNeoXForTokenClassification",
    "GPTNeoXForQuestionAnswering",
]
QUANTIZABLE = {"hidden_size": 128, "intermediate_size": 256}
IDS = random_ids(1, 20)


@torch.no_grad()
def outputs(model, ids=IDS):
    """What a model of any class computes, as one tensor."""
    found = model(ids, use_cache=False) if "Question" not in type(model).__name__ else model(ids)
    if hasattr(found, "start_logits"):
        return torch.stack((found.start_logits, found.end_logits))
    return found.last_hidden_state if "last_hidden_state" in found else found.logits


load = GPTNeoXForCausalLM.from_pretrained


@pytest.fixture
def saved(tmp_path):
    """A folder as transformers writes it: a tiny untied language model in float32."""
    peer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def dense(tmp_path):
    """The same with columns divisible by groups of 128, to be quantized."""
    peer(**QUANTIZABLE).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


# Both ways ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TASKS)
def test_opens_what_transformers_saves_and_is_opened_by_it(cls, tmp_path):
    model, reference = pair(tmp_path / "theirs", cls, num_labels=3)
    expected = outputs(reference)
    assert difference(outputs(model), expected) <= EQUAL
    base = getattr(reference, "gpt_neox", reference)
    assert difference(outputs(GPTNeoXModel.from_pretrained(tmp_path / "theirs")), outputs(base)) <= EQUAL
    model.save_pretrained(tmp_path / "ours")
    names = [cls, *(["AutoModelForCausalLM"] if cls == "GPTNeoXForCausalLM" else [])]
    for name in names:
        again = getattr(transformers, name).from_pretrained(tmp_path / "ours")
        assert difference(outputs(again), expected) <= EQUAL


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saving_and_loading_changes_no_bit(tied, tmp_path):
    model, reference = pair(tmp_path / "theirs", tie_word_embeddings=tied, use_parallel_residual=False)
    for size in ("5GB", "60KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        shards = [load_file(path) for path in (tmp_path / size).glob("*.safetensors")]
        assert (len(shards) == 1) is (size == "5GB")
        if size == "60KB":
            assert all(sum(tensor.nbytes for tensor in shard.values()) <= 60_000 for shard in shards)
        again = load(tmp_path / size)
        assert torch.equal(outputs(again), outputs(model))
        assert again.config == model.config
        assert (again.embed_out.weight is again.gpt_neox.embed_in.weight) is tied
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / size)
        assert difference(outputs(theirs), outputs(reference)) <= EQUAL


def with_old_buffers(state):
    """The state dict as transformers 4.20 saved it: the head's old name, and buffers that are computed today."""
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in state.items()}
    for layer in range(TINY["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.full((4,), 7.0)  # wrong on purpose: never to be used
    return state


@pytest.mark.parametrize("kind", ["safetensors-shards", "bin", "bin-shards"])
def test_opens_shards_and_old_bin_files_and_skips_exactly_their_buffers(kind, tmp_path):
    reference = peer()
    if kind == "safetensors-shards":
        reference.save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    else:
        reference.config.save_pretrained(tmp_path)
        state = with_old_buffers(reference.state_dict())
        torch.save(state, tmp_path / "pytorch_model.bin")
    if kind == "bin-shards":
        (tmp_path / "pytorch_model.bin").unlink()
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        parts = {file: {name: state[name] for name in sorted(state)[i::2]} for i, file in enumerate(names)}
        write_shards(tmp_path, parts, "bin")
    assert difference(outputs(ours(reference, tmp_path)), outputs(reference)) <= EQUAL


@pytest.mark.parametrize("cls", TASKS[2:])
def test_a_task_head_that_is_not_there_is_announced_and_random(cls, saved):
    head = getattr(neox_lite, cls).head_name
    with pytest.warns(UserWarning, match=rf"has no .*{head}\.weight; initialized at random"):
        model = getattr(neox_lite, cls).from_pretrained(saved)
    assert torch.isfinite(outputs(model)).all()
    assert 0 < model.head.weight.std() < 0.1  # initializer_range is 0.02
    assert torch.equal(outputs(model.gpt_neox), outputs(GPTNeoXModel.from_pretrained(saved)))


def test_a_tied_head_may_be_missing_or_stored_twice_but_not_differently(tmp_path):
    reference = peer(tie_word_embeddings=True)
    reference.gpt_neox.save_pretrained(tmp_path / "base")
    assert difference(outputs(load(tmp_path / "base")), outputs(reference)) <= EQUAL
    change_json(tmp_path / "base" / "config.json", tie_word_embeddings=False)
    refused(CheckpointError, r"1 missing: embed_out\.weight", load, tmp_path / "base")
    reference.save_pretrained(tmp_path)
    path, embedding = tmp_path / "model.safetensors", "gpt_neox.embed_in.weight"
    change_tensors(path, lambda tensors: tensors | {"embed_out.weight": tensors[embedding].clone()})
    assert difference(outputs(load(tmp_path)), outputs(reference)) <= EQUAL
    change_tensors(path, lambda tensors: tensors["embed_out.weight"].add_(1))
    refused(CheckpointError, r"ties the head to the embedding, but embed_out\.weight differs", load, tmp_path)


def test_a_model_may_be_saved_over_the_folder_it_came_from(tmp_path):
    pair(tmp_path / "theirs")[0].save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    expected = outputs(again)
    again.save_pretrained(tmp_path / "ours")  # the weights being written are mapped from the file being replaced
    assert torch.equal(outputs(again), expected)
    assert torch.equal(outputs(load(tmp_path / "ours")), expected)


# Misfits --------------------------------------------------------------------------------------------------------------


def test_tensors_and_configs_that_do_not_fit_are_named(saved):
    change_json(saved / "config.json", num_hidden_layers=3)
    refused(CheckpointError, r"12 missing: gpt_neox\.layers\.2\.", load, saved)
    change_json(saved / "config.json", num_hidden_layers=2, attention_bias=False)
    refused(CheckpointError, r"4 unexpected: .*attention.*bias", load, saved)
    change_json(saved / "config.json", attention_bias=True)

    def spoil(tensors):
        del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
        tensors["gpt_neox.layers.0.attention.rotary.weight"] = torch.ones(3)
        tensors["gpt_neox.final_layer_norm.weight"] = torch.ones(63)
        tensors["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] = torch.ones(64, 96, dtype=torch.int32)

    change_tensors(saved / "model.safetensors", spoil)
    message = refused(CheckpointError, re.escape(str(saved)), load, saved)
    for words in (
        "1 missing: gpt_neox.layers.1.mlp.dense_h_to_4h.bias",
        "1 unexpected: gpt_neox.layers.0.attention.rotary.weight",
        "1 wrong shape: gpt_neox.final_layer_norm.weight is [63], expected [64]",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight is int32, expected bfloat16 or float16 or float32",
    ):
        assert words in message


def test_folders_that_are_no_models_are_named(tmp_path):
    refused(CheckpointError, "no such folder", load, tmp_path / "nothing")
    refused(ConfigError, r"no config\.json", load, tmp_path)
    marker = tmp_path / "neox_lite_manifest.json.partial"
    marker.touch()
    refused(ConfigError, "unfinished; run the command that wrote it again", load, tmp_path)
    marker.unlink()
    GPTNeoXConfig(**TINY).save_pretrained(tmp_path)
    refused(CheckpointError, r"no weights; looked for model\.safetensors and pytorch_model\.bin", load, tmp_path)


def test_loading_does_not_wait_for_torchs_compiler(saved):
    load_it = "import sys; from neox_lite import GPTNeoXForCausalLM as M; M.from_pretrained(sys.argv[1])"
    done = run_python(f"{load_it}; print('torch._dynamo' in sys.modules)", saved)
    assert (done.returncode, done.stdout.strip()) == (0, "False")


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_is_the_checkpoints_unless_asked_for(stored, tmp_path):
    reference = peer().to(stored)
    assert ours(reference, tmp_path).dtype == stored
    for given in ({"dtype": torch.float16}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}):
        model = load(tmp_path, **given)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert model.config.dtype == "float16"
    assert load(tmp_path, dtype="auto").dtype == stored
    converted = load(tmp_path, dtype=torch.bfloat16).gpt_neox.embed_in.weight
    assert torch.equal(converted, reference.gpt_neox.embed_in.weight.to(torch.bfloat16))
    # as in transformers, the config's dtype beats that of the file
    change_json(tmp_path / "config.json", dtype="float16")
    assert load(tmp_path).dtype == torch.float16


def test_a_value_that_overflows_the_dtype_asked_for_is_an_error_and_not_infinity(saved):
    weight = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    change_tensors(saved / "model.safetensors", lambda tensors: tensors[weight].view(-1)[0].fill_(1e6))
    told = r"layers.0.mlp.dense_4h_to_h.weight: holds values that overflow float16"
    refused(FormatError, told, load, saved, dtype=torch.float16)
    assert load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


AUTO = {"device_map": "auto"}
REFUSED = {
    UnsupportedError: [
        ({"trust_remote_code": True}, "trust_remote_code=...*code from checkpoints is never run"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes"),
        ({"quantization_config": {"bits": 4}}, "quantization_config of type dict"),
    ],
    ConfigError: [({"num_labels": -3}, "num_labels is -3, expected an integer of at least 1")],
    CheckpointError: [({"vocab_size": 132}, r"embed_in.weight.*132")],
    FormatError: [
        ({"quantization": "int3"}, "format is 'int3', expected one of int4, int8"),
        ({"quantization": ["int4"]}, "expected one of int4, int8"),
    ],
    ArgumentError: [
        ({"token": 5}, "token is a int, expected a text, True or False"),
        ({"cache_dir": 5}, "cache_dir is 5, expected the path of a folder"),
        ({"local_files_only": "yes"}, "local_files_only is 'yes', expected True or False"),
        ({"quantisation": "int4"}, "no option 'quantisation'; nearest is 'quantization'"),
        ({"num_beams": 4}, "no option 'num_beams'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, float16, bfloat16"),
        ({"dtype": "float16", "torch_dtype": torch.bfloat16}, "torch_dtype=.* and dtype=.* contradict"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude"),
        ({"load_in_4bit": True, "quantization": "int8"}, "load_in_4bit and quantization='int8'"),
        ({"head": "int4"}, "head is 'int4', expected 'fp16' or 'int8'"),
        ({"head": "int8"}, "has no neox_lite_head.safetensors; head='int8' is for folders"),
        ({"config": {"vocab_size": 131}}, "config is a dict, expected a GPTNeoXConfig"),
        ({"device_map": "gpu"}, "device_map is 'gpu', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device_map": "mps"}, "device_map is 'mps', expected"),
        ({"device_map": []}, r"device_map is \[\], expected"),
        ({"device_map": ["cpu"]}, r"device_map is \['cpu'\], expected"),
        ({"device_map": {"gpt_neox": "cpu"}}, "device_map says nothing of embed_out"),
        ({"device_map": {"": "cpu", "score": "cpu"}}, "device_map names 'score', which is no part"),
        ({"device_map": {"": "cpu", "gpt_neox.layer.0": "cpu"}}, "nearest is 'gpt_neox.layers.0'; parts are"),
        ({"device_map": {"": "disk"}}, "only layers can be on the disk"),
        ({"device_map": {"": "tape"}}, "device_map is 'tape', expected"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "max_memory limits device_map='auto'"),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory limits device_map='auto'"),
        ({**AUTO, "max_memory": {"tpu": 1}}, "max_memory names 'tpu', expected"),
        ({**AUTO, "max_memory": {"cpu": True}}, "True is not a size"),
        ({**AUTO, "max_memory": {"cpu": -1}}, "-1 is not a size"),
        ({**AUTO, "max_memory": {0: 0, "cpu": "much"}}, "'much' is not a size"),
        ({**AUTO, "max_memory": {0: 0, "cpu": []}}, r"\[\] is not a size"),
        ({**AUTO, "max_memory": "8GiB"}, "max_memory is '8GiB', expected for instance"),
        (
            {**AUTO, "max_memory": {0: 0, "cpu": "1MB"}},
            r"does not fit: \d+ MiB of CPU memory are missing, the process alone takes \d+; .* would",
        ),
        ({**AUTO, "context": 99999}, "context is 99999, but the model's own context is"),
        ({"context": 0}, "context is 0, expected a number of tokens"),
        ({"context": True}, "context is True, expected a number of tokens"),
        ({"context": 64}, "context is what device_map='auto' plans memory for"),
    ],
}


@pytest.mark.parametrize(
    ("error", "options", "told"),
    [(error, *case) for error, cases in REFUSED.items() for case in cases],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_honoured_are_refused_by_name(error, options, told, saved):
    refused(error, told, load, saved, **options)


ACCEPTED = [{"low_cpu_mem_usage": True}, {"use_safetensors": True}, {"trust_remote_code": False}]
ACCEPTED += [{"attn_implementation": None}, {"device_map": "cpu"}, {"device_map": torch.device("cpu")}]
ACCEPTED += [{"device_map": {"": "cpu"}}, {"device_map": {"gpt_neox": "cpu", "embed_out": "cpu"}}]


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_options_that_mean_what_happens_anyway_are_accepted(options, saved):
    assert load(saved, **options).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA; this one has it")
def test_without_a_gpu_asking_for_one_is_one_clear_line_and_auto_is_the_cpu(saved):
    for asked in ("cuda", "cuda:1", 0, {"": 0}, torch.device("cuda")):
        # before the folder is looked at: nobody should wait for a download or a quantization to learn this
        told = "torch sees no CUDA device here; use 'cpu' or 'auto'"
        refused(ArgumentError, told, load, saved / "nothing", device_map=asked)
    told = "max_memory names 0, but torch sees no CUDA device here"
    refused(ArgumentError, told, load, saved, **AUTO, max_memory={0: 1})
    assert load(saved, **AUTO, max_memory={"cpu": "64GiB"}).device.type == "cpu"


def test_config_stands_in_for_the_folders(saved):
    config = GPTNeoXConfig.from_pretrained(saved, use_parallel_residual=False, rotary_pct=1.0)
    theirs = transformers.GPTNeoXConfig(**config.to_dict())
    reference = transformers.GPTNeoXForCausalLM.from_pretrained(saved, config=theirs)
    for given in (config, reference.config):
        model = load(saved, config=given)
        assert difference(outputs(model), outputs(reference)) <= EQUAL
    model.config.use_cache = False
    one = load(saved, config=config, use_cache=False, rotary_pct=0.5)
    assert (one.config.use_cache, one.config.rotary_pct) == (False, 0.5)
    assert (config.use_cache, config.rotary_pct) == (True, 1.0)  # the caller's config is not the model's


def test_settings_of_a_head_replace_those_of_the_folder(saved):
    names = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
    config = GPTNeoXConfig.from_pretrained(saved).copy(num_labels=3)
    for given in ({"config": config}, {"problem_type": "regression", **names}):
        with pytest.warns(UserWarning, match="has no score.weight"):
            model = GPTNeoXForSequenceClassification.from_pretrained(saved, **given)
        assert outputs(model).shape == (1, 3)
    assert (model.config.id2label, model.config.problem_type) == (names["id2label"], "regression")


@pytest.mark.parametrize("name", ["attn_implementation", "offload_folder", "offload_state_dict"])
def test_options_that_cannot_change_a_result_are_told(name, saved):
    with pytest.warns(UserWarning, match=f"{name} is without effect: .* are ") as told:
        GPTNeoXForCausalLM.from_pretrained(saved, **{name: "sdpa"})
    assert told[0].filename == __file__


def test_a_models_source_says_where_it_came_from(saved):
    source = load(str(saved)).source
    assert (source.folder, source.name, source.revision) == (saved, str(saved), None)
    assert GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)).source.folder is None


# Zero copy ------------------------------------------------------------------------------------------------------------


def is_mapped(tensor, file):
    """Whether a tensor lies where this process has a file mapped."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file.resolve()))]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    return any(start <= tensor.data_ptr() < end for start, end in ranges)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", ["transformers", "neox_lite"])
def test_weights_of_the_files_own_dtype_are_mapped_and_not_copied(writer, dtype, tmp_path):
    model, reference = pair(tmp_path / "first", dtype=dtype)
    (reference if writer == "transformers" else model).to(dtype).save_pretrained(tmp_path / "second")
    for name, parameter in load(tmp_path / "second").named_parameters():
        assert is_mapped(parameter, tmp_path / "second" / "model.safetensors"), name


def test_changing_a_mapped_weight_does_not_change_the_file(saved):
    before = (saved / "model.safetensors").read_bytes()
    model = load(saved)
    expected = outputs(model)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.zero_()
    assert not torch.equal(outputs(model), expected)
    assert (saved / "model.safetensors").read_bytes() == before
    assert torch.equal(outputs(load(saved)), expected)


# Quantized while loading ----------------------------------------------------------------------------------------------


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.format != DENSE}


def formats(model):
    return {str(m.format.name) for m in linears(model).values()}


@torch.no_grad()
def dequantized(model, dense_folder):
    """The dense model of the same class with every quantized weight replaced by what its codes stand for."""
    dense = type(model).from_pretrained(dense_folder)
    for name, module in linears(model).items():
        dense.get_submodule(name).weight.copy_(module.handle.decode(torch.float32))
    return dense


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantizing_while_loading_equals_the_dequantized_model(name, dense, own_caches, capsys):
    original = outputs(load(dense, exact=True))
    model = load(dense, quantization=name, exact=True)
    assert len(linears(model)) == 4 * TINY["num_hidden_layers"] and formats(model) == {name}
    # the same float32 weights after decoding, multiplied in the same order
    assert difference(outputs(model), outputs(dequantized(model, dense))) <= EQUAL
    # and they are near the original: int8 keeps about 8 bits of each weight, int4 about 4
    error = (outputs(model) - original).square().mean().sqrt() / original.std()
    assert error < {"int8": 0.02, "int4": 0.25}[name]

    (kept,) = (own_caches / "neox-lite").iterdir()  # beside the hub cache, in HF_HOME
    assert f"kept the quantized model in {kept}" in capsys.readouterr().err
    shutil.move(dense / "model.safetensors", dense / "aside")
    (dense / "aside").rename(dense / "model.safetensors")  # same bytes and time: still the same checkpoint
    again = load(dense, quantization=name, exact=True)
    assert capsys.readouterr().err == ""  # nothing was quantized, so nothing is said
    assert [p.name for p in (own_caches / "neox-lite").iterdir()] == [kept.name]
    assert torch.equal(outputs(again), outputs(model))
    assert again.source == model.source  # its tokenizer is the checkpoint's, not the cache's
    if sys.platform == "linux":
        packed = linears(again)["gpt_neox.layers.0.mlp.dense_h_to_4h"].weight_packed
        assert is_mapped(packed, kept / "model.safetensors")


def test_a_changed_checkpoint_is_quantized_again_and_a_damaged_copy_says_what_to_delete(dense, own_caches):
    first = load(dense, quantization="int8", exact=True)
    change_tensors(dense / "model.safetensors", lambda tensors: {n: tensor * 0.5 for n, tensor in tensors.items()})
    second = load(dense, quantization="int8", exact=True)
    assert not torch.equal(outputs(first), outputs(second))
    assert difference(outputs(second), outputs(dequantized(second, dense))) <= EQUAL
    load(dense, quantization="int4", exact=True)
    load(dense, quantization="int8", dtype=torch.float16)
    kept = list((own_caches / "neox-lite").iterdir())
    assert len(kept) == 4  # one for each content, format and dtype
    for folder in kept:
        os.truncate(folder / "model.safetensors", 5000)
    told = f"({'|'.join(map(str, kept))}) only keeps what was quantized before: delete it"
    refused(CheckpointError, told, load, dense, quantization="int8")


def test_load_in_bits_is_mapped_and_said(dense):
    for options, name in (
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "int4"),
        ({"quantization_config": types.SimpleNamespace(load_in_4bit=True)}, "int4"),
    ):
        with pytest.warns(UserWarning, match=f"means quantization='{name}' here"):
            assert formats(load(dense, **options)) == {name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not formats(load(dense, load_in_8bit=False, load_in_4bit=False))


def test_a_shape_that_groups_do_not_divide_is_named_before_anything_is_quantized(saved, own_caches):
    told = r"layers\.0\.attention\.query_key_value: in_features 64 is not divisible"
    refused(FormatError, told, load, saved, quantization="int4")
    assert not (own_caches / "neox-lite").exists()


def test_a_quantized_folder_loads_as_it_is(dense, tmp_path, own_caches):
    model = load(dense, quantization="int4", exact=True)
    model.save_pretrained(tmp_path / "int4")
    shutil.rmtree(own_caches / "neox-lite")
    for options in ({}, {"quantization": "int4"}):
        assert torch.equal(outputs(load(tmp_path / "int4", exact=True, **options)), outputs(model))
    told = r"is quantized already \(int4\); leave quantization out"
    refused(FormatError, told, load, tmp_path / "int4", quantization="int8")
    assert not (own_caches / "neox-lite").exists()
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "int4")  # through compressed-tensors
    assert difference(outputs(theirs), outputs(model)) <= EQUAL


def test_a_random_head_is_not_kept_for_the_next_time(dense, own_caches):
    for _ in range(2):
        with pytest.warns(UserWarning, match="has no score.weight; initialized at random"):
            GPTNeoXForSequenceClassification.from_pretrained(dense, quantization="int8", exact=True)
    assert not (own_caches / "neox-lite").exists()


def test_a_cache_that_cannot_be_written_costs_only_the_next_start(dense, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))  # a file where a folder is needed
    assert linears(load(dense, quantization="int8", exact=True))
    assert re.search(r"the quantized model could not be kept for the next start: .+", capsys.readouterr().err)


def test_moving_a_quantized_model_never_touches_codes_or_scales(dense):
    model = load(dense, quantization="int4", exact=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "weight_" in name}
    expected = outputs(model)
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    # only embedding, norms, biases and head are rounded to float16, by 2**-11 each
    assert difference(outputs(model), expected) < 0.02


def resident_share(path):
    """Share of a file's pages that are in memory (Linux)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        address, length = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view))
        assert ctypes.CDLL(None).mincore(address, length, pages) == 0
        del first  # else the map could not be closed
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore's vector is Linux's")
def test_warming_brings_every_weight_into_memory(tmp_path):
    GPTNeoXForCausalLM(GPTNeoXConfig(**{**TINY, "vocab_size": 50000})).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    model = load(tmp_path)
    if resident_share(path) > 0.5:
        pytest.skip("this file system keeps its pages in memory")
    model.warm()
    assert resident_share(path) == 1


def test_warming_tells_all_bytes_once_changes_none_and_can_be_interrupted(tmp_path):
    model = pair(tmp_path, tie_word_embeddings=True)[0]
    before, told = outputs(model), []
    model.warm(lambda done, total: told.append((done, total)))
    counts = [done for done, _ in told]
    assert told[-1] == (model.get_memory_footprint(),) * 2 and counts == sorted(set(counts))
    assert torch.equal(outputs(model), before)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.warm(interrupt)
