"""neox-lite serve as a process: when the port opens, what it prints, how it ends, and what it needs."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess

import pytest

pytest.importorskip("uvicorn", reason="needs pip install '.[page]'")

from support.commands import environment, run_python, start

from neox_lite.errors import ArgumentError, UnsupportedError
from neox_lite_app import server
from neox_lite_app.cli import build_parser
from neox_lite_app.paths import DEMO
from neox_lite_app.server import KEY_VARIABLE
from neox_lite_app.serving.security import PAGE

LONG = 60  # seconds that nothing here takes, unless it hangs
NOT_OURS = ("no.such.host.invalid", "203.0.113.7", "999.1.1.1")
posix = pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")


class Serving:
    """The command in a process of its own, once its port is open."""

    def __init__(self, *words, **variables):
        self.process = start("serve", *words, env=environment(HF_HUB_OFFLINE="1", **variables))
        self.line = self.process.stdout.readline()
        found = re.search(r"http://(127\.0\.0\.1|\[::1\]):(\d+)", self.line)
        if found is None:
            raise AssertionError(self.process.communicate())
        self.host, self.port = found[1].strip("[]"), int(found[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=LONG)
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, {"content-type": "application/json", **headers})
        return connection.getresponse()

    def end(self, *signals):
        for each in signals:
            self.process.send_signal(each)
        out, err = self.process.communicate(timeout=LONG)
        return self.process.returncode, out, err


def serve_demo(*words, **variables):
    return Serving(DEMO, "--no-page", "--port", 0, "--device", "cpu", *words, **variables)


def answer(serving, tokens, stream=True, n=1):
    body = {"prompt": "KING:\n", "max_tokens": tokens, "stream": stream, "ignore_eos": True, "n": n}
    return serving.ask("POST", "/v1/completions", body)


# Start ----------------------------------------------------------------------------------------------------------------


def test_connections_are_refused_until_everything_is_ready(monkeypatch, run):
    """While the model is loaded the port is ours, but closed."""
    taken, tried, bind = [], [], server._bind

    def load(name, args, head):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(taken[0].getsockname())
        tried.append(name)
        raise ArgumentError("enough")

    monkeypatch.setattr(server, "load", load)
    monkeypatch.setattr(server, "_bind", lambda host, port: taken.append(bind(host, port)) or taken[-1])
    assert run("serve", DEMO, "--no-page", "--port", 0) == (1, "", "neox-lite: error: enough\n")
    assert len(taken) == 1 and tried == [str(DEMO)]


@pytest.fixture(scope="module")
def bare():
    """A server without a model, which no test ends."""
    with Serving("--no-page", "--port", 0, "--allowed-host", "chat.home") as serving:
        yield serving


def test_without_a_model_it_serves_and_says_so(bare):
    assert bare.ask("GET", "/health").status == 503
    assert json.load(answer(bare, 1))["error"]["code"] == "model_not_loaded"


def test_a_port_that_is_taken_is_said_with_another(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, error = run("serve", "--no-page", "--port", port)
    assert code == 1 and f"--port {port} on 127.0.0.1 is taken" in error and error.count("\n") == 1
    offered = int(re.search(r"try --port (\d+)", error)[1])
    assert offered != port
    socket.create_server(("127.0.0.1", offered)).close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *[(f"--host {host} --api-key {'k' * 20}", f"--host {host}") for host in NOT_OURS],
        *[(f"--host {host}", "--api-key") for host in ("0.0.0.0", "::", "192.168.1.5")],
        ("no-such-folder --port 0", "no-such-folder"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_no_port(run, monkeypatch, words, message):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    code, out, error = run("serve", "--no-page", *words.split())
    assert (code, out) == (1, "") and error.startswith("neox-lite: error: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("page", "missing"), [(True, "gradio"), (True, "starlette"), (False, "uvicorn")])
def test_what_is_not_installed_is_said(monkeypatch, page, missing):
    found = server.find_spec
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(UnsupportedError, match=rf"needs {missing}.*pip install 'neox-lite\[page\]'") as error:
        server._check_packages(page)
    assert ("--no-page" in str(error.value)) == (missing == "gradio")


def test_the_api_alone_needs_no_gradio():
    code = (
        "import sys; sys.modules['gradio'] = sys.modules['prometheus_client'] = sys.modules['llguidance'] = None\n"
        "import importlib.util; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: real(n, *a) if sys.modules.get(n, 1) is not None else None\n"
        "from neox_lite_app.serving.engine import Engine; from neox_lite_app.serving.security import Hosts\n"
        "from neox_lite_app.server import build\n"
        "engine = Engine(); build(engine, Hosts(), page=False); engine.close(); print('built')"
    )
    done = run_python(code)
    assert done.stdout == "built\n", done.stderr


def test_wrong_usage_is_seen_before_anything_is_imported():
    for words in ("--port 65536", "--port -1", "--queue -1", "--max-sequences 0", "--idle-unload 0"):
        with pytest.raises(SystemExit) as error:
            build_parser().parse_args(["serve", *words.split()])
        assert error.value.code == 2


# Hosts and keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "tab\tkey"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ArgumentError, match="API key"):
        server._key(key)


def test_the_key_of_the_environment_counts_and_the_flag_goes_before_it(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "from-the-environment")
    assert server._key(None) == "from-the-environment" and server._key("flag") == "flag"
    made = {server._key("auto") for _ in range(3)}
    assert len(made) == 3 and all(len(key) >= 32 for key in made)
    monkeypatch.delenv(KEY_VARIABLE)
    assert server._key(None) is None


@posix
def test_with_a_key_in_the_environment_it_is_asked_for_and_not_shown():
    with serve_demo("--host", "127.0.0.1", **{KEY_VARIABLE: "home-network-key"}) as serving:
        assert serving.ask("GET", "/v1/models").status == 401
        assert serving.ask("GET", "/v1/models", authorization="Bearer home-network-key").status == 200
        assert serving.ask("GET", "/health").status == 200
        pid = str(serving.process.pid)
        shown = subprocess.run(["ps", "-o", "args", "-p", pid], capture_output=True, text=True).stdout
        _, out, err = serving.end(signal.SIGTERM)
        assert "home-network-key" not in shown + serving.line + out + err


def test_other_hosts_and_origins_are_refused_by_the_real_server(bare):
    assert bare.ask("GET", "/v1/models", host="evil.example").status == 400
    for origin in ("http://evil.example", "null"):
        assert bare.ask("POST", "/v1/completions", {}, origin=origin).status == 403
    reply = bare.ask("GET", "/v1/models", host="chat.home")
    assert reply.status == 200 and reply.getheader("server") is None
    assert "default-src" in reply.getheader("content-security-policy")


def test_a_body_in_chunks_ends_at_the_limit_of_the_real_server(bare):
    with socket.create_connection((bare.host, bare.port)) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost:{bare.port}\r\ntransfer-encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        try:
            for _ in range(64):
                raw.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):  # it has hung up already
            return
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 413")


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_is_served_whatever_the_environment_says_and_holds_no_server_when_it_is_open(tmp_path):
    pytest.importorskip("gradio", reason="needs pip install '.[page]'")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    hostile = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_VIBE_MODE": "1", "GRADIO_ROOT_PATH": "/x"}
    hostile |= dict.fromkeys(("GRADIO_ANALYTICS_ENABLED", "GRADIO_MCP_SERVER", "GRADIO_SSR_MODE"), "True")
    with Serving(DEMO, "--port", 0, "--device", "cpu", **hostile) as serving:
        reply = serving.ask("GET", "/")
        page = reply.read().decode()
        assert reply.status == 200 and '"title":"neox-lite"' in page
        config = json.load(serving.ask("GET", "/config"))
        assert config["root"] == f"http://127.0.0.1:{serving.port}" and not config.get("mcp_server")
        assert config["vibe_mode"] is config["analytics_enabled"] is False
        for path in ("/gradio_api/file=", "/file=", "/gradio_api/proxy=http://"):
            assert serving.ask("GET", f"{path}{secret}").status == 404
        for path in ("/gradio_api/upload", "/gradio_api/vibe-edit"):
            assert serving.ask("POST", path, {}).status == 404
        beat = serving.ask("GET", "/gradio_api/heartbeat/abc")
        assert beat.status == 200
        code, _, err = serving.end(signal.SIGTERM)
        assert code == 0 and "Traceback" not in err


def test_of_gradios_routes_only_those_of_a_page_are_let_through():
    pytest.importorskip("gradio", reason="needs pip install '.[page]'")
    code = (
        "import gradio, json; from fastapi import FastAPI\n"
        "page = gradio.mount_gradio_app(FastAPI(), gradio.Blocks(), '').routes[-1].app\n"
        "inner = [getattr(r, 'original_router', None) for r in page.routes]\n"  # newer FastAPIs keep routers as they are
        "print(json.dumps([r.path for r in [*page.routes, *(r for i in inner if i for r in i.routes)] if hasattr(r, 'path')]))"
    )
    done = run_python(code)
    routes = json.loads(done.stdout.splitlines()[-1])
    assert len(routes) > 50 and any("file=" in route for route in routes)
    let = {route for route in routes if PAGE.fullmatch(re.sub("{[^}]*}", "x", route))}
    assert {route.rstrip("/") for route in let} <= {
        *("", "/config", "/theme.css", "/robots.txt", "/manifest.json", "/favicon.ico"),
        *("/static/{path:path}", "/assets/{path:path}", "/svelte/{path:path}"),
        *("/gradio_api/info", "/gradio_api/theme.css", "/gradio_api/startup-events", "/gradio_api/app_id"),
        *("/gradio_api/heartbeat/{session_hash}", "/gradio_api/queue/join", "/gradio_api/queue/data"),
        *("/gradio_api/cancel", "/gradio_api/reset"),
    }


# End ------------------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_one_line_and_ends_at_once_and_in_order(number):
    with serve_demo() as serving:
        assert json.load(answer(serving, 4, stream=False))["usage"]["completion_tokens"] == 4
        # A connection that stays open is no reason to stay.
        with socket.create_connection((serving.host, serving.port)):
            code, out, err = serving.end(number)
        assert code == 0 and out == "" and "Traceback" not in err


def closing(serving):
    """Wait until the signal has arrived."""
    with contextlib.suppress(ConnectionError):
        while serving.ask("GET", "/health").status != 503:
            pass


@posix
def test_a_running_answer_is_finished_and_nothing_new_is_taken():
    with serve_demo() as serving:
        kept = http.client.HTTPConnection(serving.host, serving.port, timeout=LONG)  # it stays open

        def health():
            kept.request("GET", "/health")
            response = kept.getresponse()
            response.read()
            return response.status

        reply = answer(serving, 450, n=4)
        reply.read(1)
        assert health() == 200
        serving.process.send_signal(signal.SIGTERM)
        while (status := health()) == 200:
            pass
        assert status == 503
        closing(serving)
        text = reply.read().decode()
        assert text.endswith("data: [DONE]\n\n") and text.count('"finish_reason":"length"') == 4
        code, _, err = serving.end()
        assert code == 0 and "Traceback" not in err


@posix
def test_a_second_signal_ends_it_without_waiting():
    with serve_demo() as serving:
        reply = answer(serving, 480, n=8)
        reply.read(1)
        serving.process.send_signal(signal.SIGINT)
        closing(serving)
        code, _, err = serving.end(signal.SIGINT)
        assert code == 130 and "Traceback" not in err
        with pytest.raises(http.client.IncompleteRead):
            reply.read()


def test_the_command_hands_over_its_options_and_prints_a_made_up_key_once(monkeypatch, run):
    seen = {}

    class Engine:
        def __init__(self, **options):
            seen.update(options)

        def close(self):
            seen["closed"] = True

    monkeypatch.setattr(server, "Engine", Engine)
    monkeypatch.setattr(server, "_run", lambda *_: 0)
    limits = "--max-sequences 3 --queue 5 --idle-unload 60"
    code, _, told = run("serve", *limits.split(), "--no-page", "--port", 0, "--api-key", "auto")
    assert code == 0 and seen == {"sequences": 3, "waiting": 5, "idle_s": 60, "closed": True}
    assert told.count("API key, shown this once: ") == 1
