"""neox-lite push against a fake hub: what is uploaded, the model card, refusals; a fresh process each."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_hub import FakeHub

from neox_lite.errors import ArgumentError
from neox_lite_app.cli import main
from neox_lite_app.models.model_card import license_in, read_rows
from neox_lite_quant import convert

DEMO = Path(__file__).parents[1] / "app" / "neox_lite_app" / "demo_model"
TOKEN = "hf_of-ann"
ROWS = [
    {"path": "/home/ann/secret/demo", "format": "float16", "bits_per_weight": 16.0, "perplexity": 23.1, "kl": 0.0, "top1": 1.0,
     "bytes": 8000000},
    {"path": "/home/ann/secret/int4|x", "format": "int4 g128", "bits_per_weight": 4.125, "perplexity": 23.5, "kl": 0.0123,
     "top1": 0.945, "bytes": 3200000},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "int4"
    convert(DEMO, folder, format="int4")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "int4")
    return tmp_path / "int4"


@pytest.fixture
def hub():
    with FakeHub(tokens={TOKEN: "ann"}) as hub:
        yield hub


def push(hub, *words, code=0, **environment):
    """Run the command; stdout and stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NO_PROXY": "*", "HF_HOME": os.environ["HF_HOME"]}
    env = {name: value for name, value in {**env, **environment}.items() if value is not None}
    command = [sys.executable, "-m", "neox_lite_app", "push", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def error(told):
    """The one line that says why."""
    (line,) = [line for line in told.splitlines() if line.startswith("neox-lite: error: ")]
    return line


def measured(tmp_path, rows=ROWS):
    (tmp_path / "quality.json").write_text(json.dumps({"rows": rows}))
    return tmp_path / "quality.json"


def test_the_folder_arrives_whole_in_one_commit_and_loads_from_there(hub, folder):
    out, told = push(hub, folder, "ann/demo-int4")
    commit, files = hub.find("ann/demo-int4", "main")
    assert out == f"{hub.url}/ann/demo-int4/commit/{commit}\n"
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: files[name] for name in sent} == sent
    assert files.keys() - sent.keys() == {".gitattributes", "README.md"}
    assert sum(request.path.endswith("/commit/main") for request in hub.requests) == 1
    assert "ann/demo-int4" in hub.public and "model.safetensors" in told and "in all" in told


def test_only_the_model_is_uploaded(hub, folder):
    for name in ("notes.txt", "other.safetensors.partial", ".env"):
        (folder / name).write_text("mine")
    push(hub, folder, "ann/demo-int4")
    assert not {"notes.txt", "other.safetensors.partial", ".env"} & hub.find("ann/demo-int4", "main")[1].keys()


@pytest.mark.parametrize("name", ["generation_config.json", "README.md"])
def test_a_link_out_of_the_folder_is_not_followed(hub, folder, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    manifest = json.loads((folder / "neox_lite_manifest.json").read_text())
    manifest["files"].pop(name, None)
    (folder / "neox_lite_manifest.json").write_text(json.dumps(manifest))
    _, told = push(hub, folder, "ann/x", code=1)
    assert "links outside the folder" in error(told) and hub.requests == []


def test_the_card_carries_the_measured_table_and_no_paths(hub, folder, tmp_path):
    push(
        hub,
        folder,
        "ann/demo-int4",
        "--compare",
        measured(tmp_path),
        "--base-model",
        "ann/demo",
        "--license",
        "apache-2.0",
    )
    card = hub.find("ann/demo-int4", "main")[1]["README.md"].decode()
    front = card.split("---")[1].strip().splitlines()
    assert front == [
        *(
            "license: apache-2.0",
            "base_model: ann/demo",
            "base_model_relation: quantized",
            "pipeline_tag: text-generation",
        ),
        *("tags:", "- gpt_neox", "- neox-lite", "- int4", "- g128"),
    ]
    assert "| demo | float16 | 16.000 | 8,000,000 | 23.1000 | 0.000000 | 100.00% |" in card
    assert r"| int4\|x | int4 g128 | 4.125 | 3,200,000 | 23.5000 | 0.012300 | 94.50% |" in card
    assert "neox-lite chat ann/demo-int4" in card and "secret" not in card and "Not measured" not in card


def test_results_in_the_folder_are_found(hub, folder):
    (folder / "neox_lite_compare.json").write_text(json.dumps({"rows": ROWS}))
    out, _ = push(hub, folder, "ann/demo-int4", "--dry-run")
    assert "| 4.125 |" in out


def test_a_card_without_measurements_says_so(hub, folder):
    out, told = push(hub, folder, "ann/demo-int4", "--dry-run")
    assert "Not measured. `neox-lite compare" in out and "the card says that quality was not measured" in told
    assert "license:" not in out and "base_model:" not in out


def test_a_dry_run_sends_nothing_and_needs_no_token(hub, folder):
    out, _ = push(hub, folder, "ann/demo-int4", "--dry-run", "--json", HF_TOKEN=None)
    told = json.loads(out)
    assert told["url"] is None and told["bytes"] == sum(told["files"].values()) and told["card"].startswith("---\n")
    assert told["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert hub.requests == []


def test_the_license_is_that_of_the_base_models_card(hub, folder):
    hub.add("ann/base", {"README.md": b"---\nlicense: 'MIT'\n---\n# Base", "config.json": b"{}"})
    manifest = json.loads((folder / "neox_lite_manifest.json").read_text())
    (folder / "neox_lite_manifest.json").write_text(json.dumps({**manifest, "source_name": "ann/base"}))
    out, _ = push(hub, folder, "ann/demo-int4", "--dry-run")
    assert "license: mit\nbase_model: ann/base\n" in out
    hub.down = True
    out, told = push(hub, folder, "ann/demo-int4", "--dry-run", "--base-model", "ann/gone")
    assert "base_model: ann/gone" in out and "license:" not in out and "the card names no license: ann/gone" in told


def test_ones_own_card_is_uploaded_as_it_is(hub, folder, tmp_path):
    (folder / "README.md").write_text("# Mine\n")
    push(hub, folder, "ann/demo-int4")
    assert hub.find("ann/demo-int4", "main")[1]["README.md"] == b"# Mine\n"
    _, told = push(hub, folder, "ann/demo-int4", "--compare", measured(tmp_path), code=1)
    assert "is the card; move it away" in error(told)


def test_private_repositories_and_branches_are_made(hub, folder):
    push(hub, folder, "ann/demo-int4", "--private", "--revision", "g128")
    assert "ann/demo-int4" not in hub.public
    assert "config.json" in hub.find("ann/demo-int4", "g128")[1]
    assert "config.json" not in hub.find("ann/demo-int4", "main")[1]
    push(hub, folder, "ann/demo-int4", "--private", "--revision", "g128")  # again: nothing stands in the way


def test_a_public_repository_does_not_become_private_in_silence(hub, folder):
    push(hub, folder, "ann/demo-int4")
    before = hub.find("ann/demo-int4", "main")
    _, told = push(hub, folder, "ann/demo-int4", "--private", code=1)
    assert "exists and is public, which --private does not change" in error(told)
    assert hub.find("ann/demo-int4", "main") == before


def test_weights_of_another_model_are_not_mixed_with(hub, folder):
    hub.add("ann/demo-int4", {"model-00001-of-00002.safetensors": b"x", "config.json": b"{}"})
    _, told = push(hub, folder, "ann/demo-int4", code=1)
    assert "holds model-00001-of-00002.safetensors of another model; push to another repository" in error(told)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "ann/x: uploading needs a token that may write: set HF_TOKEN, or run `hf auth login`"),
        ("hf_unknown", r"ann/x: the hub refuses it \(401\); the token needs the right to write to ann"),
    ],
)
def test_a_missing_or_wrong_token_is_one_line(hub, folder, token, message):
    _, told = push(hub, folder, "ann/x", code=1, HF_TOKEN=token)
    assert re.search(message, error(told)) and "Traceback" not in told and "hf_unknown" not in told


def test_no_rights_no_network_and_a_refused_card_are_one_line(hub, folder):
    assert "refuses it (403); the token needs the right to write to bob" in error(push(hub, folder, "bob/x", code=1)[1])
    hub.bad_card = "license must be one of"
    assert "ann/x: Invalid metadata in README.md. - license must be one of" in error(
        push(hub, folder, "ann/x", code=1)[1]
    )
    hub.down = True
    assert "answers 500; try again later" in error(push(hub, folder, "ann/x", code=1)[1])
    nowhere = push("http://127.0.0.1:9", folder, "ann/x", code=1)[1]
    assert "ann/x: no connection to http://127.0.0.1:9" in error(nowhere)
    offline = push(hub, folder, "ann/x", code=1, HF_HUB_OFFLINE="1")[1]
    assert "HF_HUB_OFFLINE is set" in error(offline)


def test_a_damaged_folder_is_not_uploaded(hub, folder):
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    _, told = push(hub, folder, "ann/x", code=1)
    assert "SHA-256 differs" in error(told) and "nothing was uploaded" in error(told) and hub.requests == []


@pytest.mark.parametrize("name", ["x", "a/b/c", "ann/..", "https://host/x", "ann/x y"])
def test_names_that_are_no_hub_ids_are_refused(folder, name, capsys):
    assert main(["push", str(folder), name]) == 1
    assert "a hub id is OWNER/NAME" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--base-model", "no id"], "--base-model is 'no id'"), (["--license", "x\ny: z"], "--license is")],
)
def test_front_matter_takes_no_other_text(folder, words, message, capsys):
    assert main(["push", str(folder), "ann/x", "--dry-run", *words]) == 1
    assert message in capsys.readouterr().err


def test_the_table_is_what_compare_prints(folder, tmp_path, capsys):
    words = [
        "compare",
        str(DEMO),
        str(folder),
        "--text",
        str(DEMO / "heldout.txt"),
        "--context",
        "128",
        "--windows",
        "2",
    ]
    assert main([*words, "--json"]) == 0
    (tmp_path / "quality.json").write_text(capsys.readouterr().out)
    assert main(["push", str(folder), "ann/demo", "--dry-run", "--compare", str(tmp_path / "quality.json")]) == 0
    card = capsys.readouterr().out
    assert re.search(r"^\| demo\\_model \| float16 \| 16\.000 \|.*\| 0\.000000 \| 100\.00% \|$", card, re.MULTILINE)
    assert re.search(r"^\| int4 \| int4 g128 \| 4\.125 \|", card, re.MULTILINE)
