"""neox-lite push against a fake hub: what is uploaded, the model card, refusals."""

import json
import re
import shutil

import pytest
from huggingface_hub import constants
from support.checkpoints import flip
from support.fake_hub import FakeHub

from neox_lite.errors import ArgumentError
from neox_lite_app.models.model_card import license_in, read_rows
from neox_lite_app.paths import DEMO

TOKEN = "hf_of-ann"
HERE = "ann/demo-int4"
ROWS = [
    {"path": "/home/ann/secret/demo", "format": "float16", "bits_per_weight": 16.0, "perplexity": 23.1, "kl": 0.0, "top1": 1.0,
     "bytes": 8000000},
    {"path": "/home/ann/secret/int4|x", "format": "int4 g128", "bits_per_weight": 4.125, "perplexity": 23.5, "kl": 0.0123,
     "top1": 0.945, "bytes": 3200000},
]  # fmt: skip


@pytest.fixture
def folder(demo_int4, tmp_path):
    return shutil.copytree(demo_int4, tmp_path / "int4")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with FakeHub(tokens={TOKEN: "ann"}) as hub:
        hub.stand_in(monkeypatch, tmp_path, TOKEN)
        yield hub


@pytest.fixture
def push(hub, folder, run):
    """Push the folder; stdout and stderr."""

    def call(*words):
        code, out, err = run("push", folder, *words)
        assert code == 0, err
        return out, err

    return call


@pytest.fixture
def refused(hub, folder, run):
    """The one line that says why a push is refused."""

    def call(*words):
        code, out, err = run("push", folder, *words)
        assert (code, out) == (1, "") and "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("neox-lite: error: ")]
        return line

    return call


@pytest.fixture
def measured(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps({"rows": ROWS}))
    return tmp_path / "quality.json"


def change_manifest(folder, change):
    manifest = json.loads((folder / "neox_lite_manifest.json").read_text())
    change(manifest)
    (folder / "neox_lite_manifest.json").write_text(json.dumps(manifest))


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_the_model_alone_arrives_whole_in_one_commit(hub, folder, push):
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("notes.txt", "other.safetensors.partial", ".env"):
        (folder / name).write_text("mine")
    out, err = push(HERE)
    commit, files = hub.find(HERE, "main")
    assert out == f"{hub.url}/{HERE}/commit/{commit}\n"
    assert {name: files[name] for name in sent} == sent
    assert files.keys() - sent.keys() == {".gitattributes", "README.md"}
    assert sum(request.path.endswith("/commit/main") for request in hub.requests) == 1
    assert HERE in hub.public and "model.safetensors" in err and "in all" in err


@pytest.mark.parametrize("name", ["generation_config.json", "README.md"])
def test_a_link_out_of_the_folder_is_not_followed(hub, folder, refused, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    change_manifest(folder, lambda manifest: manifest["files"].pop(name, None))
    assert "links outside the folder" in refused("ann/x") and hub.requests == []


def test_private_repositories_and_branches_are_made(hub, push):
    push(HERE, "--private", "--revision", "g128")
    assert HERE not in hub.public
    assert "config.json" in hub.files_of(HERE, "g128") and "config.json" not in hub.files_of(HERE)
    push(HERE, "--private", "--revision", "g128")  # again: nothing stands in the way


def test_a_public_repository_does_not_become_private_in_silence(hub, push, refused):
    push(HERE)
    before = hub.find(HERE, "main")
    assert "exists and is public, which --private does not change" in refused(HERE, "--private")
    assert hub.find(HERE, "main") == before


def test_weights_of_another_model_are_not_mixed_with(hub, refused):
    hub.add(HERE, {"model-00001-of-00002.safetensors": b"x", "config.json": b"{}"})
    assert "holds model-00001-of-00002.safetensors of another model; push to another repository" in refused(HERE)


def test_a_damaged_folder_is_not_uploaded(hub, folder, refused):
    flip(folder / "model.safetensors", 1_000_000)
    error = refused("ann/x")
    assert "SHA-256 differs" in error and "nothing was uploaded" in error and hub.requests == []


def test_a_dry_run_sends_nothing_and_needs_no_token(hub, folder, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    found = json.loads(push(HERE, "--dry-run", "--json")[0])
    assert found["url"] is None and found["bytes"] == sum(found["files"].values()) and found["card"].startswith("---\n")
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert hub.requests == []


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_carries_the_measured_table_and_no_paths(hub, push, measured):
    push(HERE, "--compare", measured, "--base-model", "ann/demo", "--license", "apache-2.0")
    card = hub.files_of(HERE)["README.md"].decode()
    assert card.split("---")[1].strip().splitlines() == [
        *("license: apache-2.0", "base_model: ann/demo", "base_model_relation: quantized"),
        *("pipeline_tag: text-generation", "tags:", "- gpt_neox", "- neox-lite", "- int4", "- g128"),
    ]
    assert "| demo | float16 | 16.000 | 8,000,000 | 23.1000 | 0.000000 | 100.00% |" in card
    assert r"| int4\|x | int4 g128 | 4.125 | 3,200,000 | 23.5000 | 0.012300 | 94.50% |" in card
    assert f"neox-lite chat {HERE}" in card and "secret" not in card and "Not measured" not in card


def test_results_in_the_folder_are_found_and_a_card_without_any_says_so(folder, push):
    out, err = push(HERE, "--dry-run")
    assert "Not measured. `neox-lite compare" in out and "the card says that quality was not measured" in err
    assert "license:" not in out and "base_model:" not in out
    (folder / "neox_lite_compare.json").write_text(json.dumps({"rows": ROWS}))
    assert "| 4.125 |" in push(HERE, "--dry-run")[0]


def test_the_license_is_that_of_the_base_models_card(hub, folder, push):
    hub.add("ann/base", {"README.md": b"---\nlicense: 'MIT'\n---\n# Base", "config.json": b"{}"})
    change_manifest(folder, lambda manifest: manifest.update(source_name="ann/base"))
    assert "license: mit\nbase_model: ann/base\n" in push(HERE, "--dry-run")[0]
    hub.down = True
    out, err = push(HERE, "--dry-run", "--base-model", "ann/gone")
    assert "base_model: ann/gone" in out and "license:" not in out and "the card names no license: ann/gone" in err


def test_ones_own_card_is_uploaded_as_it_is(hub, folder, push, refused, measured):
    (folder / "README.md").write_text("# Mine\n")
    push(HERE)
    assert hub.files_of(HERE)["README.md"] == b"# Mine\n"
    assert "is the card; move it away" in refused(HERE, "--compare", measured)


def test_the_table_is_what_compare_prints(folder, run, push, heldout, tmp_path):
    _, out, _ = run("compare", DEMO, folder, "--text", heldout, "--context", 128, "--windows", 2, "--json")
    (tmp_path / "quality.json").write_text(out)
    card, _ = push("ann/demo", "--dry-run", "--compare", tmp_path / "quality.json")
    assert re.search(r"^\| demo\\_model \| float16 \| 16\.000 \|.*\| 0\.000000 \| 100\.00% \|$", card, re.MULTILINE)
    assert re.search(r"^\| int4 \| int4 g128 \| 4\.125 \|", card, re.MULTILINE)


NAN = '{"rows": [' + json.dumps(ROWS[0])[:-1] + ', "kl": NaN}]}'


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": []}', '{"rows": [1]}', '{"rows": [{"path": "x"}]}', NAN])
def test_what_compare_did_not_print_is_refused(tmp_path, content):
    (tmp_path / "quality.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"--compare .*quality.json"):
        read_rows(tmp_path / "quality.json")
    with pytest.raises(ArgumentError, match="No such file"):
        read_rows(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("card", "license"),
    [("---\nlicense: apache-2.0\n---\n", "apache-2.0"), ("---\ntags: x\n---\nlicense: mit", None), ("license: mit", None),
     ("---\nlicense: a b\n---", "a"), ("---\nlicense: $x\n---", None), ("", None)],
)  # fmt: skip
def test_a_license_is_read_from_front_matter_alone(card, license):
    assert license_in(card) == license


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(([name], "a hub id is OWNER/NAME") for name in ("x", "a/b/c", "ann/..", "https://host/x", "ann/x y")),
        (["ann/x", "--dry-run", "--base-model", "no id"], "--base-model is 'no id'"),
        (["ann/x", "--dry-run", "--license", "x\ny: z"], "--license is"),
        (["bob/x"], "refuses it (403); the token needs the right to write to bob"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(refused, words, message):
    assert message in refused(*words)


def test_a_missing_or_wrong_token_no_network_and_a_refused_card_are_one_line(hub, refused, monkeypatch, tmp_path):
    for token, message in (
        (None, "uploading needs a token that may write: set HF_TOKEN, or run `hf auth login`"),
        ("hf_unknown", "the hub refuses it (401); the token needs the right to write to ann"),
    ):
        hub.stand_in(monkeypatch, tmp_path, token)
        error = refused("ann/x")
        assert f"ann/x: {message}" in error and "hf_unknown" not in error
    hub.stand_in(monkeypatch, tmp_path, TOKEN)
    hub.bad_card = "license must be one of"
    assert "ann/x: Invalid metadata in README.md. - license must be one of" in refused("ann/x")
    hub.down = True
    assert "answers 500; try again later" in refused("ann/x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "ann/x: no connection to http://127.0.0.1:9" in refused("ann/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("ann/x")
