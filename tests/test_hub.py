"""hub.py against a fake hub that stands in for the real one: what is fetched, what the cache serves, and every refusal."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
import types

import huggingface_hub.utils
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save
from support.commands import environment
from support.fake_hub import FakeHub
from support.refusals import refused

from neox_lite import hub as client
from neox_lite.checkpoint.reader import Checkpoint
from neox_lite.errors import CheckpointError, HubError
from neox_lite.hub import Access, fetch_checkpoint, fetch_files, resolve

SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 1000 for i in (1, 2)}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SMALL = {name: name.encode() for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md")}
SHARDED = {**SMALL, **SHARDS, "model.safetensors.index.json": INDEX.encode()}
BIN = {"pytorch_model.bin": b"b" * 1000}
SINGLE = {**SMALL, "model.safetensors": b"s" * 1000}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_announced", set())
    with FakeHub() as server:
        server.stand_in(monkeypatch, tmp_path)
        server.add("o/m", SHARDED)
        server.add("o/single", SINGLE)
        yield server


def said(call, *arguments, error=HubError):
    """The one line that a call is refused with."""
    return refused(error, None, call, *arguments)


# -- what is fetched ---------------------------------------------------------------------------------------------------


def test_one_set_of_weights_is_fetched_where_the_hub_has_two(hub):
    hub.add("o/m", {**SHARDED, **BIN, "model.onnx": b"x", "modeling.py": b"x", "neox_lite_head.safetensors": b"h"})
    folder = fetch_checkpoint("o/m")
    expected = sorted({*SHARDED, "neox_lite_head.safetensors"} - {"README.md"})
    assert hub.fetched() == sorted(path.name for path in folder.iterdir()) == expected
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == SHARDS["model-00002-of-00002.safetensors"]


BIN_INDEX = {"a.bin": b"a", "pytorch_model.bin.index.json": b'{"weight_map": {"x": "a.bin"}}'}


@pytest.mark.parametrize(
    ("files", "weights"),
    [({**BIN, "model.safetensors": b"s"}, ["model.safetensors"]), (BIN, [*BIN]), (BIN_INDEX, [*BIN_INDEX])],
    ids=["both-single", "bin", "bin-sharded"],
)
def test_the_best_set_that_exists_is_chosen(hub, files, weights):
    hub.add("o/m", {**SMALL, **files})
    resolve("o/m")
    assert [name for name in hub.fetched() if name not in SMALL] == weights


def test_a_fetched_folder_opens_as_a_checkpoint(hub):
    shards = {name: save({str(i): torch.full((5,), float(i))}) for i, name in enumerate(SHARDS)}
    index = {"weight_map": {str(i): name for i, name in enumerate(SHARDS)}}
    hub.add("o/m", {**SMALL, **shards, **BIN, "model.safetensors.index.json": json.dumps(index).encode()})
    with Checkpoint.open(resolve("o/m")) as checkpoint:
        assert checkpoint.names() == ["0", "1"]
        assert checkpoint.tensor("1").tolist() == [1.0] * 5


def test_only_the_named_files_are_fetched(hub):
    folder = fetch_files("o/m", ["tokenizer.json", "vocab.json"])
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"] == hub.fetched()
    assert "none of vocab.json" in said(fetch_files, "o/m", ["vocab.json"])


def test_a_revision_is_honoured_and_everything_comes_from_its_commit_once(hub):
    old = hub.add("o/n", SINGLE, branch="v1")
    new = hub.add("o/n", {**SINGLE, "model.safetensors": b"n" * 500})
    folder = resolve("o/n", "v1")
    assert folder.name == old and (folder / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    downloads = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert downloads and all(f"/resolve/{old}/" in path for path in downloads)
    assert resolve("o/n", new).name == resolve("o/n").name == new
    hub.requests.clear()
    assert resolve("o/n").name == new and not any("/resolve/" in request.path for request in hub.requests)


def test_a_cut_download_resumes_with_a_range(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    data = random.Random(0).randbytes(500_000)
    hub.add("o/m", {**SMALL, "model.safetensors": data})
    hub.cut["model.safetensors"] = 300_000
    try:
        folder = resolve("o/m")
    except HubError as error:  # huggingface_hub before 1.0 resumes only when asked again
        assert str(error).endswith("run again, the download continues where it stopped")
        folder = resolve("o/m")
    assert (folder / "model.safetensors").read_bytes() == data
    first, *others = hub.gets("model.safetensors")
    assert first.range is None
    assert [r.range is not None and r.status for r in others] == [206] * len(others) != []
    assert sum(r.sent_bytes for r in hub.gets("model.safetensors")) < 2 * len(data)


def fetched(folder):
    """Bytes of files that are being fetched. The library makes and deletes folders meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return max((path.stat().st_size for path in folder.rglob("*.incomplete")), default=0)
    return 0


def test_a_killed_download_resumes_in_the_next_run(hub, tmp_path):
    data = random.Random(1).randbytes(100 << 16)
    hub.add("o/m", {**SMALL, "model.safetensors": data})
    hub.delay_s = 0.02
    code = "from huggingface_hub import constants as c; c.DOWNLOAD_CHUNK_SIZE = 1 << 16; import neox_lite.hub as hub"
    own = environment(HF_ENDPOINT=hub.url, HF_HUB_CACHE=tmp_path / "hub", HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0")
    command = [sys.executable, "-c", f"{code}; hub.resolve('o/m')"]
    with subprocess.Popen(command, env=own, stderr=subprocess.PIPE) as process:
        while fetched(tmp_path) < 10 << 16:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))
    hub.delay_s = 0
    assert (resolve("o/m") / "model.safetensors").read_bytes() == data
    assert sum(r.sent_bytes for r in hub.gets("model.safetensors")) < 2 * len(data)


def test_progress_is_seen_on_stderr_and_only_there(hub, capsys):
    huggingface_hub.utils.enable_progress_bars()
    try:
        resolve("o/m")
    finally:
        huggingface_hub.utils.disable_progress_bars()
    out = capsys.readouterr()
    assert out.out == "" and "100%" in out.err


# -- without the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["down", "unreachable", "offline"])
def leave(request, hub, monkeypatch):
    """Take the hub away; what a message names then."""

    def away():
        hub.down = True
        if request.param == "unreachable":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        if request.param == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return "HF_HUB_OFFLINE" if request.param == "offline" else constants.ENDPOINT

    return away


def test_without_the_hub_a_complete_cache_serves_and_an_incomplete_one_is_an_error(hub, leave, caplog):
    folder = resolve("o/m")
    named, commit = leave(), folder.name
    assert resolve("o/m").name == resolve("o/m").name == commit == hub.branches["o/m"]["main"]
    announced = 0 if named == "HF_HUB_OFFLINE" else 1  # who sets it knows
    assert caplog.text.count(f"using the cached copy of commit {commit[:12]}") == announced
    assert fetch_files("o/m", ["tokenizer.json"]).name == commit
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = said(resolve, "o/m")
    assert "the cache does not have all of it" in message and "missing: model-00002-of-00002.safetensors" in message
    never = said(resolve, "o/other")
    assert "it is not in the cache" in never and named in never


# -- refusals ----------------------------------------------------------------------------------------------------------


REFUSALS = [
    (401, "GatedRepo", "gated; accept its terms"),
    (403, "GatedRepo", "gated; accept its terms"),
    (401, "RepoNotFound", "or private; check the name"),
    (401, "", "HF_TOKEN"),
    (403, "", "refuses access (403)"),
    (429, "", "answers 429"),
]


@pytest.mark.parametrize(("status", "code", "words"), REFUSALS)
def test_a_refusal_says_what_to_do_and_shows_no_token_and_no_password(hub, monkeypatch, capsys, status, code, words):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//user:sesame@"))
    hub.refuse = {"o/m": (status, code)}
    message = said(resolve, "o/m")
    assert message.startswith("o/m") and words in message
    assert not re.search("hf_secret|sesame", message + capsys.readouterr().err)
    message = said(resolve, "o/none")
    assert hub.url in message and "sesame" not in message


MISSING = [
    (["o/none"], "not on"),
    (["o/m", "v9"], "has no revision 'v9'"),
    (["o/m", "../../x"], "not a branch, tag or commit"),
    (["o/bare"], "has no config.json"),
    (["o/tf"], "has no weights"),
    (["o/part"], "missing: model-00002-of-00002.safetensors"),
    (["justaname"], "OWNER/NAME"),
    (["o/m--x"], "OWNER/NAME"),
    (["o/.."], "OWNER/NAME"),
]


@pytest.mark.parametrize(("asked", "words"), MISSING)
def test_what_the_hub_does_not_have_is_said(hub, asked, words):
    hub.add("o/bare", BIN)
    hub.add("o/tf", {**SMALL, "tf_model.h5": b"x"})
    hub.add("o/part", {name: data for name, data in SHARDED.items() if "00002-of" not in name})
    assert words in said(resolve, *asked)
    assert set(hub.fetched()) <= {"model.safetensors.index.json"}


PATHS = ["./x", "../x", "/x/y", "x\\y", "a/b/c", "~/x", "~nobody-here/x", "C:x", "a/", "", "a\0b", "/" + "x" * 5000]


@pytest.mark.parametrize("name", PATHS)
def test_what_looks_like_a_path_never_goes_to_the_hub(hub, name):
    assert "no such folder" in said(resolve, name, error=CheckpointError) and hub.requests == []


def test_a_folder_is_used_as_it_is_and_has_no_revision(hub, tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "file").touch()
    assert resolve(str(folder)) == folder
    assert "leave it out" in said(resolve, str(folder), "v1", error=CheckpointError)
    assert "is a file" in said(resolve, str(folder / "file"), error=CheckpointError)
    assert hub.requests == []


def test_a_hostile_index_on_the_hub_fetches_nothing(hub):
    names = ["../x.safetensors", "/x.safetensors", "*.safetensors", "x.bin", "a//b.safetensors", "", 3, None, "x\\y"]
    indices = [json.dumps({"weight_map": {"a": name, "b": "model-00001-of-00002.safetensors"}}) for name in names]
    indices += ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\xff"]
    for i, index in enumerate(indices):
        hub.add(f"o/m{i}", {**SHARDED, "x.bin": b"x", "model.safetensors.index.json": index.encode("latin-1")})
        assert "model.safetensors.index.json" in said(resolve, f"o/m{i}", error=(HubError, CheckpointError))
    assert hub.fetched() == ["model.safetensors.index.json"]


def test_a_full_disk_is_said_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    assert re.search(r"needs 10\d\d bytes, 10 are free in the hub cache", said(resolve, "o/single"))
    assert hub.fetched() == []


FAILURES = {
    "disk of the hub cache is full": OSError(28, "No space left on device"),
    "CAS: http://x/y?...; run again": RuntimeError("CAS: http://x/y?Signature=sesame\nmore"),
    "cannot be written: Permission denied": OSError(13, "Permission denied"),
    "no connection to": TimeoutError(),
    "cut short": OSError("Consistency check failed: 3 of 4"),
}


@pytest.mark.parametrize("words", FAILURES)
def test_any_failure_of_a_download_is_one_line_without_signed_addresses(hub, monkeypatch, words):
    def fail(*arguments, **options):
        raise FAILURES[words]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = said(resolve, "o/m")
    assert words in message and "sesame" not in message


# -- as a call asks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "sent"), [("hf_given", "hf_given"), (None, "hf_of-the-environment"), (False, None)])
def test_a_given_token_goes_before_that_of_the_environment(hub, monkeypatch, token, sent):
    monkeypatch.setenv("HF_TOKEN", "hf_of-the-environment")
    fetch_checkpoint("o/single", None, Access(token=token))
    assert {request.token for request in hub.requests if "o/single" in request.path} == {sent}
    assert len(hub.gets("model.safetensors")) > 0


def test_a_given_folder_is_the_cache_of_that_call_alone(hub, tmp_path):
    there = tmp_path / "there"
    folder = fetch_checkpoint("o/m", None, Access(there))
    assert folder.is_relative_to(there) and not (tmp_path / "hub" / "models--o--m").exists()
    asked = len(hub.requests)
    assert fetch_checkpoint("o/m", None, Access(there, local_files_only=True)) == folder
    told = f"o/m: local_files_only is set, so {hub.url} is not contacted; leave it out; it is not in the cache"
    assert said(fetch_checkpoint, "o/m", None, Access(local_files_only=True)) == told
    assert len(hub.requests) == asked
