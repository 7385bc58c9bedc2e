"""A server of the bundled model for minutes under many clients and open pages: no answer of another, no growing memory.

    python -m benchmarks.serving.soak [--minutes 5] [--clients 64] [--pages 16] [--out FILE]

Every client asks the same question of its own again and again, greedily, and leaves some answers in the middle; its first
answer, given before the load, is what it must get. Pages are tabs of one Chromium that chat (needs playwright). The server's
memory is what the kernel counts as the process's own, once a second; drift compares the last quarter of the time with the
second one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, machine
from benchmarks.serving.load import Server, free_port, running

DEMO = ROOT / "app" / "neox_lite_app" / "demo_model"
NAMES = ("ROMEO", "JULIET", "KING HENRY", "OPHELIA", "MACBETH", "PORTIA", "VIOLA", "DUKE")
LEAVE = 0.1  # of the answers are left in the middle
TOKENS = 48


async def post(url: str, body: dict[str, Any], leave_after: int | None = None) -> dict[str, Any] | None:
    """A completion; None where it was left after so many bytes."""
    host = url.removeprefix("http://").partition("/")[0]
    reader, writer = await asyncio.open_connection(*host.split(":"))
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    try:
        if leave_after is not None:
            await reader.read(leave_after)
            return None
        found = await reader.read()
    finally:
        writer.close()
    status = found.split(b" ", 2)[1].decode()
    return {"status": status, "body": json.loads(found.partition(b"\r\n\r\n")[2]) if status == "200" else None}


def question(number: int) -> dict[str, Any]:
    prompt = f"{NAMES[number % len(NAMES)]}:\nScene {number}. "
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "user": f"client {number}"}


async def client(server: Server, number: int, expected: list[str], ends: float, counts: Counter[str]) -> None:
    draw = random.Random(number)
    while time.monotonic() < ends:
        if draw.random() < LEAVE:
            await post(server.url, {**question(number), "stream": True}, leave_after=draw.randrange(1, 4000))
            counts["left in the middle"] += 1
            continue
        found = await post(server.url, question(number))
        assert found is not None
        if found["body"] is None:
            counts[f"refused with {found['status']}"] += 1
            continue
        text = found["body"]["choices"][0]["text"]
        counts["answers"] += 1
        if text != expected[number]:
            counts["answers of another client" if text in expected else "answers rounded another way"] += 1


def own_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", status, re.MULTILINE))


async def watch(server: Server, ends: float, seen: list[tuple[int, int]]) -> None:
    """Each second the server's own memory, and how much of that is the KV cache, which grows to its bound by design."""
    metrics = server.url.removesuffix("/v1") + "/metrics"
    async with httpx.AsyncClient(timeout=None) as http:
        while time.monotonic() < ends:
            text = (await http.get(metrics)).text
            cache = re.search(r'^neox_lite_memory_bytes{tier="cache_cpu"} (.*)$', text, re.MULTILINE)
            seen.append((own_memory(server.process.pid), int(float(cache[1])) if cache else 0))
            await asyncio.sleep(1)


async def pages(url: str, count: int, ends: float, counts: Counter[str]) -> None:
    """Tabs that send a message, wait for the answer to grow, stop it, and go on."""
    from playwright.async_api import async_playwright

    async with async_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        browser = await p.chromium.launch(executable_path="/usr/bin/chromium", args=flags)

        async def tab(number: int) -> None:
            page = await (await browser.new_context()).new_page()
            await page.goto(url)
            await page.get_by_role("tab", name="Chat").click()
            message, stop = (
                page.get_by_label("Message", exact=True),
                page.get_by_role("button", name="Stop", exact=True),
            )
            for turn in itertools.count():
                if time.monotonic() >= ends:
                    break
                if turn % 8 == 0:
                    await page.get_by_role("button", name="New conversation", exact=True).click()
                await message.fill(f"Speak, sir number {number}!")
                await message.press("Enter")
                counts["messages on pages"] += 1
                await page.wait_for_timeout(4000)
                if await stop.is_visible():
                    await message.press("Escape")
                    counts["answers stopped on pages"] += 1
                await stop.wait_for(state="hidden", timeout=180_000)  # the browsers have their part in the load
                asked = await page.locator(".turn.user .body").all_inner_texts()
                strange = [text for text in asked if text != f"Speak, sir number {number}!"]
                counts["turns of another page"] += len(strange)
                counts["turns lost on pages"] += len(asked) != turn % 8 + 1
            counts["notices on pages"] += await page.locator(".notice, .toast-body").count()
            await page.context.close()

        await asyncio.gather(*(tab(number) for number in range(count)))
        await browser.close()


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    answers = [await post(server.url, question(number)) for number in range(args.clients)]
    expected = [found["body"]["choices"][0]["text"] for found in answers if found and found["body"]]
    counts: Counter[str] = Counter()
    seen: list[tuple[int, int]] = []
    ends = time.monotonic() + 60 * args.minutes
    work: list[Any] = [client(server, number, expected, ends, counts) for number in range(args.clients)]
    work += [watch(server, ends, seen)]
    if args.pages:
        work.append(pages(server.url.removesuffix("/v1"), args.pages, ends, counts))
    await asyncio.gather(*work)
    quarter = len(seen) // 4
    parts = {"second_quarter": seen[quarter : 2 * quarter], "last_quarter": seen[-quarter:]}
    own = {name: statistics.median(all - cache for all, cache in part) for name, part in parts.items()}
    return {
        "counts": dict(counts),
        "memory_without_cache_bytes": own,
        "cache_bytes": {name: statistics.median(cache for _, cache in part) for name, part in parts.items()},
        "drift": own["last_quarter"] / own["second_quarter"] - 1,
        "every_20_s": seen[::20],
    }


@contextmanager
def served(with_page: bool, scratch: Path) -> Iterator[Server]:
    port = free_port()
    os.environ["NEOX_LITE_DATA"] = str(scratch / "data")  # conversations of the pages
    command = [sys.executable, "-m", "neox_lite_app", "serve", str(DEMO), "--port", str(port), "--device", "cpu"]
    command += [] if with_page else ["--no-page"]
    with running("neox-lite", command, port, scratch / "server.log") as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pages", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, served(args.pages > 0, Path(scratch)) as server:
        found = asyncio.run(soak(server, args))
    print(json.dumps(found, indent=1))
    if args.out:
        settings = {"minutes": args.minutes, "clients": args.clients, "pages": args.pages}
        args.out.write_text(json.dumps({"machine": machine(), "settings": settings, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
