"""Servers of the OpenAI API under load on this CPU: total tokens a second, and how long clients wait, in turns.

    python -m benchmarks.serving.load --neox-lite FOLDER [--gguf FILE] [--clients 1,4,16,64] [--rounds 3] [--out FILE]
    python -m benchmarks.serving.load --neox-lite HOME/int4 --gguf HOME/int4.gguf --peers-python PYTHON

Each client streams one completion after the other: a prompt of its own of --prompt random words, --tokens new tokens, greedy,
for --seconds. Servers take turns, all others stopped. llama-cpp-python's server runs from --peers-python, one sequence at a
time as it does. A folder without a tokenizer gets the bundled model's. Bare decoding of several sequences, without a server, is
measured by `peers/cpu.py`, which also writes such folders and files to HOME.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import DEMO, ROOT, command_line, environment, machine, words, write_json

READY_S = 300
WORDS = "the sea was calm and a ship came slowly into the harbour while men waited on the shore".split()  # noqa: SIM905


@dataclass
class Sample:
    """One answer: seconds to its first token, and between any two that followed."""

    first_s: float
    gaps_s: list[float]
    tokens: int


@dataclass
class Server:
    name: str
    url: str
    process: subprocess.Popen[bytes]
    rounds: dict[int, list[dict[str, float]]] = field(default_factory=dict)  # by number of clients

    def signal(self, which: int) -> None:
        os.killpg(self.process.pid, which)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(name: str, command: list[str], port: int, log: Path, checkout: Path = ROOT) -> Iterator[Server]:
    """A server in a process group of its own, once it answers."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        env = environment(checkout)
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=env, cwd=checkout)
    try:
        server, ends = Server(name, f"http://127.0.0.1:{port}/v1", process), time.monotonic() + READY_S
        while True:
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{name} did not start; see {log}")
            try:
                urllib.request.urlopen(f"{server.url}/models", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        for which in (signal.SIGCONT, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, which)
        process.wait()


async def post(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A completion that is asked for on a connection of its own, so that the client takes little of the machine."""
    host, text = url.removeprefix("http://").partition("/")[0], json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(*host.split(":"))
    writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return reader, writer


async def ask(url: str, prompt: str, tokens: int) -> Sample:
    """One streamed completion. Its tokens are what the server's usage says, or else its events."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    began, times, usage = time.perf_counter(), [], 0
    reader, writer = await post(url, {**body, "stream_options": {"include_usage": True}})
    if b" 200 " not in (status := await reader.readline()):
        raise RuntimeError(f"{url}: {status!r} {(await reader.read())[:500]!r}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            if b'"completion_tokens"' in line:
                usage = json.loads(line[6:])["usage"]["completion_tokens"]
            if b'"choices":[]' not in line.replace(b" ", b""):
                times.append(time.perf_counter())
    writer.close()
    return Sample(times[0] - began, [b - a for a, b in pairwise(times)], usage or len(times))


async def load(server: Server, clients: int, seconds: float, words: int, tokens: int, seed: int) -> dict[str, float]:
    """Clients that ask once, and again until so many seconds are over; the time of the last answer counts, too."""
    samples: list[Sample] = []
    began = time.perf_counter()

    async def one(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        while True:
            prompt = " ".join(draw.choice(WORDS) for _ in range(words))
            samples.append(await ask(server.url, prompt, tokens))
            if time.perf_counter() - began >= seconds:
                return

    await asyncio.gather(*(one(number) for number in range(clients)))
    wall = time.perf_counter() - began
    firsts = sorted(s.first_s for s in samples)
    gaps = sorted(gap for s in samples for gap in s.gaps_s)
    return {
        "tokens_per_s": sum(s.tokens for s in samples) / wall,
        "answers": len(samples),
        **{f"first_p{p}_ms": 1e3 * quantile(firsts, p) for p in (50, 95)},
        **{f"between_p{p}_ms": 1e3 * quantile(gaps, p) for p in (50, 95)},
    }


def quantile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else float("nan")


def measure(servers: list[Server], args: argparse.Namespace) -> None:
    for clients in args.clients:
        for turn in range(args.rounds + 1):  # turn 0 warms up
            for server in servers:
                server.signal(signal.SIGCONT)
                seconds = args.seconds if turn else 1.0
                found = asyncio.run(load(server, clients, seconds, args.prompt, args.tokens, turn))
                server.signal(signal.SIGSTOP)
                if turn:
                    server.rounds.setdefault(clients, []).append(found)
        for server in servers:
            print(line(server, clients), flush=True)


def line(server: Server, clients: int) -> str:
    m = median(server.rounds[clients])
    return (
        f"{server.name:<18} {clients:>3} clients  {m['tokens_per_s']:8.1f} tokens/s   first token p50 {m['first_p50_ms']:7.0f} "
        f"p95 {m['first_p95_ms']:7.0f} ms   between p50 {m['between_p50_ms']:6.1f} p95 {m['between_p95_ms']:6.1f} ms"
    )


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def main() -> int:
    parser = command_line(__doc__, rounds=3, threads=True, scratch="serving")
    parser.add_argument("--neox-lite", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama-cpp-python's server")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--clients", type=lambda text: [int(n) for n in words(text)], default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--prompt", type=int, default=64, metavar="WORDS")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, help="tokens a sequence may hold, default the model's own")
    args = parser.parse_args()
    if not (args.neox_lite / "tokenizer.json").exists():
        shutil.copy(DEMO / "tokenizer.json", args.neox_lite)
    with ExitStack() as stack:
        servers = []
        commands = {"neox-lite": own_command(args)}
        if args.gguf:
            commands["llama-cpp-python"] = llama_command(args)
        for name, (command, port) in commands.items():
            servers.append(stack.enter_context(running(name, command, port, args.scratch / f"{name}.log")))
            servers[-1].signal(signal.SIGSTOP)
        measure(servers, args)
    if args.out:
        rounds = [(server.name, n, found) for server in servers for n, found in server.rounds.items()]
        rows = [{"server": name, "clients": n, **median(found), "rounds": found} for name, n, found in rounds]
        given = {key: value for key, value in vars(args).items() if key not in ("out", "scratch")}
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
        write_json(args.out, {"machine": machine(), "settings": settings, "rows": rows})
    return 0


def own_command(args: argparse.Namespace) -> tuple[list[str], int]:
    port = free_port()
    command = [sys.executable, "-m", "neox_lite_app", "serve", str(args.neox_lite), "--no-page", "--port", str(port)]
    command += ["--threads", str(args.threads), "--device", "cpu", "--warm"]
    if (args.neox_lite / "neox_lite_head.safetensors").exists():
        command += ["--head", "int8"]
    return command + (["--context", str(args.context)] if args.context else []), port


def llama_command(args: argparse.Namespace) -> tuple[list[str], int]:
    port = free_port()
    command = [str(args.peers_python), "-m", "llama_cpp.server", "--model", str(args.gguf), "--port", str(port)]
    command += ["--n_threads", str(args.threads), "--n_threads_batch", str(args.threads), "--flash_attn", "True"]
    return [*command, "--n_ctx", str(args.context or 2048), "--interrupt_requests", "False"], port


if __name__ == "__main__":
    sys.exit(main())
