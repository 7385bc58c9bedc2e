"""What quantizing costs at full size: a model of GPT-NeoX-20B's shape from a hub, and a slice of it beside llama.cpp.

    python -m benchmarks.peers.full_size slice --work DIR [--layers 1] [--rounds 3] [--peer PYTHON] [--out FILE]
    python -m benchmarks.peers.full_size hub --work DIR [--layers 44] [--method rtn] [--out FILE]

slice: a float16 folder of one or more layers, read past the page cache, with rtn and mse in turns with llama.cpp's own
quantizer to Q4_0 from an F16 GGUF of the same weights (PYTHON: one that has llama-cpp-python). hub: all 46 weight files, 41 GB,
made up as a hub on 127.0.0.1 sends them, so fetching them is part of the time; a weight file of the result is opened and
then emptied once it is whole, so that DIR needs some 4 GB. Weights are random. Figures are added to what FILE holds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, command_line, environment, json_of, machine, model_folder, write_json
from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.checkpoint.safetensors_file import SafetensorsFile, Spec, encode_header, layout
from neox_lite_app.models import random_model

REPO, COMMIT = "made-up/neox-20b", "0" * 40
NOISE_BYTES = 64 << 20
# The result is emptied as it comes, so the disk need not hold what `quantize` wants to find free before it starts.
RUN = """
import sys
import neox_lite.checkpoint.folder_writer
from neox_lite_app.cli import main
neox_lite.checkpoint.folder_writer.free_bytes = lambda path: 1 << 50
sys.exit(main(sys.argv[1:]))
"""
LLAMA = """
import ctypes, json, llama_cpp, resource, sys, time
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = 2, int(sys.argv[3])  # 2: mostly Q4_0
began = time.perf_counter()
failed = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options))
print(json.dumps({"failed": failed, "seconds": time.perf_counter() - began}))
"""


def config_of(layers: int, vocabulary: int) -> GPTNeoXConfig:
    return random_model.config_of("20b").copy(num_hidden_layers=layers, vocab_size=vocabulary)


def planned(config: GPTNeoXConfig) -> list[list[Spec]]:
    """Weight files as on the hub: the embedding, one a layer, the rest."""
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    files: dict[str, list[Spec]] = {}
    for name, parameter in model.named_parameters():
        place = match[0] if (match := re.match(r"gpt_neox\.(embed_in|layers\.\d+)\.", name)) else "rest"
        files.setdefault(place, []).append(Spec(name, torch.float16, tuple(parameter.shape)))
    return list(files.values())


def noise() -> bytes:
    values = torch.randn(NOISE_BYTES // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    return values.numpy().tobytes()


# A hub whose weights are made as they are sent -------------------------------------------------------------------------


def pieces(prefix: bytes, size: int, data: memoryview, seed: int, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes start..stop of a weight file: its header, then the noise again and again, from another place in each file."""
    while start < min(stop, len(prefix)):
        yield memoryview(prefix)[start:stop]
        start = len(prefix)
    while start < stop:
        at = (start - len(prefix) + 2 * 1_000_003 * seed) % len(data)
        count = min(stop - start, len(data) - at, 4 << 20)
        yield data[at : at + count]
        start += count


def serve(layers: int, vocabulary: int, port: Any) -> None:
    """Send the model's files on 127.0.0.1 for ever; says its port."""
    config = config_of(layers, vocabulary)
    shards = planned(config)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    index = json.dumps({"weight_map": weight_map})
    small = {"config.json": config.to_json_string().encode(), "model.safetensors.index.json": index.encode()}
    prefixes = {name: encode_header(layout(shard))[0] for name, shard in zip(names, shards, strict=True)} | small
    sizes = {name: len(prefix) for name, prefix in prefixes.items()}
    for name, shard in zip(names, shards, strict=True):
        sizes[name] += sum(spec.nbytes for spec in shard)
    data = memoryview(noise())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(self.command == "GET")

        do_HEAD = do_GET

        def answer(self, with_body: bool) -> None:
            name = self.path.partition("?")[0].rpartition("/")[2]
            if self.path.startswith("/api/models/"):
                tree = [{"type": "file", "path": n, "size": size, "oid": COMMIT} for n, size in sizes.items()]
                siblings = [{"rfilename": file["path"], "size": file["size"]} for file in tree]
                info = {"id": REPO, "sha": COMMIT, "private": False, "siblings": siblings}
                text = json.dumps(tree if "/tree/" in self.path else info).encode()
                return self.send(200, {}, len(text), iter([memoryview(text)] * with_body))
            if name not in sizes:
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, 0, iter(()))
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            start = int(part[1]) if part else 0
            stop = min(int(part[2]) + 1, sizes[name]) if part and part[2] else sizes[name]
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{sizes[name]}"} if part else {}
            seed = 0 if name in small else len(name) + int(name[6:11])
            body = pieces(prefixes[name], sizes[name], data, seed, start, stop)
            return self.send(206 if part else 200, headers, stop - start, body if with_body else iter(()))

        def send(self, status: int, headers: dict[str, str], size: int, body: Iterator[memoryview]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(size)}.items():
                self.send_header(key, value)
            self.end_headers()
            for piece in body:
                self.wfile.write(piece)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port.send(server.server_port)
    server.serve_forever()


class Emptier(threading.Thread):
    """Opens each weight file of the result once it is whole, then empties it; notes the most that source files took."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.opened, self.most_bytes, self.ended = folder, 0, 0, False

    def run(self) -> None:
        done: set[str] = set()
        while not self.ended:
            journal = self.folder / "neox_lite_journal.json"
            written = set(json.loads(journal.read_text())["files"]) if journal.exists() else set()
            for name in written - done:
                self.opened += bool(SafetensorsFile(self.folder / name).infos)
                os.truncate(self.folder / name, 0)
            done |= written
            fetched = self.folder.with_name(f"{self.folder.name}.fetched")
            sizes = [path.stat().st_blocks * 512 for path in fetched.rglob("*") if path.exists()]
            self.most_bytes = max(self.most_bytes, sum(sizes))
            time.sleep(0.2)


def from_hub(work: Path, layers: int, vocabulary: int, method: str) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(layers, vocabulary, theirs), daemon=True)
    server.start()
    out = work / "out"
    emptier = Emptier(out)
    emptier.start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{ours.recv()}", "HF_HOME": str(work / "home"), "NO_PROXY": "*"}
    report = quantize(REPO, out, method, **hub)
    emptier.ended = True
    emptier.join()
    server.terminate()
    assert (out / "config.json").exists() and emptier.opened
    shutil.rmtree(out)
    return report | {"layers": layers, "method": method, "most_bytes_of_source_on_disk": emptier.most_bytes}


# Runs --------------------------------------------------------------------------------------------------------------------


def timed(command: list[str], **changes: str) -> dict[str, Any]:
    """The JSON that a command prints, with its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json_of(command, environment(**changes))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**found, "cpu_s": round(cpu_s, 2)}


def quantize(source: str, out: Path, method: str, **changes: str) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, "quantize", source, str(out), "--method", method, "--json"]
    report = timed(command, **changes)
    report.pop("destination")
    return report | {"gb_per_s_in": round(report["bytes_in"] / report["seconds"] / 1e9, 3)}


def forget(path: Path) -> None:
    """Let the system drop what memory keeps of a file or of a folder's files."""
    os.sync()
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as held:
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def beside_llama(work: Path, layers: int, rounds: int, peer: str | None) -> dict[str, Any]:
    source, gguf = model_folder("20b", "fp16", work, num_hidden_layers=layers, vocab_size=4096), work / "slice.gguf"
    if peer:
        from neox_lite_quant import export_gguf

        export_gguf(str(source), str(gguf))
    runs: dict[str, list[dict[str, Any]]] = {"rtn": [], "mse": [], "llama.cpp Q4_0": []}
    for _ in range(rounds):
        for method in ("rtn", "mse"):
            forget(source)
            runs[method].append(quantize(str(source), work / "out", method))
            shutil.rmtree(work / "out")
        if peer:
            forget(gguf)
            command = [peer, "-c", LLAMA, str(gguf), str(work / "out.gguf"), str(os.cpu_count())]
            runs["llama.cpp Q4_0"].append(timed(command))
            (work / "out.gguf").unlink()
    shutil.rmtree(source)
    gguf.unlink(missing_ok=True)
    best = {name: min(run["seconds"] for run in found) for name, found in runs.items() if found}
    report: dict[str, Any] = {"layers": layers, "runs": runs, "mse_over_rtn": round(best["mse"] / best["rtn"], 2)}
    if peer:
        report["rtn_speed_over_llama"] = round(best["llama.cpp Q4_0"] / best["rtn"], 2)
    return report


def main() -> None:
    parser = command_line(__doc__, rounds=3, out=RESULTS / "full_size.json")
    parser.add_argument("what", choices=("slice", "hub"))
    parser.add_argument("--work", type=Path, required=True, help="folder for files, made and emptied")
    parser.add_argument("--layers", type=int, help="default: 1 of a slice, 44 from a hub")
    parser.add_argument("--method", choices=("rtn", "mse"), default="rtn")
    parser.add_argument("--peer", help="a Python that has llama-cpp-python")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    if args.what == "hub":
        key, found = f"hub_{args.method}", from_hub(args.work, args.layers or 44, 50432, args.method)
    else:
        key, found = "slice", beside_llama(args.work, args.layers or 1, args.rounds, args.peer)
    held = json.loads(args.out.read_text()) if args.out.exists() else {"machine": machine()}
    write_json(args.out, {**held, key: {**found, "load_before": round(load, 1)}})
    shutil.rmtree(args.work)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
