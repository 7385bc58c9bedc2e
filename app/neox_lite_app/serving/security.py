"""What stands before everything else that is served: host, origin, key, path and size of a request. Knows no route's work.

The attacker in mind is a hostile web page in a browser on the same machine or network. It can send requests here, so a foreign
Origin is refused; it can point a name of its own at this address (DNS rebinding), so a foreign Host is refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import Keys
from .login import login_page

if TYPE_CHECKING:
    from .metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_BODY = 1 << 20
BODY_TIMEOUT_S = 30.0
SESSION_COOKIE = "neox_lite_session"
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:(?P<port>[0-9]{1,5}))?")

# What the page needs of Gradio's routes; uploads, files, proxied addresses, the runs' history and all else do not exist here.
PAGE = re.compile(
    r"/(config/?|theme\.css|robots\.txt|manifest\.json|favicon\.ico|(static|assets|svelte)/.+|"
    r"gradio_api/(info/?|theme\.css|startup-events|app_id/?|heartbeat/[a-z0-9]+|queue/(join|data)|cancel|reset/?))?"
)
API = re.compile(r"/(v1(/.*)?|health|metrics)")
OPEN = ("/health", "/login")  # answered without the key

# 'unsafe-inline' and 'unsafe-eval' are Gradio's: its page starts from inline scripts, and its event handlers are compiled.
# Output of the model is escaped where it is shown; this keeps what might get through from reaching any other host.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"referrer-policy": b"same-origin",  # trap: with no-referrer, browsers send our own login form with Origin: null
}


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, tuple(headers)


class _Gone(Exception):
    """The client has gone before its request was whole."""


class Hosts:
    """The names under which this server is reached.

    Bound to all addresses, every literal address is one: a page that a browser opened at an address cannot be another's.
    """

    def __init__(self, bound: str = "127.0.0.1", extra: Iterable[str] = ()) -> None:
        address = _address(bound)
        self.loopback = bound.lower() == "localhost" or (address is not None and address.is_loopback)
        self.any_address = address is not None and address.is_unspecified
        bound = f"[{bound}]" if address is not None and address.version == 6 else bound
        self.names = {name.lower() for name in (*LOOPBACK, bound, *extra)}

    def allow(self, header: str) -> bool:
        """Whether a Host header names us, at any port: tunnels such as ssh -L 8000:localhost:7860 change it."""
        found = HOST.fullmatch(header.lower())
        if found is None or int(found["port"] or 80) > 65535:
            return False
        return found["name"] in self.names or (self.any_address and _address(found["name"].strip("[]")) is not None)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


class Guard:
    """ASGI middleware in front of the API and the page.

    keys None: no key is needed. page: whether Gradio's routes exist. metrics: what counts every answer, also refusals.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Hosts,
        keys: Keys | None = None,
        page: bool = True,
        metrics: Metrics | None = None,
        max_body: int = MAX_BODY,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self.app, self.hosts, self.keys, self.page, self.metrics = app, hosts, keys, page, metrics
        self.max_body, self.body_timeout_s = max_body, body_timeout_s
        self.closing = False  # refuse what is new, on connections that are still open
        self.answering = 0  # requests to the API, whose answers have not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await self._websocket(scope, receive, send)
        send = self._opening(scope["path"], send)
        try:
            self._check_source(scope)
            if self.keys is not None and await self._login(self.keys, scope, receive, send):
                return None
            self._check_path(scope)
            receive = await self._whole_body(scope, receive)
        except _Gone:
            return None
        except Refusal as refusal:
            return await _refuse(refusal, send)
        ours = scope["path"].startswith("/v1/")
        self.answering += ours
        try:
            await self.app(scope, receive, send)
        finally:
            self.answering -= ours

    def _opening(self, path: str, send: Send) -> Send:
        """Count the answer, add the security headers, and take away those that would open the answer to other sites."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if self.metrics is not None:
                    self.metrics.answered(path, message["status"])
                message = {**message, "headers": _with_ours(message.get("headers", ()))}
            await send(message)

        return sending

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing here is served over websockets; what may come from elsewhere does not even learn that."""
        try:
            self._check_source(scope)
            self._check_path(scope)
            if self.keys is not None and not self.keys.know_session(_cookie(scope)):
                raise Refusal(401, "no key")
        except Refusal:
            await receive()
            return await send({"type": "websocket.close", "code": 1008})  # before it is accepted: HTTP 403
        return await self.app(scope, receive, send)

    def _check_source(self, scope: Scope) -> None:
        """Host, Origin and what the browser says of where a request comes from."""
        if self.closing:
            raise Refusal(503, "the server is shutting down", headers=[("connection", "close"), ("retry-after", "5")])
        host = _only(scope, b"host")
        if host is None or not self.hosts.allow(host):
            raise Refusal(
                400,
                f"the Host header is {host!r}, which is not a name of this server; --allowed-host adds one",
                "invalid_host",
            )
        origins = _values(scope, b"origin")
        if any(not _same_origin(origin, host) for origin in origins):
            raise Refusal(403, f"requests of other sites are refused; Origin is {origins[0]!r}", "foreign_origin")
        site, mode = (_only(scope, name) for name in (b"sec-fetch-site", b"sec-fetch-mode"))
        link = scope.get("method") in ("GET", "HEAD") and mode == "navigate"  # followed from another page
        if site not in (None, "same-origin", "none") and not link:
            raise Refusal(403, f"requests of other sites are refused; Sec-Fetch-Site is {site!r}", "foreign_origin")

    def _check_path(self, scope: Scope) -> None:
        path = scope["path"]
        if not API.fullmatch(path) and not (self.page and PAGE.fullmatch(path)):
            raise Refusal(404, f"there is nothing at {path[:200]!r}", "not_found")

    async def _login(self, keys: Keys, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the request was about the key and is answered. Raises Refusal for one without."""
        path, method = scope["path"], scope.get("method")
        if path == "/logout" and method == "POST":
            keys.forget_session(_cookie(scope))
            await _redirect(send, "/login", _set_cookie("", 0))
        elif path == "/login":
            await self._login_form(keys, scope, receive, send)
        elif path in OPEN or self._has_key(keys, scope):
            return False
        elif method in ("GET", "HEAD") and "text/html" in (_only(scope, b"accept") or ""):
            await _redirect(send, "/login")
        else:
            raise Refusal(
                401,
                "an API key is needed: the header Authorization: Bearer KEY, with the key that the server was started with",
                "invalid_api_key",
                [("www-authenticate", "Bearer")],
            )
        return True

    def _has_key(self, keys: Keys, scope: Scope) -> bool:
        if keys.know_session(_cookie(scope)):
            return True
        scheme, _, given = (_only(scope, b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            return False
        return _try_key(keys, given.strip(), scope)

    async def _login_form(self, keys: Keys, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD"):
            return await _html(send, 200, login_page())
        if scope["method"] != "POST":
            raise Refusal(405, "the login takes GET and POST", headers=[("allow", "GET, POST")])
        body = (await (await self._whole_body(scope, receive))())["body"]
        given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=8).get("key", [""])[0]
        try:
            known = _try_key(keys, given, scope)
        except Refusal as refusal:
            return await _html(send, refusal.status, login_page(refusal.message), refusal.headers)
        if not known:
            return await _html(send, 401, login_page("That is not the key."))
        return await _redirect(send, "/", _set_cookie(keys.new_session(), keys.session_s))

    async def _whole_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body here, bounded in size and time, and give back a `receive` that has it in one piece."""
        length = _only(scope, b"content-length") or "0"
        too_large = Refusal(
            413, f"the body is larger than {self.max_body} bytes", "request_too_large", [("connection", "close")]
        )
        if not length.isdigit() or len(length) > 15 or int(length) > self.max_body:
            raise too_large
        parts: list[bytes] = []
        size = 0

        async def read() -> None:
            nonlocal size
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > self.max_body:
                    raise too_large
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(read(), self.body_timeout_s)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body did not arrive within {self.body_timeout_s:g} s", headers=[("connection", "close")]
            ) from None
        waiting: list[Message] = [{"type": "http.request", "body": b"".join(parts)}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay


# Headers --------------------------------------------------------------------------------------------------------------


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _only(scope: Scope, name: bytes) -> str | None:
    """A header's value; None where it is missing or given more than once."""
    values = _values(scope, name)
    return values[0] if len(values) == 1 else None


def _same_origin(origin: str, host: str) -> bool:
    """Whether an Origin is a page that came from this Host; a proxy before us may speak https."""
    origin, host = origin.lower(), host.lower()
    return any(origin.removesuffix(port) == scheme + host.removesuffix(port) for scheme, port in _SCHEMES)


_SCHEMES = (("http://", ":80"), ("https://", ":443"))  # a browser leaves the default port out


def _cookie(scope: Scope) -> str:
    for line in _values(scope, b"cookie"):
        for pair in line.split(";"):
            name, _, value = pair.strip().partition("=")
            if name == SESSION_COOKIE:
                return value
    return ""


def _try_key(keys: Keys, given: str, scope: Scope) -> bool:
    """Whether it is the key. Raises Refusal where too many wrong ones came from there."""
    address = (scope.get("client") or ("?",))[0]
    if wait_s := keys.blocked_s(address):
        raise Refusal(
            429, f"too many wrong keys; try again in {wait_s} s", "rate_limit_exceeded", [("retry-after", str(wait_s))]
        )
    return keys.check(given, address)


def _set_cookie(value: str, age_s: int) -> list[tuple[str, str]]:
    return [("set-cookie", f"{SESSION_COOKIE}={value}; Path=/; Max-Age={age_s}; HttpOnly; SameSite=Strict")]


# Responses ------------------------------------------------------------------------------------------------------------


def _with_ours(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    others = [
        (name, value)
        for name, value in headers
        if name.lower() not in HEADERS and not name.lower().startswith(b"access-control-")
    ]
    return [*others, *HEADERS.items()]


async def _respond(send: Send, status: int, kind: str, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
    standard = [("content-type", kind), ("content-length", str(len(body))), ("cache-control", "no-store"), *headers]
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in standard]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def _refuse(refusal: Refusal, send: Send) -> None:
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
    await _respond(send, refusal.status, "application/json", json.dumps({"error": error}).encode(), refusal.headers)


async def _html(send: Send, status: int, text: str, headers: Iterable[tuple[str, str]] = ()) -> None:
    await _respond(send, status, "text/html; charset=utf-8", text.encode(), headers)


async def _redirect(send: Send, where: str, headers: Iterable[tuple[str, str]] = ()) -> None:
    await _respond(send, 303, "text/plain", b"", [("location", where), *headers])
