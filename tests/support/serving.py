"""A server of the demo model for tests: in a thread with a real port, and single requests straight into an application."""

import asyncio
import contextlib
import json
import socket
import threading

import uvicorn

from neox_lite import GPTNeoXForCausalLM
from neox_lite_app.paths import DEMO
from neox_lite_app.server import build
from neox_lite_app.serving.engine import Engine
from neox_lite_app.serving.security import Hosts


@contextlib.contextmanager
def demo_engine(**options):
    engine = Engine(**options)
    with contextlib.closing(engine):
        engine.load(str(DEMO), lambda: GPTNeoXForCausalLM.from_pretrained(DEMO, device_map="cpu"))
        yield engine


def application(engine, keys=None, hosts=None, **options):
    return build(engine, hosts or Hosts(), keys, page=False, **options)


@contextlib.contextmanager
def serving(app, host="127.0.0.1", lifespan="off"):
    """The address of the application behind a real server. lifespan: "on" for the page, whose queue starts by it."""
    with socket.create_server((host, 0)) as listener:
        config = uvicorn.Config(app, http="h11", ws="none", log_level="critical", lifespan=lifespan)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


class Reply:
    def __init__(self, messages):
        start = next(m for m in messages if m["type"] == "http.response.start")
        self.status = start["status"]
        self.headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        self.body = b"".join(m.get("body", b"") for m in messages if m["type"] == "http.response.body")

    def json(self):
        return json.loads(self.body)


def scope_of(method, path, headers=(), client="127.0.0.1", kind="http"):
    """headers: a dict of those beside a Host, or a list of all header lines."""
    pairs = headers if isinstance(headers, list) else ({"host": "127.0.0.1:7860"} | dict(headers)).items()
    lines = [(name.lower().encode(), str(value).encode("latin-1")) for name, value in pairs]
    path, _, query = path.partition("?")
    return {"type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": lines,
            "client": (client, 1), "server": ("127.0.0.1", 7860)}  # fmt: skip


async def exchange(app, scope, messages):
    """What an ASGI application sends where these messages come, and then nothing."""
    waiting, sent = list(messages), []

    async def receive():
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def ask(app, method, path, body=b"", headers=(), client="127.0.0.1", parts=None):
    """One request straight into an ASGI application. parts: the body in several messages."""
    parts = [body] if parts is None else list(parts)
    messages = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    return Reply(await exchange(app, scope_of(method, path, headers, client), messages))


async def ask_json(app, path, body):
    """A posted object, or bytes that are to pass for one."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await ask(app, "POST", path, raw, {"content-type": "application/json"})
