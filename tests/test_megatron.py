"""EleutherAI's layer files: merged as they were split, by rows, columns, sums and averages; refusals; hostile pickles."""

import pytest
import torch
from support.faults import Bomb
from support.peers import difference, peer, random_ids
from support.refusals import refused

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.errors import CheckpointError, ConfigError
from neox_lite_app.cli import main
from neox_lite_quant import convert

SHAPE = {
    "vocab_size": 132,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
}
BLOCK = {
    **dict.fromkeys(["input_layernorm", "post_attention_layernorm"], "mean"),
    **dict.fromkeys(["attention.query_key_value", "mlp.dense_h_to_4h"], "rows"),
    **dict.fromkeys(["attention.dense", "mlp.dense_4h_to_h"], "columns"),
}


def split(values, how, parts):
    """What each GPU held of a tensor, written out plainly, and the whole that it stands for."""
    if how == "rows":
        return list(values.chunk(parts)), values
    if how == "columns" and values.dim() == 2:
        return [part.contiguous() for part in values.chunk(parts, dim=1)], values
    shares = [values * (i + 1) / parts for i in range(parts)]  # a norm's gains drift apart; biases are summed
    total = torch.stack([s.float() for s in shares]).sum(0)
    return shares, (total / parts if how == "mean" else total).to(values.dtype)


def layer_file(number, part):
    return f"layer_{number:02}-model_{part:02}-model_states.pt"


def write_layers(folder, parts, dtype=torch.float32):
    """Layer files of a random model, and that model as transformers has it."""
    model = peer(**SHAPE).to(dtype)
    state, files = model.state_dict(), {}

    def put(number, name, how, whole):
        shares, state[whole] = split(state[whole], how, parts)
        for part, share in enumerate(shares):
            files.setdefault((number, part), {})[name] = share.clone()

    put(0, "word_embeddings.weight", "rows", "gpt_neox.embed_in.weight")
    for i in range(SHAPE["num_hidden_layers"]):
        for name, how in BLOCK.items():
            for last in ("weight", "bias"):
                put(i + 2, f"{name}.{last}", how, f"gpt_neox.layers.{i}.{name}.{last}")
        for part in range(parts):
            files[i + 2, part]["attention.rotary_emb.inv_freq"] = torch.full((2,), 7.0)
    last = SHAPE["num_hidden_layers"] + 4
    put(last - 1, "norm.weight", "mean", "gpt_neox.final_layer_norm.weight")
    put(last - 1, "norm.bias", "mean", "gpt_neox.final_layer_norm.bias")
    put(last, "final_linear.weight", "rows", "lm_head.weight" if "lm_head.weight" in state else "embed_out.weight")
    folder.mkdir()
    for (number, part), tensors in files.items():
        torch.save(tensors, folder / layer_file(number, part))
    model.load_state_dict(state)
    GPTNeoXConfig(**model.config.to_dict()).save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    """A model in two parts, to be damaged."""
    write_layers(tmp_path / "model", 2)
    return tmp_path / "model"


@pytest.fixture(scope="module", params=[1, 2, 4])
def native(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "model"
    return folder, write_layers(folder, request.param)


def test_a_model_in_any_number_of_parts_gives_transformers_logits(native):
    folder, model = native
    ids = random_ids(2, 20, 132)
    ours = GPTNeoXForCausalLM.from_pretrained(folder, exact=True)
    assert difference(ours(ids).logits, model(ids).logits) < 1e-4  # float32, another order of sums
    merged = {k.replace("lm_head", "embed_out"): v for k, v in model.state_dict().items() if "rotary" not in k}
    found = {k: v for k, v in ours.state_dict().items() if k in merged}
    assert found.keys() == merged.keys() and all(torch.equal(found[k], merged[k]) for k in merged)


def test_it_is_quantized_as_the_same_weights_in_one_file_are(native, tmp_path):
    folder, model = native
    model.save_pretrained(tmp_path / "plain")
    convert(folder, tmp_path / "a", format="int8", group_size=32)
    convert(tmp_path / "plain", tmp_path / "b", format="int8", group_size=32)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_rows_across_parts_are_those_of_the_whole(native):
    with Checkpoint.open(native[0]) as checkpoint:
        for name in checkpoint.names():
            whole, count = checkpoint.tensor(name), checkpoint.info(name).shape[0]
            assert tuple(whole.shape) == checkpoint.info(name).shape
            middle = (count // 3, count - 1), (count // 2, count // 2 + 1)
            for start, stop in ((0, count), *middle, (5, 5), (count, count)):
                assert torch.equal(checkpoint.rows(name, start, stop), whole[start:stop]), name


def test_half_precision_sums_and_averages_are_rounded_once(tmp_path):
    model = write_layers(tmp_path / "model", 2, torch.float16)
    bias = "gpt_neox.layers.1.attention.dense.bias"
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        assert checkpoint.tensor(bias).dtype == torch.float16
        assert torch.equal(checkpoint.tensor(bias), model.state_dict()[bias])


def opening_is_refused(folder, words):
    refused(CheckpointError, words, Checkpoint.open, folder)


def test_missing_layers_and_parts_are_refused_by_name(folder, tmp_path):
    for name in (layer_file(3, 1), layer_file(6, 0)):
        kept = (folder / name).rename(tmp_path / name)
        opening_is_refused(folder, rf"missing: {name}")
        kept.rename(folder / name)
    torch.save({}, folder / layer_file(1, 0))
    opening_is_refused(folder, "13 layer files, expected 12; missing: none")
    torch.save({}, tmp_path / "layer_9999-model_9999-model_states.pt")
    opening_is_refused(tmp_path, r"1 layer files, expected 99980000; missing: layer_00-model_00")


FINAL, NOT_2D = "final_linear.weight", r"final_linear.weight is .*, expected 2 dimensions"
# layer, parts, a tensor in the place of the stored one (None: without), words of the message
DAMAGES = [
    (2, [1], "attention.dense.weight", torch.ones(63, 32), r"is .*, torch.float32 \[63, 32\] in another part"),
    (2, [1], "attention.dense.bias", None, r"attention.dense.bias is .*, missing in another part"),
    (2, [0], "mlp.gate.weight", torch.ones(2), r"mlp.gate.weight is not part of GPT-NeoX's layer 02"),
    *((7, [0, 1], FINAL, wrong, NOT_2D) for wrong in (torch.tensor(1.0), torch.ones(64), torch.ones(2, 2, 2))),
]


@pytest.mark.parametrize(("layer", "parts", "name", "tensor", "words"), DAMAGES)
def test_tensors_of_another_kind_are_refused_by_name(folder, layer, parts, name, tensor, words):
    for part in parts:
        path = folder / layer_file(layer, part)
        stored = {**torch.load(path, weights_only=True), name: tensor}
        torch.save({k: v for k, v in stored.items() if v is not None}, path)
    opening_is_refused(folder, words)


def test_a_hostile_pickle_does_nothing(folder, tmp_path):
    torch.save({"norm.weight": Bomb(tmp_path / "harm")}, folder / layer_file(6, 0))
    told = r"does not load as plain tensors \(weights_only\)"
    refused(CheckpointError, told, GPTNeoXForCausalLM.from_pretrained, folder)
    assert not (tmp_path / "harm").exists()


def test_a_part_outside_the_folder_is_not_read(folder, tmp_path):
    path = folder / layer_file(6, 0)
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    opening_is_refused(folder, "links outside the folder")


def test_a_folder_without_config_says_where_to_get_it(folder, capsys):
    (folder / "config.json").unlink()
    told = r"no config.json; .*copy that of the same model on the hub"
    refused(ConfigError, told, GPTNeoXForCausalLM.from_pretrained, folder)
    assert main(["info", str(folder)]) == 1
    assert "copy that of the same model" in capsys.readouterr().err
