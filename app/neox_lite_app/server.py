"""neox-lite serve: one process and one port for the chat page and the API. Knows neither's insides."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from neox_lite.errors import ArgumentError, UnsupportedError

from .load_for_command import load
from .serving.engine import Engine
from .terminal import note

if TYPE_CHECKING:
    from .serving.keys import Keys
    from .serving.security import Guard, Hosts

KEY_VARIABLE = "NEOX_LITE_API_KEY"
DRAIN_S = 30.0  # that running answers may take after the first Ctrl-C
LAST_BYTES_S = 0.2  # for the page to show the last of them
BACKLOG = 512
MAX_CONNECTIONS = 1024


def serve(args: argparse.Namespace) -> int:
    """Load the model, open the port, and serve until a signal ends it."""
    if args.engine != "vllm":
        _check_packages(args.page)
    from .serving.security import Hosts

    if args.adapter is not None and args.model is None:
        raise ArgumentError("--adapter goes with MODEL, beside which it runs; name it")
    key = _key(args.api_key)
    hosts = Hosts(args.host, args.allowed_host)
    if key is None and not hosts.loopback:
        raise ArgumentError(
            f"--host {args.host} lets others in, so it needs --api-key KEY, or {KEY_VARIABLE} in the environment; "
            "--api-key auto makes one up"
        )
    if args.engine == "vllm":
        from .serving.vllm import hand_over

        hand_over(args, key)
    from .serving.keys import Keys

    listener = _bind(args.host, args.port)
    engine = Engine(sequences=args.max_sequences, waiting=args.queue, idle_s=args.idle_unload)
    with contextlib.closing(engine), contextlib.closing(listener):
        if args.model is not None:
            engine.load(args.model, lambda: load(args.model, args, args.head))
        guard = build(engine, hosts, Keys(key) if key else None, args.page and args, args.form)
        if args.api_key == "auto":
            note(f"API key, shown this once: {key}")
        return _run(guard, engine, listener, args.host)


def build(
    engine: Engine,
    hosts: Hosts,
    keys: Keys | None = None,
    page: argparse.Namespace | Literal[False] = False,
    form: str | None = None,
) -> Guard:
    """The whole application: the guard before API and page.

    page: the arguments of `serve`, by which the page loads models, or False for none. form: a prompt form's name.
    """
    from .serving.api import Api
    from .serving.security import Guard

    metrics = None
    if find_spec("prometheus_client") is not None:  # without it, /metrics says what to install
        from .serving.metrics import Metrics

        metrics = Metrics(engine)
    app: Any = Api(engine, metrics, form).app()
    if page:
        _mount_page(app, engine, page)
    return Guard(app, hosts, keys, page is not False, metrics)


def _check_packages(page: bool) -> None:
    needed = ["starlette", "uvicorn", *(["gradio"] if page else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        api_only = " (--no-page serves the API without gradio)" if missing == ["gradio"] else ""
        raise UnsupportedError(f"serve needs {', '.join(missing)}: pip install 'neox-lite[page]'{api_only}")


def _key(given: str | None) -> str | None:
    """The API key: --api-key before the environment, which ps does not show."""
    key = given if given is not None else os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if key == "auto":
        return secrets.token_urlsafe(24)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ArgumentError("the API key is empty or has characters beside printable ASCII; use letters and digits")
    return key


# The page -------------------------------------------------------------------------------------------------------------


def _mount_page(app: Any, engine: Engine, args: argparse.Namespace) -> None:
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # sharing, file serving, server-side rendering: nothing of it from the environment
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Else it keeps 10,000 events of its page, and after each makes a table of all with pandas.
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(sys.maxsize)}
    import gradio

    from .page import build_page, looks

    gradio.mount_gradio_app(
        app,
        build_page(engine, args),
        path="",
        **looks(),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
    )


# The port -------------------------------------------------------------------------------------------------------------


def _bind(host: str, port: int) -> socket.socket:
    """A socket that has the port; connections are refused until it listens, when everything is ready."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ArgumentError(f"--host {host}: {error.strerror}; use 127.0.0.1, or an address of this machine") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # Connections of an earlier run that are still closing do not block the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_bind(host, port, error) from None
    return listener


def _cannot_bind(host: str, port: int, error: OSError) -> ArgumentError:
    if error.errno == errno.EADDRINUSE:
        return ArgumentError(f"--port {port} on {host} is taken by another program; try --port {_free_port(host)}")
    hint = "; ports below 1024 are the administrator's" if error.errno == errno.EACCES else ""
    return ArgumentError(f"--host {host} --port {port}: {error.strerror}{hint}")


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


def _url(host: str, port: int) -> str:
    """Where a browser finds it: of all addresses, this machine's own."""
    if host in ("0.0.0.0", "::"):
        host = _own_address()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _own_address() -> str:
    """This machine's address in its network; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


# Running --------------------------------------------------------------------------------------------------------------


def _run(guard: Guard, engine: Engine, listener: socket.socket, host: str) -> int:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends in order: nothing new, then what runs, then the rest."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"neox-lite is at {_url(host, listener.getsockname()[1])} (Ctrl-C ends it)", flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.should_exit, self.force_exit = True, self.should_exit
            guard.closing = True

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            handled = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for sig, handler in handled.items():
                    signal.signal(sig, handler)

        async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            deadline = time.monotonic() + DRAIN_S
            while _busy(engine, guard) and not self.force_exit and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            await asyncio.sleep(LAST_BYTES_S)
            for connection in list(self.server_state.connections):
                connection.transport.close()  # pages keep theirs open without end
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would report what was cut off
            await super().shutdown(list(sockets or []))

    config = uvicorn.Config(
        guard,
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="error",
        access_log=False,
        proxy_headers=False,  # whoever sends X-Forwarded-For would choose the address that wrong keys count against
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    try:
        server.run(sockets=[listener])
    except OSError as error:
        raise _cannot_bind(host, listener.getsockname()[1], error) from None
    return 130 if server.force_exit else 0


def _busy(engine: Engine, guard: Guard) -> bool:
    status = engine.status()
    return guard.answering > 0 or status.active > 0 or status.waiting > 0
