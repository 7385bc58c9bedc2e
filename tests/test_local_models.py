"""The list of local models: what each place holds, and that nothing in there can break it."""

import json
import os
import shutil

import pytest
from huggingface_hub import constants
from support.checkpoints import change_json

from neox_lite import GPTNeoXForCausalLM
from neox_lite.loading.quantized_cache import cache_root
from neox_lite_app.models.local_models import describe, local_models
from neox_lite_app.paths import DEMO, data_folder


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The working folder of a machine without any model, which has data and a hub cache of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("NEOX_LITE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "work"


def copy(folder, **config):
    """The demo model in a folder, with changes to its config.json."""
    shutil.copytree(DEMO, folder)
    change_json(folder / "config.json", **config)
    return folder


def in_hub_cache(hub, repo, commit="0a" * 20, ref="main", weights=True):
    home = hub / f"models--{repo.replace('/', '--')}"
    snapshot = copy(home / "snapshots" / commit)
    if not weights:
        (snapshot / "model.safetensors").unlink()
    (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    return snapshot


def test_a_machine_without_models_has_an_empty_list(run):
    assert local_models() == []
    code, out, _ = run("list")
    assert code == 0 and "no models here" in out


def test_every_place_is_looked_at_and_named_as_commands_take_it(work, tmp_path):
    copy(work / "here")
    mine, given = copy(data_folder("models") / "mine"), copy(tmp_path / "given")
    others = copy(tmp_path / "others" / "other")
    snapshot = in_hub_cache(tmp_path / "hub", "EleutherAI/pythia-14m")
    GPTNeoXForCausalLM.from_pretrained(DEMO, quantization="int4")
    (kept,) = cache_root().iterdir()
    found = {model.name: model for model in local_models([given, tmp_path / "others"])}
    assert {name: (model.path, model.where) for name, model in found.items()} == {
        **{str(folder): (str(folder), "folder") for folder in (given, others, mine)},
        "here": ("here", "folder"),
        "EleutherAI/pythia-14m": (str(snapshot), "hub"),
        str(kept): (str(kept), "quantized"),
    }
    assert all(model.problem is None for model in found.values())
    assert found[str(kept)].format == "int4 g128" and not found[str(kept)].tokenizer
    for name in (str(given), "here", str(kept)):
        GPTNeoXForCausalLM.from_pretrained(name)


def test_a_row_and_json_say_format_size_and_shape(work, run):
    copy(work / "here")
    (model,) = local_models()
    size = (DEMO / "model.safetensors").stat().st_size
    assert (model.format, model.bytes, model.layers, model.hidden, model.heads) == ("float16", size, 4, 256, 4)
    figures = "3.95 million parameters, float16, 7.90 MB, 4 layers, hidden 256, 4 heads, context 512"
    assert describe(model) == f"here  {figures}"
    code, out, _ = run("list", "--json")
    (row,) = json.loads(out)["models"]
    assert code == 0 and row["name"] == "here" and row["parameters"] == 3945984
    assert row["tokenizer"] and row["problem"] is None


def test_a_folder_is_listed_once_and_the_current_one_may_be_a_model_itself(work, tmp_path, monkeypatch):
    real = copy(tmp_path / "real")
    (work / "link").symlink_to(real)
    assert [model.path for model in local_models([real, work / "link", tmp_path])] == [str(real)]
    monkeypatch.chdir(real)
    assert [model.name for model in local_models()] == ["."]


def test_other_architectures_and_other_folders_are_left_out(work):
    copy(work / "llama", model_type="llama")
    (work / "website").mkdir()
    (work / "website" / "config.json").write_text('{"port": 80}')
    copy(work / ".hidden")
    assert local_models() == []


def test_shards_are_counted_and_missing_ones_said(work):
    folder = copy(work / "sharded")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (model,) = local_models()
    size = (folder / "a.safetensors").stat().st_size
    assert model.problem == "1 of 2 weight files are missing" and model.bytes == size
    (folder / "b.safetensors").write_bytes(b"123")
    (model,) = local_models()
    assert model.problem is None and model.bytes == size + 3


def test_the_hub_cache_is_listed_by_revision(tmp_path):
    in_hub_cache(tmp_path / "hub", "o/m")
    in_hub_cache(tmp_path / "hub", "o/m", commit="0b" * 20, ref="step/1000")
    in_hub_cache(tmp_path / "hub", "o/half", weights=False)
    found = {(model.name, model.revision): model for model in local_models()}
    assert set(found) == {("o/m", None), ("o/m", "step/1000"), ("o/half", None)}
    assert found["o/half", None].problem == "no weight files" and "no weight files" in describe(found["o/half", None])


def test_hostile_folders_do_not_break_the_list(work):
    good = copy(work / "good")
    (work / "loop").symlink_to(work / "loop")
    (work / "up").symlink_to(work)
    (work / "dangling").symlink_to(work / "nowhere")
    bad = {
        "huge": lambda path: path.write_bytes(b"{" + b" " * (17 << 20) + b"}"),
        "broken": lambda path: path.write_text("{"),
        "nested": lambda path: path.write_text("[" * 100_000),
        "binary": lambda path: path.write_bytes(b"\xff\xfe"),
        "wrong": lambda path: path.write_text('{"model_type": "gpt_neox", "hidden_size": -1}'),
        "evil": lambda path: path.write_text('{"model_type": "gpt_neox", "auto_map": {"AutoModel": "x.y"}}'),
    }
    for name, write in bad.items():
        (work / name).mkdir()
        write(work / name / "config.json")
    for name, target in (("device", "/dev/zero"), ("self", "config.json")):
        (work / name).mkdir()
        (work / name / "config.json").symlink_to(target)
    (work / "pipe").mkdir()
    os.mkfifo(work / "pipe" / "config.json")
    index = copy(work / "index")
    (index / "model.safetensors").unlink()
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../../etc/passwd"}}')
    scheme = copy(work / "scheme", quantization_config={"quant_method": "gptq"})
    found = {model.name: model for model in local_models()}
    assert set(found) == {good.name, index.name, scheme.name, *bad}
    for name in (*bad, index.name, scheme.name):
        assert found[name].problem and "\n" not in found[name].problem and describe(found[name])
    assert found["good"].problem is None


def test_a_hostile_hub_cache_does_not_break_the_list(tmp_path):
    in_hub_cache(tmp_path / "hub", "o/good")
    for name, text in (("outside", "../../../etc"), ("long", "0" * 10_000), ("gone", "0c" * 20)):
        refs = tmp_path / "hub" / f"models--o--{name}" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(text)
    (tmp_path / "hub" / "models--").mkdir()
    (tmp_path / "hub" / "models--o--loop").symlink_to(tmp_path / "hub" / "models--o--loop")
    assert [model.name for model in local_models()] == ["o/good"]


def test_a_folder_that_was_asked_for_and_cannot_be_read_is_said(tmp_path, monkeypatch):
    (absent,) = local_models([tmp_path / "absent"])
    assert absent.problem == "cannot be listed: No such file or directory"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read every folder")
    (model,) = local_models([closed])
    assert "Permission denied" in model.problem


def test_names_of_folders_do_not_control_the_terminal(work, run):
    copy(work / "\x1b[31mred")
    code, out, _ = run("list")
    assert code == 0 and "red" in out and "\x1b" not in out
