"""hub.py against a local fake hub, each call in a fresh process: huggingface_hub reads its environment once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hub import FakeHub

ROOT = Path(__file__).resolve().parents[1]
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 1000 for i in (1, 2)}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SMALL = {name: name.encode() for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md")}
SHARDED = {**SMALL, **SHARDS, "model.safetensors.index.json": INDEX.encode()}
BIN = {"pytorch_model.bin": b"b" * 1000}
SINGLE = {**SMALL, "model.safetensors": b"s" * 1000}

# The package's own __init__ is left out: it may import torch, which these calls do not need.
PRELUDE = """
import json, sys, types
package = types.ModuleType("neox_lite")
package.__path__ = [sys.argv[1]]
sys.modules["neox_lite"] = package
from neox_lite import hub
from neox_lite.errors import NeoxLiteError
results = []
for call in sys.argv[2:]:
    try:
        results.append(str(eval(call)))
    except NeoxLiteError as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


class Client:
    """Evaluates expressions over hub.py in a fresh process against one fake hub and one cache."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "SYSTEMROOT") if name in os.environ}
        self.env = {**keep, "HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}

    def start(self, *calls: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PRELUDE, str(ROOT / "neox_lite"), *calls]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env={**self.env, **env}, stdout=pipe, stderr=pipe, text=True)

    def run(self, *calls: str, **env: str) -> tuple[list[str], str]:
        """What each call gave, a result or an error, and stderr."""
        process = self.start(*calls, **env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return json.loads(out), err

    def fetch(self, call: str, **env: str) -> Path:
        (result,), err = self.run(call, **env)
        assert Path(result).is_dir(), result + err
        return Path(result)

    def fail(self, *calls: str, **env: str) -> list[str]:
        """The messages, each one line, of calls that must all raise."""
        results, _ = self.run(*calls, **env)
        for result in results:
            assert re.match(r"(HubError|CheckpointError): ", result), result
            assert "\n" not in result
        return results


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def test_one_set_of_weights_is_fetched_where_the_hub_has_two(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", {**SHARDED, **BIN, "model.onnx": b"x", "modeling.py": b"x", "neox_lite_head.safetensors": b"h"})
    folder = client.fetch("hub.fetch_checkpoint('o/m')")
    expected = sorted({*SHARDED, "neox_lite_head.safetensors"} - {"README.md"})
    assert hub.fetched() == expected
    assert sorted(path.name for path in folder.iterdir()) == expected
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == SHARDS["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        ({**SMALL, **BIN, "model.safetensors": b"s"}, ["model.safetensors"]),
        ({**SMALL, **BIN}, ["pytorch_model.bin"]),
        (
            {**SMALL, "a.bin": b"a", "pytorch_model.bin.index.json": b'{"weight_map": {"x": "a.bin"}}'},
            ["a.bin", "pytorch_model.bin.index.json"],
        ),
    ],
    ids=["both-single", "bin", "bin-sharded"],
)
def test_the_best_set_that_exists_is_chosen(
    hub: FakeHub, client: Client, files: dict[str, bytes], weights: list[str]
) -> None:
    hub.add("o/m", files)
    client.fetch("hub.resolve('o/m')")
    assert [name for name in hub.fetched() if name not in SMALL] == weights


def test_a_fetched_folder_opens_as_a_checkpoint(hub: FakeHub, client: Client) -> None:
    import torch
    from safetensors.torch import save

    from neox_lite.checkpoint.reader import Checkpoint

    shards = {name: save({str(i): torch.full((5,), float(i))}) for i, name in enumerate(SHARDS)}
    index = {"weight_map": {str(i): name for i, name in enumerate(SHARDS)}}
    hub.add("o/m", {**SMALL, **shards, **BIN, "model.safetensors.index.json": json.dumps(index).encode()})
    with Checkpoint.open(client.fetch("hub.resolve('o/m')")) as checkpoint:
        assert checkpoint.names() == ["0", "1"]
        assert checkpoint.tensor("1").tolist() == [1.0] * 5


def test_only_the_named_files_are_fetched(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", SHARDED)
    folder = client.fetch("hub.fetch_files('o/m', ['tokenizer.json', 'vocab.json'])")
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"] == hub.fetched()
    assert "none of vocab.json" in client.fail("hub.fetch_files('o/m', ['vocab.json'])")[0]


def test_a_revision_is_honoured_and_everything_comes_from_its_commit(hub: FakeHub, client: Client) -> None:
    old = hub.add("o/m", SINGLE, branch="v1")
    new = hub.add("o/m", {**SINGLE, "model.safetensors": b"n" * 500})
    folder = client.fetch("hub.resolve('o/m', 'v1')")
    assert folder.name == old
    assert (folder / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    files = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert files
    assert all(f"/resolve/{old}/" in path for path in files)
    assert client.fetch(f"hub.resolve('o/m', {new!r})").name == new
    assert client.fetch("hub.resolve('o/m')").name == new


def test_what_is_cached_is_not_fetched_again(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", SHARDED)
    first = client.fetch("hub.resolve('o/m')")
    hub.requests.clear()
    assert client.fetch("hub.resolve('o/m')") == first
    assert [r.path for r in hub.requests if "/resolve/" in r.path] == []


def test_a_cut_download_resumes_with_a_range(hub: FakeHub, client: Client) -> None:
    data = random.Random(0).randbytes(25_000_000)  # the client writes 10 MB at a time
    hub.add("o/m", {**SMALL, "model.safetensors": data})
    hub.cut["model.safetensors"] = 22_000_000
    (result,), _ = client.run("hub.resolve('o/m')")
    if result.startswith("HubError: "):  # huggingface_hub before 1.0 resumes only when asked again
        assert result.endswith("run again, the download continues where it stopped")
        result = str(client.fetch("hub.resolve('o/m')"))
    assert (Path(result) / "model.safetensors").read_bytes() == data
    first, *others = hub.gets("model.safetensors")
    assert first.range is None
    assert [r.range is not None and r.status for r in others] == [206] * len(others) != []
    assert sum(r.sent_bytes for r in hub.gets("model.safetensors")) < 2 * len(data)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child process there")
def test_an_interrupted_download_resumes_in_the_next_run(hub: FakeHub, client: Client) -> None:
    data = random.Random(1).randbytes(60_000_000)  # more than one of the client's 10 MB chunks
    hub.add("o/m", {**SMALL, "model.safetensors": data})
    hub.delay_s = 0.005
    process = client.start("hub.resolve('o/m')")
    deadline = time.monotonic() + 30
    while not any(r.sent_bytes > 30_000_000 for r in hub.gets("model.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(client.home.rglob("snapshots/*/model.safetensors"))
    hub.delay_s = 0
    folder = client.fetch("hub.resolve('o/m')")
    assert (folder / "model.safetensors").read_bytes() == data
    assert sum(r.sent_bytes for r in hub.gets("model.safetensors")) < 2 * len(data)


@pytest.mark.parametrize("how", ["down", "unreachable", "offline"])
def test_without_the_hub_a_complete_cache_serves(hub: FakeHub, client: Client, how: str) -> None:
    commit = hub.add("o/m", SHARDED)
    client.fetch("hub.resolve('o/m')")
    env = {"unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"}, "offline": {"HF_HUB_OFFLINE": "1"}}.get(how, {})
    hub.down = True
    results, err = client.run("hub.resolve('o/m').name", "hub.resolve('o/m').name", **env)
    assert results == [commit, commit]
    announced = 0 if how == "offline" else 1  # who sets HF_HUB_OFFLINE knows
    assert err.count(f"using the cached copy of commit {commit[:12]}") == announced, err
    fetched = client.fetch("hub.fetch_files('o/m', ['tokenizer.json'])", **env)
    assert fetched.name == commit


@pytest.mark.parametrize("how", ["down", "unreachable", "offline"])
def test_without_the_hub_an_incomplete_cache_is_an_error(hub: FakeHub, client: Client, how: str) -> None:
    hub.add("o/m", SHARDED)
    folder = client.fetch("hub.resolve('o/m')")
    env = {"unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"}, "offline": {"HF_HUB_OFFLINE": "1"}}.get(how, {})
    hub.down = True
    (folder / "model-00002-of-00002.safetensors").unlink()
    message, never = client.fail("hub.resolve('o/m')", "hub.resolve('o/other')", **env)
    assert "the cache does not have all of it" in message
    assert "missing: model-00002-of-00002.safetensors" in message
    assert "it is not in the cache" in never
    assert ("HF_HUB_OFFLINE" if how == "offline" else env.get("HF_ENDPOINT", hub.url)) in never


def test_a_refusal_says_what_to_do_and_shows_no_token(hub: FakeHub, client: Client) -> None:
    expected = {
        (401, "GatedRepo"): "gated; accept its terms",
        (403, "GatedRepo"): "gated; accept its terms",
        (401, "RepoNotFound"): "or private; check the name",
        (401, ""): "HF_TOKEN",
        (403, ""): "refuses access (403)",
        (429, ""): "answers 429",
    }
    hub.refuse = {f"o/m{i}": refusal for i, refusal in enumerate(expected)}
    results, err = client.run(*(f"hub.resolve({repo_id!r})" for repo_id in hub.refuse), HF_TOKEN="hf_secretsecret")
    for result, words in zip(results, expected.values(), strict=True):
        assert result.startswith("HubError: o/m")
        assert words in result
    assert "hf_secret" not in err + "".join(results)


def test_a_password_in_the_endpoint_is_not_shown(hub: FakeHub, client: Client) -> None:
    (result,), err = client.run("hub.resolve('o/none')", HF_ENDPOINT=hub.url.replace("//", "//user:sesame@"))
    assert hub.url in result
    assert "sesame" not in result + err


def test_what_the_hub_does_not_have_is_said(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", SINGLE)
    hub.add("o/bare", BIN)
    hub.add("o/tf", {**SMALL, "tf_model.h5": b"x"})
    hub.add("o/part", {name: data for name, data in SHARDED.items() if "00002-of" not in name})
    expected = {
        "hub.resolve('o/none')": "not on",
        "hub.resolve('o/m', 'v9')": "has no revision 'v9'",
        "hub.resolve('o/m', '../../x')": "not a branch, tag or commit",
        "hub.resolve('o/bare')": "has no config.json",
        "hub.resolve('o/tf')": "has no weights",
        "hub.resolve('o/part')": "missing: model-00002-of-00002.safetensors",
        "hub.resolve('justaname')": "OWNER/NAME",
        "hub.resolve('o/m--x')": "OWNER/NAME",
        "hub.resolve('o/..')": "OWNER/NAME",
    }
    for message, words in zip(client.fail(*expected), expected.values(), strict=True):
        assert message.startswith("HubError: ")
        assert words in message
    assert hub.fetched() == ["model.safetensors.index.json"]


def test_what_looks_like_a_path_never_goes_to_the_hub(hub: FakeHub, client: Client) -> None:
    names = ["./x", "../x", "/x/y", "x\\y", "a/b/c", "~/x", "~nobody-here/x", "C:x", "a/", "", "a\0b", "/" + "x" * 5000]
    for message in client.fail(*(f"hub.resolve({name!r})" for name in names)):
        assert message.startswith("CheckpointError: ")
        assert "no such folder" in message
    assert hub.requests == []


def test_a_folder_is_used_as_it_is_and_has_no_revision(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "file").touch()
    assert client.fetch(f"hub.resolve({str(folder)!r})") == folder
    with_revision, file = client.fail(f"hub.resolve({str(folder)!r}, 'v1')", f"hub.resolve({str(folder / 'file')!r})")
    assert "leave it out" in with_revision
    assert "is a file" in file
    assert hub.requests == []


def test_a_hostile_index_on_the_hub_fetches_nothing(hub: FakeHub, client: Client) -> None:
    names = ["../x.safetensors", "/x.safetensors", "*.safetensors", "x.bin", "a//b.safetensors", "", 3, None, "x\\y"]
    indices = [json.dumps({"weight_map": {"a": name, "b": "model-00001-of-00002.safetensors"}}) for name in names]
    indices += ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\xff"]
    for i, index in enumerate(indices):
        files = {**SHARDED, "x.bin": b"x", "model.safetensors.index.json": index.encode("latin-1")}
        hub.add(f"o/m{i}", files)
    for message in client.fail(*(f"hub.resolve('o/m{i}')" for i in range(len(indices)))):
        assert "model.safetensors.index.json" in message
    assert hub.fetched() == ["model.safetensors.index.json"]


def test_progress_is_seen_on_stderr_and_only_there(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", SHARDED)
    results, err = client.run("hub.resolve('o/m')")  # its stdout is JSON and nothing else
    assert "100%" in err
    assert Path(results[0]).is_dir()


def broken_by(error: str) -> str:
    """A call of resolve during which the download raises an error."""
    fails = f"lambda *args, **options: (_ for _ in ()).throw({error})"
    return f"setattr(__import__('huggingface_hub'), 'snapshot_download', {fails}) or hub.resolve('o/m')"


def test_a_full_disk_is_said_before_the_download_and_during_it(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", SINGLE)
    full = "setattr(hub.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=10)) or hub.resolve('o/m')"
    assert re.search(r"needs 10\d\d bytes, 10 are free in the hub cache", client.fail(full)[0])
    assert hub.fetched() == []
    assert "disk of the hub cache is full" in client.fail(broken_by("OSError(28, 'No space left on device')"))[0]


def test_any_failure_of_the_transport_is_one_line_without_signed_addresses(hub: FakeHub, client: Client) -> None:
    hub.add("o/m", SINGLE)
    failures = ["RuntimeError('CAS: http://x/y?Signature=sesame\\nmore')", "OSError(13, 'Permission denied')"]
    failures += ["TimeoutError()", "OSError('Consistency check failed: 3 of 4')"]
    failed = client.fail(*map(broken_by, failures))
    words = ["CAS: http://x/y?...; run again", "cannot be written: Permission denied", "no connection to", "cut short"]
    for message, expected in zip(failed, words, strict=True):
        assert expected in message
        assert "sesame" not in message


# -- as a call asks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "sent"), [("'hf_given'", "hf_given"), ("None", "hf_of-the-environment"), ("False", None)]
)
def test_a_given_token_goes_before_that_of_the_environment(
    hub: FakeHub, client: Client, token: str, sent: str | None
) -> None:
    hub.add("o/m", SINGLE)
    client.fetch(f"hub.fetch_checkpoint('o/m', None, hub.Access(token={token}))", HF_TOKEN="hf_of-the-environment")
    assert {request.token for request in hub.requests if "o/m" in request.path} == {sent}
    assert len(hub.gets("model.safetensors")) > 0


def test_a_given_folder_is_the_cache_of_that_call_alone(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    hub.add("o/m", SINGLE)
    there = tmp_path / "there"
    ask = f"hub.fetch_checkpoint('o/m', None, hub.Access(hub.Path({str(there)!r}), local_files_only=%s))"
    folder = client.fetch(ask % False)
    assert folder.is_relative_to(there) and not (client.home / "hub" / "models--o--m").exists()
    asked = len(hub.requests)
    assert client.fetch(ask % True) == folder
    (told,) = client.fail("hub.fetch_checkpoint('o/m', None, hub.Access(local_files_only=True))")
    assert told == (
        f"HubError: o/m: local_files_only is set, so {hub.url} is not asked; leave it out; it is not in the cache"
    )
    assert len(hub.requests) == asked
