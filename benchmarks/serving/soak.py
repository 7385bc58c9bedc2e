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
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import DEMO, command_line, machine, status_bytes, write_json
from benchmarks.serving.load import Server, free_port, post, running

NAMES = ("ROMEO", "JULIET", "KING HENRY", "OPHELIA", "MACBETH", "PORTIA", "VIOLA", "DUKE")
LEAVE = 0.1  # of the answers are left in the middle
TOKENS = 48


async def answer(url: str, body: dict[str, Any]) -> tuple[str, str | None]:
    """The status of a completion, and its text."""
    reader, writer = await post(url, body)
    found = await reader.read()
    writer.close()
    status = found.split(b" ", 2)[1].decode()
    whole = json.loads(found.partition(b"\r\n\r\n")[2]) if status == "200" else None
    return status, whole and whole["choices"][0]["text"]


def question(number: int) -> dict[str, Any]:
    prompt = f"{NAMES[number % len(NAMES)]}:\nScene {number}. "
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "user": f"client {number}"}


async def client(server: Server, number: int, expected: list[str], ends: float, counts: Counter[str]) -> None:
    draw = random.Random(number)
    while time.monotonic() < ends:
        if draw.random() < LEAVE:
            reader, writer = await post(server.url, {**question(number), "stream": True})
            await reader.read(draw.randrange(1, 4000))
            writer.close()
            counts["left in the middle"] += 1
            continue
        status, text = await answer(server.url, question(number))
        if text is None:
            counts[f"refused with {status}"] += 1
            continue
        counts["answers"] += 1
        if text != expected[number]:
            counts["answers of another client" if text in expected else "answers rounded another way"] += 1


async def watch(server: Server, ends: float, seen: list[tuple[int, int]]) -> None:
    """Each second the server's own memory, and how much of that is the KV cache, which grows to its bound by design."""
    metrics = server.url.removesuffix("/v1") + "/metrics"
    async with httpx.AsyncClient(timeout=None) as http:
        while time.monotonic() < ends:
            text = (await http.get(metrics)).text
            cache = re.search(r'^neox_lite_memory_bytes{tier="cache_cpu"} (.*)$', text, re.MULTILINE)
            own = sum(status_bytes(server.process.pid, anonymous="RssAnon", shared="RssShmem").values())
            seen.append((own, int(float(cache[1])) if cache else 0))
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
            message = page.get_by_label("Message", exact=True)
            stop = page.get_by_role("button", name="Stop", exact=True)
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
    expected = [(await answer(server.url, question(number)))[1] or "" for number in range(args.clients)]
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


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pages", type=int, default=16)
    args = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "neox_lite_app", "serve", str(DEMO), "--port", str(port), "--device", "cpu"]
    command += [] if args.pages else ["--no-page"]
    with tempfile.TemporaryDirectory() as scratch:
        # Conversations of the pages.
        os.environ["NEOX_LITE_DATA"] = f"{scratch}/data"
        with running("neox-lite", command, port, Path(scratch) / "server.log") as server:
            found = asyncio.run(soak(server, args))
    print(json.dumps(found, indent=1))
    if args.out:
        settings = {"minutes": args.minutes, "clients": args.clients, "pages": args.pages}
        write_json(args.out, {"machine": machine(), "settings": settings, **found})


if __name__ == "__main__":
    main()
