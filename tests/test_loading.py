"""from_pretrained and save_pretrained: the same model both ways between here and transformers, and every misfit named."""

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.checkpoints import change_json, change_tensors
from support.peers import TINY, difference, ours, pair, peer, random_ids
from torch import Tensor

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
QUANTIZABLE = {"hidden_size": 128, "intermediate_size": 256}  # columns divisible by groups of 128
IDS = random_ids(1, 20)


@torch.no_grad()
def outputs(model: Any, ids: Tensor = IDS) -> Tensor:
    """What a model of any class computes, as one tensor."""
    found = model(ids, use_cache=False) if "Question" not in type(model).__name__ else model(ids)
    if hasattr(found, "start_logits"):
        return torch.stack((found.start_logits, found.end_logits))
    return found.last_hidden_state if "last_hidden_state" in found else found.logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as transformers writes it: a tiny untied language model in float32."""
    peer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# Both ways ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TASKS)
def test_opens_what_transformers_saves_and_is_opened_by_it(cls: str, tmp_path: Path) -> None:
    model, reference = pair(tmp_path / "theirs", cls, num_labels=3)
    expected = outputs(reference)
    assert difference(outputs(model), expected) <= EQUAL
    model.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, cls).from_pretrained(tmp_path / "ours")
    assert difference(outputs(again), expected) <= EQUAL
    auto = {"GPTNeoXForCausalLM": transformers.AutoModelForCausalLM}.get(cls)
    if auto is not None:
        assert difference(outputs(auto.from_pretrained(tmp_path / "ours")), expected) <= EQUAL


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saving_and_loading_changes_no_bit(tied: bool, tmp_path: Path) -> None:
    model, reference = pair(tmp_path / "theirs", tie_word_embeddings=tied, use_parallel_residual=False)
    for size in ("5GB", "60KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        shards = [load_file(path) for path in (tmp_path / size).glob("*.safetensors")]
        assert (len(shards) == 1) is (size == "5GB")
        if size == "60KB":
            assert all(sum(tensor.nbytes for tensor in shard.values()) <= 60_000 for shard in shards)
        again = GPTNeoXForCausalLM.from_pretrained(tmp_path / size)
        assert torch.equal(outputs(again), outputs(model))
        assert again.config == model.config
        assert (again.embed_out.weight is again.gpt_neox.embed_in.weight) is tied
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / size)
        assert difference(outputs(theirs), outputs(reference)) <= EQUAL


def test_opens_sharded_safetensors_of_transformers(tmp_path: Path) -> None:
    reference = peer()
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert difference(outputs(ours(reference, tmp_path)), outputs(reference)) <= EQUAL


def with_old_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as transformers 4.20 saved it: the head's old name, and buffers that are computed today."""
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in state.items()}
    for layer in range(TINY["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.full((4,), 7.0)  # wrong on purpose: never to be used
    return state


@pytest.mark.parametrize("shards", [1, 2])
def test_opens_old_bin_files_and_skips_exactly_their_buffers(shards: int, tmp_path: Path) -> None:
    reference = peer()
    reference.config.save_pretrained(tmp_path)
    state = with_old_buffers(reference.state_dict())
    if shards == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(state)
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, members in parts.items():
            torch.save({name: state[name] for name in members}, tmp_path / file)
        weight_map = {name: file for file, members in parts.items() for name in members}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert difference(outputs(ours(reference, tmp_path)), outputs(reference)) <= EQUAL


def test_a_base_model_opens_every_heads_checkpoint(tmp_path: Path) -> None:
    for cls in TASKS:
        reference = peer(cls)
        reference.save_pretrained(tmp_path / cls)
        base = getattr(reference, "gpt_neox", reference)
        assert difference(outputs(GPTNeoXModel.from_pretrained(tmp_path / cls)), outputs(base)) <= EQUAL


def test_a_language_model_opens_a_base_checkpoint_only_where_its_head_is_tied(tmp_path: Path) -> None:
    reference = peer(tie_word_embeddings=True)
    reference.gpt_neox.save_pretrained(tmp_path)
    assert difference(outputs(GPTNeoXForCausalLM.from_pretrained(tmp_path)), outputs(reference)) <= EQUAL
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"1 missing: embed_out\.weight"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", TASKS[2:])
def test_a_task_head_that_is_not_there_is_announced_and_random(cls: str, saved: Path) -> None:
    head = getattr(neox_lite, cls).head_name
    with pytest.warns(UserWarning, match=rf"has no .*{head}\.weight; initialized at random"):
        model = getattr(neox_lite, cls).from_pretrained(saved)
    assert torch.isfinite(outputs(model)).all()
    assert 0 < model.head.weight.std() < 0.1  # initializer_range is 0.02
    assert torch.equal(outputs(model.gpt_neox), outputs(GPTNeoXModel.from_pretrained(saved)))


def test_a_tied_head_may_be_stored_twice_but_not_differently(tmp_path: Path) -> None:
    reference = peer(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()

    change_tensors(tmp_path / "model.safetensors", add)
    assert difference(outputs(GPTNeoXForCausalLM.from_pretrained(tmp_path)), outputs(reference)) <= EQUAL
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors["embed_out.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"ties the head to the embedding, but embed_out\.weight differs"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path)


def test_a_model_may_be_saved_over_the_folder_it_came_from(tmp_path: Path) -> None:
    model, _ = pair(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    again = GPTNeoXForCausalLM.from_pretrained(tmp_path / "ours")
    expected = outputs(again)
    again.save_pretrained(tmp_path / "ours")  # the weights being written are mapped from the file being replaced
    assert torch.equal(outputs(again), expected)
    assert torch.equal(outputs(GPTNeoXForCausalLM.from_pretrained(tmp_path / "ours")), expected)


# Misfits --------------------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
        tensors["gpt_neox.layers.0.attention.rotary.weight"] = torch.ones(3)
        tensors["gpt_neox.final_layer_norm.weight"] = torch.ones(63)
        tensors["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] = torch.ones(64, 96, dtype=torch.int32)

    change_tensors(saved / "model.safetensors", spoil)
    with pytest.raises(CheckpointError) as caught:
        GPTNeoXForCausalLM.from_pretrained(saved)
    told = str(caught.value)
    assert str(saved) in told
    assert "1 missing: gpt_neox.layers.1.mlp.dense_h_to_4h.bias" in told
    assert "1 unexpected: gpt_neox.layers.0.attention.rotary.weight" in told
    assert "1 wrong shape: gpt_neox.final_layer_norm.weight is [63], expected [64]" in told
    assert "gpt_neox.layers.0.mlp.dense_4h_to_h.weight is int32, expected bfloat16 or float16 or float32" in told


def test_a_config_of_another_shape_is_named(saved: Path) -> None:
    change_json(saved / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"12 missing: gpt_neox\.layers\.2\."):
        GPTNeoXForCausalLM.from_pretrained(saved)
    change_json(saved / "config.json", num_hidden_layers=2, attention_bias=False)
    with pytest.raises(CheckpointError, match=r"4 unexpected: .*attention.*bias"):
        GPTNeoXForCausalLM.from_pretrained(saved)


def test_folders_that_are_no_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path)
    marker = tmp_path / "neox_lite_manifest.json.partial"
    marker.touch()
    with pytest.raises(ConfigError, match="unfinished; run the command that wrote it again"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path)
    marker.unlink()
    GPTNeoXConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights; looked for model\.safetensors and pytorch_model\.bin"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path)


def test_loading_does_not_wait_for_torchs_compiler(saved: Path) -> None:
    code = (
        "import sys; from neox_lite import GPTNeoXForCausalLM as M; "
        f"M.from_pretrained({str(saved)!r}); print('torch._dynamo' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_is_the_checkpoints_unless_asked_for(stored: torch.dtype, tmp_path: Path) -> None:
    reference = peer().to(stored)
    assert ours(reference, tmp_path).dtype == stored
    for given in ({"dtype": torch.float16}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}):
        model = GPTNeoXForCausalLM.from_pretrained(tmp_path, **given)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        assert model.config.dtype == "float16"
    assert GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == stored
    converted = GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).gpt_neox.embed_in.weight
    assert torch.equal(converted, reference.gpt_neox.embed_in.weight.to(torch.bfloat16))


def test_a_value_that_overflows_the_dtype_asked_for_is_an_error_and_not_infinity(saved: Path) -> None:
    def grow(tensors: dict[str, Tensor]) -> None:
        tensors["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"][0, 0] = 1e6

    change_tensors(saved / "model.safetensors", grow)
    with pytest.raises(FormatError, match=r"layers.0.mlp.dense_4h_to_h.weight: holds values that overflow float16"):
        GPTNeoXForCausalLM.from_pretrained(saved, dtype=torch.float16)
    assert GPTNeoXForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_config_dtype_beats_the_files(saved: Path) -> None:
    """As in transformers: a float32 file whose config says float16 is run as float16."""
    change_json(saved / "config.json", dtype="float16")
    assert GPTNeoXForCausalLM.from_pretrained(saved).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"trust_remote_code": True}, UnsupportedError, "trust_remote_code=...*code from checkpoints is never run"),
        ({"token": 5}, ArgumentError, "token is a int, expected a text, True or False"),
        ({"cache_dir": 5}, ArgumentError, "cache_dir is 5, expected the path of a folder"),
        ({"local_files_only": "yes"}, ArgumentError, "local_files_only is 'yes', expected True or False"),
        ({"ignore_mismatched_sizes": True}, UnsupportedError, "ignore_mismatched_sizes"),
        ({"quantisation": "int4"}, ArgumentError, "no option 'quantisation'; nearest is 'quantization'"),
        ({"num_beams": 4}, ArgumentError, "no option 'num_beams'"),
        ({"num_labels": -3}, ConfigError, "num_labels is -3, expected an integer of at least 1"),
        ({"vocab_size": 132}, CheckpointError, r"embed_in.weight.*132"),
        ({"dtype": "int8"}, ArgumentError, "dtype is 'int8', expected one of float32, float16, bfloat16"),
        ({"dtype": "float16", "torch_dtype": torch.bfloat16}, ArgumentError, "torch_dtype=.* and dtype=.* contradict"),
        ({"quantization": "int3"}, FormatError, "format is 'int3', expected one of int4, int8"),
        ({"quantization": ["int4"]}, FormatError, "expected one of int4, int8"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config of type dict"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ArgumentError, "load_in_4bit and load_in_8bit exclude"),
        ({"load_in_4bit": True, "quantization": "int8"}, ArgumentError, "load_in_4bit and quantization='int8'"),
        ({"head": "int4"}, ArgumentError, "head is 'int4', expected 'fp16' or 'int8'"),
        ({"config": {"vocab_size": 131}}, ArgumentError, "config is a dict, expected a GPTNeoXConfig"),
        ({"device_map": "gpu"}, ArgumentError, "device_map is 'gpu', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device_map": "mps"}, ArgumentError, "device_map is 'mps', expected"),
        ({"device_map": []}, ArgumentError, r"device_map is \[\], expected"),
        ({"device_map": ["cpu"]}, ArgumentError, r"device_map is \['cpu'\], expected"),
        ({"device_map": {"gpt_neox": "cpu"}}, ArgumentError, "device_map says nothing of embed_out"),
        ({"device_map": {"": "cpu", "lm_head": "cpu"}}, ArgumentError, "device_map names 'lm_head', which is no part"),
        ({"device_map": {"": "disk"}}, ArgumentError, "only layers can be on the disk"),
        ({"device_map": {"": "tape"}}, ArgumentError, "device_map is 'tape', expected"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, ArgumentError, "max_memory limits device_map='auto'"),
        ({"device_map": "auto", "max_memory": {"tpu": 1}}, ArgumentError, "max_memory names 'tpu', expected"),
        pytest.param(
            {"device_map": "auto", "max_memory": {0: 1}},
            ArgumentError,
            "max_memory names 0, but torch sees no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        ({"device_map": "auto", "context": 99999}, ArgumentError, "context is 99999, but the model's own context is"),
        ({"context": 0}, ArgumentError, "context is 0, expected a number of tokens"),
        ({"context": True}, ArgumentError, "context is True, expected a number of tokens"),
        ({"context": 64}, ArgumentError, "context is what device_map='auto' plans memory for"),
        ({"device_map": "auto", "max_memory": {"cpu": True}}, ArgumentError, "True is not a size"),
        ({"device_map": "auto", "max_memory": {"cpu": -1}}, ArgumentError, "-1 is not a size"),
        (
            {"device_map": {"": "cpu", "gpt_neox.layer.0": "cpu"}},
            ArgumentError,
            "nearest is 'gpt_neox.layers.0'; parts are",
        ),
        ({"max_memory": {"cpu": "1GiB"}}, ArgumentError, "max_memory limits device_map='auto'"),
        (
            {"device_map": "auto", "max_memory": {0: 0, "cpu": "1MB"}},
            ArgumentError,
            r"does not fit: \d+ MiB of CPU memory are missing, the process alone takes \d+; .* would",
        ),
        ({"device_map": "auto", "max_memory": {0: 0, "cpu": "much"}}, ArgumentError, "'much' is not a size"),
        ({"device_map": "auto", "max_memory": {0: 0, "cpu": []}}, ArgumentError, r"\[\] is not a size"),
        ({"device_map": "auto", "max_memory": "8GiB"}, ArgumentError, "max_memory is '8GiB', expected for instance"),
        ({"head": "int8"}, ArgumentError, "has no neox_lite_head.safetensors; head='int8' is for folders"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_honoured_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], told: str, saved: Path
) -> None:
    with pytest.raises(error, match=told) as caught:
        GPTNeoXForCausalLM.from_pretrained(saved, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
        {"trust_remote_code": False},
        {"attn_implementation": None},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"": "cpu"}},
        {"device_map": {"gpt_neox": "cpu", "embed_out": "cpu"}},
    ],
    ids=str,
)
def test_options_that_mean_what_happens_anyway_are_accepted(options: dict[str, Any], saved: Path) -> None:
    assert GPTNeoXForCausalLM.from_pretrained(saved, **options).device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA; this one has it")
@pytest.mark.parametrize("asked", ["cuda", "cuda:1", 0, {"": 0}, torch.device("cuda")], ids=str)
def test_asking_for_a_gpu_that_is_not_there_is_one_clear_line(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="torch sees no CUDA device here; use 'cpu' or 'auto'") as caught:
        # before the folder is looked at: nobody should wait for a download or a quantization to learn this
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "nothing", device_map=asked)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA; this one has it")
def test_auto_without_a_gpu_is_the_cpu(saved: Path) -> None:
    model = GPTNeoXForCausalLM.from_pretrained(saved, device_map="auto", max_memory={"cpu": "64GiB"})
    assert model.device.type == "cpu"


def test_config_stands_in_for_the_folders(saved: Path) -> None:
    config = GPTNeoXConfig.from_pretrained(saved, use_parallel_residual=False, rotary_pct=1.0)
    reference = transformers.GPTNeoXForCausalLM.from_pretrained(
        saved, config=transformers.GPTNeoXConfig(**config.to_dict())
    )
    for given in (config, reference.config):
        model = GPTNeoXForCausalLM.from_pretrained(saved, config=given)
        assert difference(outputs(model), outputs(reference)) <= EQUAL
    model.config.use_cache = False
    assert config.use_cache  # the caller's config is not the model's
    with pytest.warns(UserWarning, match="has no score.weight"):
        three = GPTNeoXForSequenceClassification.from_pretrained(saved, config=config.copy(num_labels=3))
    assert outputs(three).shape == (1, 3)


def test_settings_of_the_model_replace_those_of_the_folder(saved: Path) -> None:
    names = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
    with pytest.warns(UserWarning, match="has no score.weight"):
        model = GPTNeoXForSequenceClassification.from_pretrained(saved, problem_type="regression", **names)
    assert (model.config.id2label, model.config.problem_type) == (names["id2label"], "regression")
    assert outputs(model).shape == (1, 3)
    config = GPTNeoXConfig.from_pretrained(saved)
    one = GPTNeoXForCausalLM.from_pretrained(saved, config=config, use_cache=False, rotary_pct=1.0)
    assert (one.config.use_cache, one.config.rotary_pct, config.use_cache) == (False, 1.0, True)


@pytest.mark.parametrize("name", ["attn_implementation", "offload_folder", "offload_state_dict"])
def test_options_that_cannot_change_a_result_are_told(name: str, saved: Path) -> None:
    with pytest.warns(UserWarning, match=f"{name} is without effect: .* are ") as told:
        GPTNeoXForCausalLM.from_pretrained(saved, **{name: "sdpa"})
    assert told[0].filename == __file__


def test_a_models_source_says_where_it_came_from(saved: Path) -> None:
    model = GPTNeoXForCausalLM.from_pretrained(str(saved))
    assert (model.source.folder, model.source.name, model.source.revision) == (saved, str(saved), None)
    assert GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)).source.folder is None


# Zero copy ------------------------------------------------------------------------------------------------------------


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Addresses at which this process has a file mapped."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file.resolve()))]
    return [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]  # type: ignore[misc]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("writer", ["transformers", "neox_lite"])
def test_weights_of_the_files_own_dtype_are_mapped_and_not_copied(
    writer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, reference = pair(tmp_path / "first", dtype=dtype)
    (reference if writer == "transformers" else model).to(dtype).save_pretrained(tmp_path / "second")
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "second")
    ranges = mapped_ranges(tmp_path / "second" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name


def test_changing_a_mapped_weight_does_not_change_the_file(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    model = GPTNeoXForCausalLM.from_pretrained(saved)
    expected = outputs(model)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.zero_()
    assert not torch.equal(outputs(model), expected)
    assert (saved / "model.safetensors").read_bytes() == before
    assert torch.equal(outputs(GPTNeoXForCausalLM.from_pretrained(saved)), expected)


# Quantized while loading ----------------------------------------------------------------------------------------------


def linears(model: Any) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.format != DENSE}


@torch.no_grad()
def dequantized(model: Any, dense_folder: Path) -> Any:
    """The dense model of the same class with every quantized weight replaced by what its codes stand for."""
    dense = type(model).from_pretrained(dense_folder)
    for name, module in linears(model).items():
        dense.get_submodule(name).weight.copy_(module.handle.decode(torch.float32))
    return dense


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantizing_while_loading_equals_the_dequantized_model(
    name: str, tmp_path: Path, own_caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = peer(**QUANTIZABLE)
    reference.save_pretrained(tmp_path)
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization=name, exact=True)
    assert len(linears(model)) == 4 * TINY["num_hidden_layers"]
    assert {str(m.format.name) for m in linears(model).values()} == {name}
    # the same float32 weights after decoding, multiplied in the same order
    assert difference(outputs(model), outputs(dequantized(model, tmp_path))) <= EQUAL
    # and they are near the original: int8 keeps about 8 bits of each weight, int4 about 4
    error = (outputs(model) - outputs(reference)).square().mean().sqrt() / outputs(reference).std()
    assert error < {"int8": 0.02, "int4": 0.25}[name]

    said = capsys.readouterr().err
    (kept,) = (own_caches / "neox-lite").iterdir()  # beside the hub cache, in HF_HOME
    assert f"kept the quantized model in {kept}" in said
    shutil.move(tmp_path / "model.safetensors", tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / "model.safetensors")  # same bytes and time: still the same checkpoint
    again = GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization=name, exact=True)
    assert capsys.readouterr().err == ""  # nothing was quantized, so nothing is said
    assert [p.name for p in (own_caches / "neox-lite").iterdir()] == [kept.name]
    assert torch.equal(outputs(again), outputs(model))
    assert again.source == model.source  # its tokenizer is the checkpoint's, not the cache's
    if sys.platform == "linux":
        ranges = mapped_ranges(kept / "model.safetensors")
        packed = linears(again)["gpt_neox.layers.0.mlp.dense_h_to_4h"].weight_packed
        assert any(start <= packed.data_ptr() < end for start, end in ranges)


def test_a_changed_checkpoint_is_quantized_again(tmp_path: Path, own_caches: Path) -> None:
    peer(**QUANTIZABLE).save_pretrained(tmp_path)
    first = GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization="int8", exact=True)
    change_tensors(
        tmp_path / "model.safetensors", lambda tensors: {name: tensor * 0.5 for name, tensor in tensors.items()}
    )
    second = GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization="int8", exact=True)
    assert not torch.equal(outputs(first), outputs(second))
    assert difference(outputs(second), outputs(dequantized(second, tmp_path))) <= EQUAL
    GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization="int4", exact=True)
    GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization="int8", dtype=torch.float16)
    assert len(list((own_caches / "neox-lite").iterdir())) == 4  # one for each content, format and dtype


def test_a_damaged_copy_in_the_cache_says_what_to_delete(tmp_path: Path, own_caches: Path) -> None:
    peer(**QUANTIZABLE).save_pretrained(tmp_path / "m")
    GPTNeoXForCausalLM.from_pretrained(tmp_path / "m", quantization="int8")
    (kept,) = (own_caches / "neox-lite").iterdir()
    os.truncate(kept / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=f"{kept} only keeps what was quantized before: delete it"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "m", quantization="int8")


def test_load_in_bits_is_mapped_and_said(tmp_path: Path) -> None:
    peer(**QUANTIZABLE).save_pretrained(tmp_path)
    asked: list[tuple[dict[str, Any], str]] = [
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "int4"),
        ({"quantization_config": types.SimpleNamespace(load_in_4bit=True)}, "int4"),
    ]
    for options, name in asked:
        with pytest.warns(UserWarning, match=f"means quantization='{name}' here"):
            model = GPTNeoXForCausalLM.from_pretrained(tmp_path, **options)
        assert {m.format.name for m in linears(model).values()} == {name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = GPTNeoXForCausalLM.from_pretrained(tmp_path, load_in_8bit=False, load_in_4bit=False)
    assert not linears(plain)


def test_a_shape_that_groups_do_not_divide_is_named_before_anything_is_quantized(saved: Path, own_caches: Path) -> None:
    with pytest.raises(FormatError, match=r"layers\.0\.attention\.query_key_value: in_features 64 is not divisible"):
        GPTNeoXForCausalLM.from_pretrained(saved, quantization="int4")
    assert not (own_caches / "neox-lite").exists()


def test_a_quantized_folder_loads_as_it_is(tmp_path: Path, own_caches: Path) -> None:
    reference = peer(**QUANTIZABLE)
    reference.save_pretrained(tmp_path / "dense")
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "dense", quantization="int4", exact=True)
    model.save_pretrained(tmp_path / "int4")
    shutil.rmtree(own_caches / "neox-lite")
    for options in ({}, {"quantization": "int4"}):
        again = GPTNeoXForCausalLM.from_pretrained(tmp_path / "int4", exact=True, **options)
        assert torch.equal(outputs(again), outputs(model))
    with pytest.raises(FormatError, match=r"is quantized already \(int4\); leave quantization out"):
        GPTNeoXForCausalLM.from_pretrained(tmp_path / "int4", quantization="int8")
    assert not (own_caches / "neox-lite").exists()
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "int4")  # through compressed-tensors
    assert difference(outputs(theirs), outputs(model)) <= EQUAL


def test_a_random_head_is_not_kept_for_the_next_time(tmp_path: Path, own_caches: Path) -> None:
    peer(**QUANTIZABLE).save_pretrained(tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="has no score.weight; initialized at random"):
            GPTNeoXForSequenceClassification.from_pretrained(tmp_path, quantization="int8", exact=True)
    assert not (own_caches / "neox-lite").exists()


def test_a_cache_that_cannot_be_written_costs_only_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer(**QUANTIZABLE).save_pretrained(tmp_path / "dense")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))  # a file where a folder is needed
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "dense", quantization="int8", exact=True)
    assert linears(model)
    assert re.search(r"the quantized model could not be kept for the next start: .+", capsys.readouterr().err)


def test_moving_a_quantized_model_never_touches_codes_or_scales(tmp_path: Path) -> None:
    peer(**QUANTIZABLE).save_pretrained(tmp_path)
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path, quantization="int4", exact=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "weight_" in name}
    expected = outputs(model)
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    # only embedding, norms, biases and head are rounded to float16, by 2**-11 each
    assert difference(outputs(model), expected) < 0.02


def resident_share(path: Path) -> float:
    """Share of a file's pages that are in memory (Linux)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(view)), pages) == 0
        )
        del first  # else the map could not be closed
    return sum(page & 1 for page in pages) / len(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore's vector is Linux's")
def test_warming_brings_every_weight_into_memory(tmp_path: Path) -> None:
    GPTNeoXForCausalLM(GPTNeoXConfig(**{**TINY, "vocab_size": 50000})).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    if resident_share(path) > 0.5:
        pytest.skip("this file system keeps its pages in memory")
    model.warm()
    assert resident_share(path) == 1


def test_warming_tells_all_bytes_once_and_changes_none(tmp_path: Path) -> None:
    model = pair(tmp_path, tie_word_embeddings=True)[0]
    before, told = outputs(model), []
    model.warm(lambda done, total: told.append((done, total)))
    counts = [done for done, _ in told]
    assert told[-1] == (model.get_memory_footprint(),) * 2 and counts == sorted(set(counts))
    assert torch.equal(outputs(model), before)


def test_an_interrupt_ends_warming(tmp_path: Path) -> None:
    model = pair(tmp_path)[0]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.warm(interrupt)
