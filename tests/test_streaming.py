"""Quantizing from a hub id: one weight file after another is fetched, converted and deleted. A fake hub, real processes."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fake_hub import FakeHub

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.reader import Checkpoint, verify_folder
from neox_lite_quant import convert

ROOT = Path(__file__).resolve().parents[1]
ROOMS = os.pathsep.join(map(str, (ROOT, ROOT / "quant", ROOT / "app")))
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
# Weight files of the result hold two layers or so. Prints what was on the disk of the source at any time.
CHILD = """
import json, sys
from pathlib import Path
from neox_lite.errors import NeoxLiteError
from neox_lite.hub import Remote
from neox_lite_quant import convert
from neox_lite_quant.streaming import Stream
module = sys.modules["neox_lite_quant.convert"]
module.SHARD_BYTES, module.SLICE_ELEMENTS = 120_000, 4096
sys.modules["neox_lite.loading.quantize"].SLICE_ELEMENTS = 4096  # so that what is under way is less than a source file
held, fetch = [], Stream._fetch
def watched(self, name):
    found = fetch(self, name)
    held.append(len(list(self.folder.glob("*.safetensors"))))
    return found
Stream._fetch = watched
try:
    report = convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    print(json.dumps({"held": held, "bytes_in": report.bytes_in, "bytes_out": report.bytes_out}))
except NeoxLiteError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).half().save_pretrained(folder, max_shard_size="250KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(source):
    with FakeHub() as server:
        server.add("o/m", {path.name: path.read_bytes() for path in source.iterdir()})
        yield server


@pytest.fixture
def whole(source, tmp_path, monkeypatch):
    """What the same checkpoint gives from a folder."""
    monkeypatch.setattr(sys.modules["neox_lite_quant.convert"], "SHARD_BYTES", 120_000)
    convert(source, tmp_path / "whole")
    return weights(tmp_path / "whole")


class Client:
    def __init__(self, endpoint, home):
        self.home = home
        own = {
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
            "PYTHONPATH": ROOMS,
        }
        self.env = {**os.environ, **own}

    def start(self, destination, **options):
        command = [sys.executable, "-c", CHILD, "o/m", str(destination), json.dumps(options)]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, destination, **options):
        out, err = self.start(destination, **options).communicate(timeout=120)
        assert out, err
        return json.loads(out)

    def cached(self):
        return [path.name for path in self.home.rglob("*.safetensors")]


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub.url, tmp_path / "home")


def weights(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def shards(source):
    return sorted(path.name for path in source.glob("*.safetensors"))


def downloads(hub):
    """How often each weight file was asked for to its end."""
    return {
        n: len([r for r in hub.gets(n) if not r.range or r.range.endswith("-")]) for n in hub.fetched() if "model-" in n
    }


def test_every_file_is_fetched_once_used_and_deleted_and_the_result_is_that_of_a_folder(
    hub, client, source, whole, tmp_path
):
    report = client.run(tmp_path / "out")
    assert max(report["held"]) <= 2 and len(report["held"]) == len(shards(source)) > 6
    assert weights(tmp_path / "out") == whole and verify_folder(tmp_path / "out") == []
    assert downloads(hub) == dict.fromkeys(shards(source), 1)
    assert client.cached() == [] and not (tmp_path / "out.fetched").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_dry_run_reads_headers_and_fetches_no_weights(hub, client, source, whole, tmp_path):
    report = client.run(tmp_path / "out", dry_run=True)
    assert report["bytes_in"] == convert(source, tmp_path / "x", dry_run=True).bytes_in
    assert downloads(hub) == {} and not (tmp_path / "out").exists() and not (tmp_path / "out.fetched").exists()


@pytest.mark.parametrize("bytes", [1000, 150_000])
def test_a_cut_connection_is_survived(hub, client, source, whole, tmp_path, bytes):
    hub.cut = dict.fromkeys(shards(source)[1::2], bytes)
    cut = list(hub.cut)
    report = client.run(tmp_path / "out")
    assert hub.cut == {} and "error" not in report and weights(tmp_path / "out") == whole
    assert downloads(hub) == {name: 2 if name in cut else 1 for name in shards(source)}


def test_a_hub_that_goes_away_is_said_and_the_next_run_goes_on(hub, client, source, whole, tmp_path):
    hub.delay_s = 0.05
    process = client.start(tmp_path / "out")
    wait_for_shards(tmp_path / "out", 1, process)
    hub.down = True
    out, _ = process.communicate(timeout=120)
    assert "HubError" in json.loads(out)["error"]
    hub.down, hub.delay_s = False, 0.0
    client.run(tmp_path / "out")
    assert weights(tmp_path / "out") == whole


def wait_for_shards(folder, count, process):
    """Until the journal of the result names so many weight files; returns their names. The hub must be slow enough for that."""
    written = []
    while len(written) < count:
        assert process.poll() is None, "the run has ended before"
        with contextlib.suppress(OSError):
            written = sorted(json.loads((folder / "neox_lite_journal.json").read_text())["files"])
    return written


def test_what_is_converted_is_not_fetched_again_after_a_kill(hub, client, source, whole, tmp_path):
    hub.delay_s = 0.05
    process = client.start(tmp_path / "out")
    written = wait_for_shards(tmp_path / "out", 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    hub.delay_s = 0.0
    hub.requests.clear()
    report = client.run(tmp_path / "out")
    assert weights(tmp_path / "out") == whole and verify_folder(tmp_path / "out") == []
    assert not (tmp_path / "out.fetched").exists()
    used = {name for name in shards(source) if first_use(source, name, tmp_path / "out") in written}
    assert used and len(report["held"]) <= len(shards(source)) - len(used)


def first_use(source, name, result):
    """The weight file of the result that the last tensor of a source file goes into."""
    theirs = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    ours = json.loads((result / "model.safetensors.index.json").read_text())["weight_map"]
    inside = [tensor for tensor, file in theirs.items() if file == name]
    return max(ours.get(tensor) or ours[f"{tensor.removesuffix('weight')}weight_packed"] for tensor in inside)


def test_a_cached_checkpoint_is_used_and_not_deleted(hub, client, source, whole, tmp_path):
    client.run(tmp_path / "first", keep_source=True)
    assert sorted(client.cached()) == shards(source)
    hub.requests.clear()
    client.run(tmp_path / "out")
    assert downloads(hub) == {} and sorted(client.cached()) == shards(source)
    assert weights(tmp_path / "first") == weights(tmp_path / "out") == whole


def test_a_disk_that_is_too_full_for_result_and_source_is_said_before_anything_is_fetched(
    hub, source, whole, tmp_path, monkeypatch
):
    needed = (
        convert(source, tmp_path / "x", dry_run=True).bytes_out + 100_000
    )  # room for all but two files of the source
    code = CHILD.replace(
        "held, fetch",
        f"import neox_lite.checkpoint.folder_writer as f; f.free_bytes = lambda path: {needed}\nheld, fetch",
    )
    command = [sys.executable, "-c", code, "o/m", str(tmp_path / "out"), "{}"]
    env = Client(hub.url, tmp_path / "home").env
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert f"{needed} are free" in json.loads(out.stdout)["error"], out.stderr
    assert downloads(hub) == {} and not (tmp_path / "out").exists()


def test_a_file_that_changed_between_header_and_fetch_is_refused(hub, client, source, tmp_path):
    name = shards(source)[3]
    header = CHILD.replace(
        "held, fetch",
        "Remote.fetch, real = (lambda self, name, folder: late(self, name, folder)), Remote.fetch\nheld, fetch",
    )
    header = header.replace(
        "try:",
        f"""
def late(self, name, folder):
    path = real(self, name, folder)
    if name == {name!r}:
        raw = bytearray(path.read_bytes()); raw[raw.index(b"F16")] = ord("I"); path.write_bytes(raw)  # I16
    return path
try:""",
        1,
    )
    command = [sys.executable, "-c", header, "o/m", str(tmp_path / "out"), "{}"]
    out = subprocess.run(command, env=client.env, capture_output=True, text=True, timeout=120)
    assert "is not the file whose header the hub sent" in json.loads(out.stdout)["error"], out.stderr
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out.fetched").exists()


def test_methods_that_look_at_several_weights_fetch_into_the_cache(hub, client, source, tmp_path):
    dry = client.run(tmp_path / "out", dry_run=True, method="gptq")
    assert downloads(hub) == {} and dry["bytes_out"] > 0
    client.run(tmp_path / "out", method="balance")
    convert(source, tmp_path / "folder", method="balance")
    tensors = [Checkpoint.open(tmp_path / name) for name in ("out", "folder")]
    assert all(torch.equal(*(t.tensor(name) for t in tensors)) for name in tensors[0].names())
    assert sorted(client.cached()) == shards(source) and not (tmp_path / "out.fetched").exists()
