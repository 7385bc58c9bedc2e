"""LoRA adapters that peft made: the same numbers as peft's, over plain and quantized weights, wherever the model runs."""

import copy
import json
import pickle
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import peers
from support.checkpoints import change_json, change_tensors
from support.fake_hub import FakeHub
from support.machine import known_machine
from support.peers import difference, random_ids
from support.refusals import refused
from support.simulated_accelerator import SimulatedAccelerator

import neox_lite
from neox_lite import GPTNeoXForCausalLM
from neox_lite.checkpoint.adapter import Settings
from neox_lite.errors import ArgumentError, CheckpointError, ConfigError, HubError, UnsupportedError
from neox_lite.kernels import dispatch, reference
from neox_lite.kernels.graphs import EagerRunner
from neox_lite.layers import Linear, LowRank
from neox_lite.loading.apply import move_parts
from neox_lite.loading.quantized_cache import cache_root
from neox_lite.offload.run import Placement
from neox_lite_app.paths import DEMO

peft = pytest.importorskip("peft", reason="peft is not installed")

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
IDS = random_ids(2, 9)
EQUAL = 1e-4  # of logits of order one, in float32 with sums in another order
EVERY = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
EACH_RANK = {"rank_pattern": {"query_key_value": 7, "layers.1.mlp.dense_h_to_4h": 20}}
EACH_ALPHA = {"alpha_pattern": {r"layers\.0\.\w+\.dense": 30, "dense_4h_to_h": 1}}
SETTINGS = {
    "peft's default": {},
    "all": {"target_modules": "all-linear", "r": 16},
    "a pattern": {"target_modules": r".*\.(0\.attention\.dense|1\.mlp\.dense_\w+)", "lora_alpha": 3},
    "patterns of ranks": {"target_modules": EVERY, **EACH_RANK, **EACH_ALPHA},
    "root of the rank": {"target_modules": EVERY, "use_rslora": True, "alpha_pattern": {"dense": 5}},
    "some layers": {"target_modules": EVERY, "layers_to_transform": [1], "exclude_modules": ["mlp.dense_h_to_4h"]},
    "a layer by pattern": {"target_modules": ["dense"], "layers_to_transform": 0, "layers_pattern": ["layers"]},
    "what training alone looks at": {"lora_dropout": 0.5, "init_lora_weights": "gaussian", "fan_in_fan_out": True},
}


def train(model, folder, **settings):
    """An adapter as after training, with nothing left at zero: the model with it, and what peft saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is for others
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.normal_(0, 0.3)
        adapted.save_pretrained(folder)
    return adapted


def trained(tmp_path, cls="GPTNeoXForCausalLM", residual=True, **settings):
    """(base folder, adapter folder, peft's model)."""
    model = peers.peer(cls, use_parallel_residual=residual, **SHAPE)
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")  # what the adapter then names as its base
    return tmp_path / "base", tmp_path / "adapter", train(model, tmp_path / "adapter", **settings)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """(base folder, folder of an adapter of all linear layers, peft's model); nobody changes them."""
    return trained(tmp_path_factory.mktemp("every"), target_modules=EVERY, r=16)


@pytest.fixture
def changed(every, tmp_path):
    """A copy of that adapter's folder, to change."""
    return shutil.copytree(every[1], tmp_path / "changed")


def load(base, adapter, **options):
    return GPTNeoXForCausalLM.from_pretrained(base, **{"adapter": adapter, "exact": True, **options})


@pytest.fixture(scope="module")
def model(every):
    """The base with that adapter, which nobody changes."""
    return load(*every[:2])


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_equal_peft_s(tmp_path, settings, residual):
    base, adapter, theirs = trained(tmp_path, residual=residual, **settings)
    model = load(base, adapter)
    assert difference(logits(model), logits(theirs)) < EQUAL
    assert difference(logits(model), logits(GPTNeoXForCausalLM.from_pretrained(base))) > 0.1
    assert model.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("format", ["int4", "int8", "nf4"])
def test_logits_equal_peft_s_over_the_same_quantized_weights(every, format):
    base, adapter, _ = every
    model = load(base, adapter, quantization=format)
    rounded = peers.peer(**SHAPE)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Linear) and name != "embed_out":
                rounded.get_submodule(name).weight.copy_(module.handle.decode(torch.float32))
    theirs = peft.PeftModel.from_pretrained(rounded, adapter).eval()
    assert difference(logits(model), logits(theirs)) < EQUAL
    assert model.gpt_neox.layers[0].attention.dense.format.name == format


def test_greedy_text_equals_peft_s_also_in_batches_and_with_drafts(every, model):
    base, _, theirs = every
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = theirs.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options).tolist()
    assert model.generate(IDS, **options).tolist() == expected
    assert model.generate(IDS[:1], **options).tolist() == expected[:1]
    draft = GPTNeoXForCausalLM.from_pretrained(base)
    assert model.generate(IDS[:1], assistant_model=draft, **options).tolist() == expected[:1]


TASKS = {
    "GPTNeoXModel": ("FEATURE_EXTRACTION", ["last_hidden_state"]),
    "GPTNeoXForSequenceClassification": ("SEQ_CLS", ["logits"]),
    "GPTNeoXForTokenClassification": ("TOKEN_CLS", ["logits"]),
    "GPTNeoXForQuestionAnswering": ("QUESTION_ANS", ["start_logits", "end_logits"]),
}


@pytest.mark.parametrize("cls", TASKS)
def test_other_classes_take_the_head_that_the_adapter_brings(tmp_path, cls):
    (task, names), language = TASKS[cls], peers.peer(**SHAPE)
    language.save_pretrained(tmp_path / "base")
    model = peers.peer(cls, pad_token_id=0, **SHAPE)
    state = language.gpt_neox.state_dict() if cls == "GPTNeoXModel" else language.state_dict()
    model.load_state_dict(state, strict=False)
    theirs = train(model, tmp_path / "adapter", task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no head is left to chance
        found = getattr(neox_lite, cls).from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    seen = found(IDS, attention_mask=torch.ones_like(IDS))
    assert all(difference(getattr(seen, name), getattr(expected, name)) < EQUAL for name in names)
    if task == "SEQ_CLS":  # a class leaves the heads of others alone
        change_json(tmp_path / "adapter" / "adapter_config.json", task_type="CAUSAL_LM")
        assert load(tmp_path / "base", tmp_path / "adapter").adapter is not None


def test_an_old_adapter_in_a_bin_file_is_read_too(every, model, changed):
    torch.save(load_file(changed / "adapter_model.safetensors"), changed / "adapter_model.bin")
    (changed / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(load(every[0], changed)), logits(model))


# Where it runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "int4"], ids=["dense", "int4"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_agree(every, backend, format):
    module = dispatch.load(backend)
    device = torch.device("cuda" if torch.cuda.is_available() and backend == "triton" else "cpu")
    if (reason := module.why_not(device)) is not None:
        pytest.skip(reason)
    model = load(every[0], every[1], quantization=format)
    model.ops = reference
    ids = random_ids(1, 70 if backend == "cpu" else 3)  # more than kernels for few tokens take; others are interpreted
    expected = logits(model, ids), logits(model, ids[:, :1])
    model = model.to(device)
    model.ops = module.bind(True)
    for found, wanted in zip((logits(model, ids), logits(model, ids[:, :1])), expected, strict=True):
        assert difference(found.cpu(), wanted) < EQUAL


def test_eight_bit_activations_are_for_the_base_alone(every):
    """Rounding them costs half a percent of a product; the adapter's part has none of it."""
    models = [load(*every[:2], quantization="int8", exact=exact) for exact in (True, False)]
    for model in models:
        for module in model.gpt_neox.layers.modules():
            if isinstance(module, LowRank):
                module.B.mul_(100)  # now the adapter is nearly all there is
    expected, found = map(logits, models)
    assert 0 < difference(found, expected) < 0.02 * expected.std()


@pytest.mark.parametrize("format", [None, "int4"], ids=["dense", "int4"])
def test_a_captured_step_equals_an_eager_one(every, format):
    model = load(every[0], every[1], quantization=format, exact=False)
    found = []
    for captured in (True, False):
        pool = model.new_pool()
        block_tables = [pool.new(), pool.new()]
        model.step(pool, block_tables, IDS.tolist())
        passes = model.runner.passes
        if not captured:
            model.runner.passes = EagerRunner(model.runner._forward, None)
        found.append([model.step(pool, block_tables, [[5 + i], [9 + i]]) for i in range(3)])
        if captured and model.ops.name == "cpu":
            assert passes.graphs(pool)[2, 2] is not None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_steps_that_are_graphs_choose_the_same_tokens():
    triton = pytest.importorskip("neox_lite.kernels.triton", reason="triton is not installed")
    from support.simulated_graphs import SimulatedGraphs
    from test_graphs import generate, graphed, ids, small

    if not triton.interpreted():
        pytest.skip("a GPU is there: tests/test_gpu.py captures on it")
    model, device = small(), SimulatedGraphs()
    for module in list(model.gpt_neox.layers.modules()):
        if isinstance(module, Linear):
            shapes = (8, module.in_features), (module.out_features, 8)
            module.adapter = LowRank(*(torch.randn(shape).mul(0.3).to(model.dtype) for shape in shapes))
    graphed(model, device)
    prompts, options = ids(3), [{"max_new_tokens": 3}]
    with device:
        found = generate(model, prompts, options)
        assert device.replays > 0 and model.graph_reason is None
        model.graph = False
        model.forget()
        assert generate(model, prompts, options) == found


@pytest.mark.parametrize("tiers", [("disk", "cpu"), ("disk", "gpu"), ("cpu", "gpu"), ("disk", "disk")], ids="-".join)
def test_the_adapter_goes_where_its_layers_go(every, tiers):
    base, adapter, theirs = every
    model = load(base, adapter)
    gpu = "gpu" in tiers
    device = SimulatedAccelerator() if gpu else None
    move_parts(model, Placement(tiers, "cpu", "gpu" if gpu else "cpu", 4 if gpu else None), device)
    if not gpu:
        model.ops = reference
    pool = model.new_pool(4)
    for tensor in (*pool.storage, *pool.scales):
        if gpu:
            device.adopt(tensor)
    found = torch.stack([model.step(pool, [pool.new()], [row]).cpu()[0] for row in IDS.tolist()])
    assert difference(found, logits(theirs)[:, -1]) < EQUAL


def test_a_plan_counts_the_adapter(every, monkeypatch):
    known_machine(monkeypatch)
    base, adapter, theirs = every
    model = load(base, adapter, device_map="auto", quantization="int4")
    actual = tuple(sum(t.nbytes for t in (*x.parameters(), *x.buffers())) for x in model.base_model.blocks)
    assert model.plan.sizes.layers == actual
    assert sum(model.plan.sizes.adapter) == 4 * (theirs.num_parameters() - peers.peer(**SHAPE).num_parameters())
    on_disk = load(base, adapter, device_map={"": "cpu", "gpt_neox.layers.0": "disk"})
    assert on_disk.placement.layers == ("disk", "cpu") and difference(logits(on_disk), logits(theirs)) < EQUAL
    # bytes of layers on the disk stay in memory for the adapter alone
    whole = load(base, adapter, device_map="auto").plan
    moved, layer, part = replace(whole, disk_layers=1), whole.sizes.layers[0], whole.sizes.adapter[0]
    assert part > 0
    assert moved.parts["disk"]["weights"] == layer - part
    assert moved.parts["cpu"]["weights"] == whole.parts["cpu"]["weights"] - layer + part


# What a model with one is ---------------------------------------------------------------------------------------------


def test_casts_and_copies_take_the_adapter_along(every):
    model = load(*every[:2])
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    footprint = model.get_memory_footprint()
    model.half()
    assert model.gpt_neox.layers[0].attention.dense.adapter.A.dtype == torch.float16
    assert model.get_memory_footprint() < 0.6 * footprint
    assert difference(logits(model.float()), expected) < 0.1
    half = load(*every[:2], dtype="float16").gpt_neox.layers[1].mlp.dense_h_to_4h.adapter
    assert {half.A.dtype, half.B.dtype} == {torch.float16}
    prefix = "gpt_neox.layers.0.attention.dense.adapter"
    assert [n for n in model.state_dict() if n.startswith(prefix)] == [f"{prefix}.A", f"{prefix}.B"]


def test_kept_prefixes_end_when_the_adapter_changes(every):
    model, options = load(*every[:2]), {"max_new_tokens": 8, "do_sample": False}
    before = model.generate(IDS[:1], **options)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.B.neg_()
    after = model.generate(IDS[:1], **options)
    model.forget()
    assert after.tolist() == model.generate(IDS[:1], **options).tolist() != before.tolist()


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(model, tmp_path):
    told = r"runs with the adapter .*adapter, whose folder is as it was; .*merge_and_unload"
    refused(UnsupportedError, told, model.save_pretrained, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_kept_of_a_quantized_base_has_no_adapter(every):
    base, adapter, _ = every
    first = logits(load(base, adapter, quantization="int4"))
    (kept,) = cache_root().iterdir()
    plain = GPTNeoXForCausalLM.from_pretrained(kept)
    assert plain.adapter is None and not any("adapter" in name for name in plain.state_dict())
    again = load(base, adapter, quantization="int4")
    assert torch.equal(logits(again), first) and again.adapter.name == str(adapter)


class Counted:
    """The reference operations; calls: the names of those that were called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        found = getattr(reference, name)
        return lambda *given, **options: self.calls.append(name) or found(*given, **options)


@pytest.mark.parametrize(("adapted", "linears"), [(False, 2), (True, 2 + 2 * 4)])
def test_without_an_adapter_the_operations_are_called_as_ever(every, adapted, linears):
    """Two layers; an adapter adds the products of A and of B for each pair of inputs."""
    model = load(every[0], every[1] if adapted else None)
    model.ops = counted = Counted()
    model(IDS)
    names = ("layer_norms", "grouped_linear", "attention", "linear_residual")
    assert [counted.calls.count(name) for name in names] == [2, linears, 2, 2]


# Where it comes from --------------------------------------------------------------------------------------------------


def test_an_adapter_s_folder_stands_for_its_base_with_it(every, changed, tmp_path):
    base, adapter, theirs = every
    open_model, expected = GPTNeoXForCausalLM.from_pretrained, logits(theirs)
    model = open_model(adapter)
    assert difference(logits(model), expected) < EQUAL
    assert model.adapter.name == str(adapter) and model.source.folder == base
    for named, error, told in (
        (tmp_path / "gone", CheckpointError, r"changed: an adapter whose base model cannot be had: .*gone': no such f"),
        (None, CheckpointError, "names no base model; pass that model, and adapter="),
        (adapter, ConfigError, "holds a LoRA adapter and no model"),
    ):
        change_json(changed / "adapter_config.json", base_model_name_or_path=named and str(named))
        refused(error, told, open_model, changed)
        assert difference(logits(load(base, changed)), expected) < EQUAL
    shutil.copytree(base, changed, dirs_exist_ok=True)
    refused(ArgumentError, r"holds both an adapter .* and a model .*pass adapter=", open_model, changed)
    assert difference(logits(load(changed, changed)), expected) < EQUAL


@pytest.fixture
def hub(every, monkeypatch, tmp_path):
    files = [{path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} for folder in every[:2]]
    settings = json.loads(files[1]["adapter_config.json"])
    files[1]["adapter_config.json"] = json.dumps({**settings, "base_model_name_or_path": "ann/base"}).encode()
    with FakeHub() as hub:
        hub.add("ann/base", files[0])
        hub.add("ann/adapter", files[1])
        hub.stand_in(monkeypatch, tmp_path)
        yield hub


def test_hub_ids_work_in_both_places(every, hub, run):
    for model in (GPTNeoXForCausalLM.from_pretrained("ann/adapter"), load("ann/base", "ann/adapter")):
        assert difference(logits(model), logits(every[2])) < EQUAL
        assert model.adapter.name == "ann/adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(hub.fetched())
    assert "README.md" not in hub.fetched()
    refused(HubError, r"ann/base: has no adapter_config\.json; not an adapter", load, every[0], "ann/base")
    code, out, _ = run("info", "ann/adapter")
    assert code == 0 and "base        ann/base" in out
    code, _, err = run("quantize", "ann/adapter", "out")
    assert code == 1 and "ann/adapter: holds a LoRA adapter and no model; run it beside its base" in err


# What is refused ------------------------------------------------------------------------------------------------------


SETTINGS_REFUSED = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; adapters here are LoRA"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora is True: DoRA"),
    ({"bias": "all"}, "bias is 'all': it changes the base model's biases"),
    ({"lora_bias": True}, "lora_bias is True: its B has a bias"),
    ({"modules_to_save": ["embed_out", "score"]}, "modules_to_save has 'embed_out': the adapter brings whole weights"),
    ({"trainable_token_indices": [5]}, "trainable_token_indices is .5.: it changes rows of the embedding"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is .*: it runs layers several times"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': training began with another base"),
    ({"of_next_year": {"a": 1}}, "of_next_year is .*: this setting is not known here; merge it"),
    ({"r": "many"}, "r is 'many', expected a number above 0"),
    ({"r": 2.5}, "r is 2.5, expected a whole number"),
    ({"lora_alpha": -1}, "lora_alpha is -1, expected a number above 0"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": [7]}, "target_modules is .7., expected a list of names, or a pattern"),
    ({"target_modules": "("}, r"target_modules has the pattern '\('"),
    (
        {"target_modules": ["q_proj", "v_proj"]},
        "target_modules is .*, which names no linear layer of this model; they are query_key_value",
    ),
    ({"alpha_pattern": {"dense": "x"}}, "alpha_pattern is .*, expected numbers above 0 by module name"),
    ({"layers_to_transform": ["one"]}, "layers_to_transform is .*, expected numbers of layers"),
]


@pytest.mark.parametrize(("keys", "message"), SETTINGS_REFUSED, ids=[next(iter(keys)) for keys, _ in SETTINGS_REFUSED])
def test_settings_that_cannot_be_honoured_are_refused_by_name(every, changed, keys, message):
    change_json(changed / "adapter_config.json", **keys)
    errors = (UnsupportedError, ConfigError, CheckpointError)
    refused(errors, f"adapter_config.json: {message}", load, every[0], changed)


FIRST = "base_model.model.gpt_neox.layers.0.attention.dense.lora_A.weight"


def added(old, new):
    """A change that copies FIRST to another name."""
    return lambda t: t.update({FIRST.replace(old, new): t[FIRST]})


HEAD = (
    r"LoRA on gpt_neox.embed_in is not supported, only that of linear layers in the blocks and of a head .*; merge it"
)
NAN = "dense.lora_A.weight holds values that are not finite; train or fetch"
SMALLER = r"shape: \S*dense.lora_A.weight is \[3, 128\], expected \[16,"
TENSORS = {
    "missing": (lambda t: t.pop(FIRST), r"1 missing: \S*layers.0.attention.dense.lora_A.weight"),
    "shape": (lambda t: t.update({FIRST: t[FIRST][:3].clone()}), SMALLER),
    "dtype": (lambda t: t.update({FIRST: t[FIRST].int()}), r"1 wrong dtype: \S*dense.lora_A.weight is int32"),
    "layer": (added(".0.", ".2."), r"1 unexpected: \S*layers.2.attention.dense.lora_A"),
    "module": (added("dense", "sparse"), r"1 unexpected: \S*attention.sparse.lora_A"),
    "kind": (added("lora_A.weight", "lora_magnitude_vector"), "1 unexpected"),
    "head": (added("layers.0.attention.dense", "embed_in"), HEAD),
    "nan": (lambda t: t[FIRST].fill_(float("nan")), NAN),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_are_named(every, changed, change, message):
    change_tensors(changed / "adapter_model.safetensors", change)
    told = refused((CheckpointError, UnsupportedError), message, load, every[0], changed)
    assert "adapter_model.safetensors: " in told


def test_files_that_are_not_whole_are_refused(every, changed, tmp_path):
    base, path = every[0], changed / "adapter_model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(CheckpointError, r"adapter_model\.safetensors", load, base, changed)
    path.unlink()
    told = r"no weights of the adapter; looked for adapter_model\.safetensors and"
    refused(CheckpointError, told, load, base, changed)
    (changed / "adapter_model.bin").write_bytes(b"PK\x03\x04" + bytes(50))
    refused(CheckpointError, r"adapter_model\.bin: does not load as plain tensors", load, base, changed)
    for text in ("{", "[]", '{"r": NaN}'):
        (changed / "adapter_config.json").write_text(text)
        refused((CheckpointError, ConfigError), r"adapter_config\.json", load, base, changed)
    told = r"no adapter_config\.json; an adapter's folder holds it and adapter_model"
    refused(ConfigError, told, load, base, base)
    refused(CheckpointError, "no such folder", load, base, tmp_path / "none")
    refused(ArgumentError, r"adapter is .*, expected one folder or hub id", load, base, [every[1]])
    train(peers.peer(**{**SHAPE, "num_hidden_layers": 3}), tmp_path / "larger")
    refused(CheckpointError, r"2 unexpected: \S*layers.2.attention", load, base, tmp_path / "larger")


def test_values_beyond_float16_are_refused_there(every, changed):
    change_tensors(changed / "adapter_model.safetensors", lambda t: t[FIRST].fill_(1e5))
    assert load(every[0], changed).dtype == torch.float32
    told = r"layers.0.attention.dense: holds values that overflow float16"
    refused(neox_lite.NeoxLiteError, told, load, every[0], changed, dtype="float16")


def test_a_module_s_scale_is_peft_s(every):
    settings = Settings.read(every[1])
    theirs = every[2].base_model.model.gpt_neox.layers[0].attention.dense
    assert settings.scale_of("gpt_neox.layers.0.attention.dense") == theirs.scaling["default"] == 0.5


# On the command line --------------------------------------------------------------------------------------------------


def test_commands_that_run_a_model_take_an_adapter(tmp_path, monkeypatch, run):
    known_machine(monkeypatch)
    adapter = tmp_path / "adapter"
    train(transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), adapter, r=8)
    given = ["generate", DEMO, "--prompt", "ROMEO:", "--max-new-tokens", "12", "--temperature", "0", "--json"]
    texts = []
    # the draft is the base alone
    for extra in ([], ["--adapter", adapter], ["--adapter", adapter, "--draft", DEMO]):
        code, out, err = run(*given, *extra)
        texts.append(json.loads(out)["text"])
        assert code == 0 and (f", adapter {adapter}," in err) == bool(extra)
    assert texts[0] != texts[1] == texts[2]


def test_info_says_what_an_adapter_is(every, run):
    code, shown, _ = run("info", every[1])
    assert code == 0
    assert "LoRA adapter, rank 16, scale 0.5" in shown and f"base        {every[0]}" in shown and "16 tensors" in shown
    found = json.loads(run("info", every[1], "--json")[1])
    assert (found["rank"], found["alpha"], found["targets"], found["base"]) == (16, 8, sorted(EVERY), str(every[0]))
    assert found["stored_bytes"] == 4 * 2 * 16 * (128 + 384 + 128 + 128 + 128 + 256 + 256 + 128)


NO_MODEL = "holds a LoRA adapter and no model"
COMMANDS = [
    ("quantize ADAPTER out", f"{NO_MODEL}; run it beside its base"),
    ("plan ADAPTER", f"{NO_MODEL}; run it beside its base"),
    ("export ADAPTER out.gguf", NO_MODEL),
    ("serve --adapter ADAPTER", "--adapter goes with MODEL"),
    ("serve MODEL --adapter ADAPTER --engine vllm", "--adapter is for the engine here"),
    ("bench --shape 2x64x2 --adapter ADAPTER", "--adapter goes with MODEL only"),
    ("generate ADAPTER --prompt a --adapter ADAPTER", NO_MODEL),
]


@pytest.mark.parametrize(("words", "message"), COMMANDS)
def test_commands_say_in_one_line_what_an_adapter_is_not(every, words, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known_machine(monkeypatch)
    names = {"ADAPTER": every[1], "MODEL": every[0]}
    code, out, err = run(*(names.get(word, word) for word in words.split()))
    assert (code, out) == (1, "") and message in err and len(err.strip().splitlines()) == 1
