"""What a hostile page in a browser, a stranger in the network and a slow client try, and what they get."""

import asyncio
import secrets

import pytest
from support.serving import ask, exchange, scope_of

pytest.importorskip("starlette", reason="needs pip install '.[page]'")

from starlette.responses import PlainTextResponse

from neox_lite_app.serving.keys import GUESSES, MAX_ADDRESSES, MAX_SESSIONS, SESSION_S, WINDOW_S, Keys
from neox_lite_app.serving.security import Guard, Hosts

KEY = "correct-horse-battery"
EVIL = {"host": "evil.example"}


class Inside:
    """An application that counts who reaches it, and answers foreign sites as Gradio does."""

    def __init__(self):
        self.reached, self.bodies, self.websockets = [], [], 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            self.websockets += 1
            return
        self.reached.append(scope["path"])
        message = await receive()
        self.bodies.append(message.get("body"))
        headers = {
            "access-control-allow-origin": "*",
            "Access-Control-Allow-Credentials": "true",
            "x-frame-options": "ALLOW",
        }
        await PlainTextResponse("inside", headers=headers)(scope, receive, send)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def request(guard, method="GET", path="/", **options):
    return asyncio.run(ask(guard, method, path, **options))


def sent(guard, scope, *messages):
    return asyncio.run(exchange(guard, scope, messages))


def guarded(hosts=None, key=None, clock=None, **options):
    inside = Inside()
    keys = None if key is None else Keys(key, clock or Clock())
    return Guard(inside, hosts or Hosts(), keys, **options), inside


# Host, origin and fetch metadata ----------------------------------------------------------------------------------------

HERE = ("host", "127.0.0.1:7860")
METHODS = ("GET", "POST", "OPTIONS", "DELETE")
FOREIGN_HOSTS = (
    *("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost"),
    *("localhost.", "localhost.:7860", "127.0.0.1.", "127.0.0.1@evil.example", "evil.example@127.0.0.1"),
    *("user:pass@localhost", "127.0.0.1:\uff17860", "[::ffff:127.0.0.1]", "ⓛocalhost"),
    *("", " ", "127.0.0.1:", "127.0.0.1:abc", "127.0.0.1:99999", "127.0.0.1:7860:7860", "127.0.0.1:-1"),
    *("127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "127.0.0.2", "0.0.0.0", "[::]", "::1", "[::1", "::1]"),
    *("127.0.0.1/evil", "127.0.0.1, evil.example", "127.0.0.1 evil", "127.0.0.1\tx", "localhost#x", "http://localhost"),
    *("192.168.1.5:7860", "8.8.8.8", "localhost%00.evil.example", "local\x00host"),
)
FOREIGN_ORIGINS = (
    *("null", "http://evil.example", "https://evil.example", "http://127.0.0.1:8000", "http://127.0.0.1"),
    *("http://localhost:7860", "http://127.0.0.1:7860 http://x", "http://127.0.0.1:7860@evil.example", ""),
    *("http://127.0.0.1:7860.evil.example", "http://evil.example:7860", "http://127.0.0.1:78600"),
    *("127.0.0.1:7860", "file://", "chrome-extension://x", "http://127.0.0.1:7860/"),
)
TWO_ORIGINS = [("host", "localhost"), ("origin", "http://localhost"), ("origin", "http://evil.example")]
FETCHES = [("POST", "navigate"), ("POST", "no-cors"), ("GET", "no-cors"), ("GET", "cors"), ("GET", "")]
INVALID_HOSTS = [[("host", host.encode().decode("latin-1"))] for host in FOREIGN_HOSTS]
INVALID_HOSTS += [[], [("host", "localhost"), ("host", "evil.example")], [("host", "localhost")] * 2]
FOREIGN = [(METHODS, headers, 400, "invalid_host") for headers in INVALID_HOSTS]
FOREIGN += [(METHODS, [HERE, ("origin", origin)], 403, "foreign_origin") for origin in FOREIGN_ORIGINS]
FOREIGN += [(METHODS, TWO_ORIGINS, 403, "foreign_origin")]
for site in ("cross-site", "same-site", "strange"):
    for method, mode in FETCHES:
        fetch = [HERE, ("sec-fetch-site", site), ("sec-fetch-mode", mode)]
        FOREIGN.append(((method,), fetch if mode else fetch[:2], 403, "foreign_origin"))


@pytest.mark.parametrize(("methods", "headers", "status", "code"), FOREIGN, ids=str)
def test_what_comes_from_other_sites_or_names_is_refused(methods, headers, status, code):
    guard, inside = guarded()
    for method in methods:
        reply = request(guard, method, "/v1/completions", headers=headers)
        assert reply.status == status and reply.json()["error"]["code"] == code and inside.reached == []


LOOPBACK_HOSTS = ("127.0.0.1", "127.0.0.1:7860", "LOCALHOST:7860", "LocalHost", "localhost:7860", "[::1]:7860", "[::1]")
OWN_PAGES = (
    "http://127.0.0.1:7860",
    "http://localhost:7860",
    "http://[::1]:7860",
    "http://localhost",
    "https://localhost:8443",
)
LET_IN = [{"host": host} for host in LOOPBACK_HOSTS]
LET_IN += [{"host": origin.partition("://")[2], "origin": origin} for origin in OWN_PAGES]
LET_IN += [
    {"host": "localhost:80", "origin": "http://localhost"},
    {"host": "localhost:443", "origin": "https://localhost"},
]
LET_IN += [{"host": "LOCALHOST:7860", "origin": "http://localhost:7860"}]
LET_IN += [{"sec-fetch-site": site} for site in ("same-origin", "none")]


@pytest.mark.parametrize("headers", LET_IN, ids=str)
def test_names_and_pages_of_this_machine_are_let_in(headers):
    guard, _ = guarded()
    for method in METHODS:
        assert request(guard, method, "/gradio_api/queue/join", headers=headers).status == 200


def test_a_link_from_elsewhere_may_be_followed():
    guard, _ = guarded()
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert request(guard, headers=link).status == request(guard, "HEAD", headers=link).status == 200


FOREIGN_NAMES = "evil.example 192.168.1.5.evil.example 10.1 1.2.3 [::g] [1.2.3.4.5]"
ADDRESSES = "192.168.1.5:7860 [fe80::1]:7860 10.0.0.1 localhost"


@pytest.mark.parametrize(
    ("bound", "own", "foreign"),
    [
        (("192.168.1.5", ["Chat.Home"]), "192.168.1.5:7860 chat.home localhost", "192.168.1.6 home x.chat.home"),
        (("0.0.0.0",), ADDRESSES, FOREIGN_NAMES),
        (("::",), ADDRESSES, FOREIGN_NAMES),
    ],
    ids=str,
)
def test_the_address_of_the_server_is_a_name_too_and_with_all_addresses_every_address(bound, own, foreign):
    guard, _ = guarded(Hosts(*bound))
    found = {name: request(guard, headers={"host": name}).status for name in f"{own} {foreign}".split()}
    assert found == dict.fromkeys(own.split(), 200) | dict.fromkeys(foreign.split(), 400)


def test_loopback_addresses_are_known():
    assert all(Hosts(own).loopback for own in ("127.0.0.1", "localhost", "::1", "127.0.0.9"))
    others = ("0.0.0.0", "::", "192.168.1.5", "my.machine", "localhost.evil.example")
    assert not any(Hosts(other).loopback for other in others)


def websocket(guard, path="/", **headers):
    return sent(guard, scope_of("GET", path, headers, kind="websocket"), {"type": "websocket.connect"})


FOREIGN_SOCKETS = [("/", "host", "evil.example"), ("/", "origin", "null"), ("/", "origin", "http://evil.example")]
FOREIGN_SOCKETS += [("/", "sec-fetch-site", "cross-site"), ("/x", "accept", "*/*")]


@pytest.mark.parametrize(("path", "header", "value"), FOREIGN_SOCKETS)
def test_websockets_of_other_sites_are_closed_before_they_open(path, header, value):
    guard, inside = guarded()
    assert websocket(guard, path, **{header: value}) == [{"type": "websocket.close", "code": 1008}]
    assert inside.websockets == 0


def test_a_websocket_needs_the_session_where_there_is_a_key():
    guard, inside = guarded(key=KEY)
    assert websocket(guard)[0]["type"] == "websocket.close" and inside.websockets == 0
    websocket(guard, cookie=f"neox_lite_session={guard.keys.new_session()}")
    assert inside.websockets == 1


# Headers of answers ---------------------------------------------------------------------------------------------------


def test_answers_carry_security_headers_and_open_nothing_to_other_sites():
    guard, _ = guarded()
    expected = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "same-origin"}
    for reply in (request(guard), request(guard, path="/nothing"), request(guard, headers=EVIL)):
        policy = reply.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "default-src 'self'" in policy
        assert expected.items() <= reply.headers.items()
        assert not any(name.lower().startswith("access-control") for name in reply.headers)


# Paths ----------------------------------------------------------------------------------------------------------------

NEEDED = (
    *("/", "/config", "/theme.css", "/static/img/logo.svg", "/assets/index-1.js", "/favicon.ico"),
    *("/gradio_api/info", "/gradio_api/heartbeat/abc1", "/gradio_api/queue/join", "/gradio_api/queue/data"),
    *("/v1/models", "/v1/x/y", "/health", "/metrics"),
)
REFUSED = (
    *("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/file/x", "/upload"),
    *("/proxy=http://evil.example", "/gradio_api/proxy=http://evil.example", "/gradio_api/upload"),
    *("/gradio_api/upload_progress", "//file=/etc/passwd", "/gradio_api//file=/etc/passwd", "/custom_component/x"),
    *("/gradio_api/../file=/etc/passwd", "/gradio_api/stream/x", "/gradio_api/component_server", "/monitoring"),
    *(
        "/gradio_api/run/predict",
        "/gradio_api/api/x",
        "/gradio_api/call/x",
        "/gradio_api/runs",
        "/gradio_api/vibe-edit",
    ),
    *("/gradio_api/dev/reload", "/gradio_api/deep_link", "/gradio_api/process_recording", "/gradio_api/mcp/sse"),
    *("/docs", "/openapi.json", "/gradio_api/openapi.json", "/logout", "/token", "/user", "/FILE=/etc/passwd"),
    *("/\nfile=x", "/v1\n", "/static\n/x", "/gradio_api/queue/join\n"),
    *("/config/../file=x", "/gradio_api/heartbeat/x/../../file=y"),
)


@pytest.mark.parametrize("path", NEEDED)
def test_the_page_and_the_api_are_served(path):
    guard, _ = guarded()
    assert request(guard, path=path).status == 200


@pytest.mark.parametrize("path", REFUSED)
def test_files_uploads_and_all_else_of_gradio_do_not_exist(path):
    guard, inside = guarded()
    for method in ("GET", "POST", "HEAD"):
        assert request(guard, method, path).status == 404
    assert inside.reached == []


def test_without_a_page_there_is_the_api_alone():
    guard, _ = guarded(page=False)
    assert request(guard, path="/").status == request(guard, path="/config").status == 404
    assert request(guard, path="/v1/models").status == 200


# The key --------------------------------------------------------------------------------------------------------------


def bearer(key):
    return {"authorization": f"Bearer {key}"}


CLOSED = [path for path in (*NEEDED, *REFUSED, "/login/", "//login", "/health/") if path != "/health"]


@pytest.mark.parametrize("path", CLOSED)
def test_without_the_key_every_route_is_denied(path):
    guard, inside = guarded(key=KEY)
    for method in ("GET", "OPTIONS") if path == "/logout" else ("GET", "POST", "OPTIONS"):
        reply = request(guard, method, path)
        assert reply.status == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert inside.reached == []
    assert request(guard, path="/health").status == 200 and inside.reached == ["/health"]


WRONG_KEYS = ("Bearer wrong", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}")
MADE_UP = ("", "x", KEY, "../..", "é".encode().decode("latin-1"))


DENIED = [("authorization", value) for value in (*WRONG_KEYS, f"Bearer {KEY.upper()}")]
DENIED += [("cookie", f"neox_lite_session={token}") for token in MADE_UP]


@pytest.mark.parametrize(("header", "value"), DENIED)
def test_a_wrong_key_and_a_made_up_session_are_denied(header, value):
    guard, inside = guarded(key=KEY)
    assert request(guard, path="/v1/models", headers={header: value}).status == 401 and inside.reached == []


def test_the_key_opens_everything_there_is():
    guard, _ = guarded(key=KEY)
    assert request(guard, path="/v1/models", headers=bearer(KEY)).status == 200
    assert request(guard, path="/v1/models", headers={"authorization": f"bearer {KEY} "}).status == 200
    assert request(guard, path="/gradio_api/file=/etc/passwd", headers=bearer(KEY)).status == 404


def test_the_key_does_not_help_a_foreign_site_and_a_foreign_page_cannot_log_a_browser_in():
    guard, inside = guarded(key=KEY)
    for foreign, status in (({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), (EVIL, 400)):
        assert request(guard, "POST", "/v1/completions", headers=bearer(KEY) | foreign).status == status
        assert login(guard, KEY, headers=foreign).status == status
    assert inside.reached == []


def login(guard, key, **options):
    return request(guard, "POST", "/login", body=f"key={key}".encode(), **options)


def test_a_browser_is_led_to_the_login_and_gets_a_session():
    guard, inside = guarded(key=KEY)
    reply = request(guard, headers={"accept": "text/html,*/*"})
    assert reply.status == 303 and reply.headers["location"] == "/login"
    page = request(guard, path="/login")
    assert page.status == 200 and b'name="key"' in page.body and inside.reached == []
    reply = login(guard, KEY)
    cookie = reply.headers["set-cookie"]
    assert reply.status == 303 and reply.headers["location"] == "/"
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; ")) and KEY not in cookie
    session = {"cookie": f"theme=dark; {cookie.partition(';')[0]}"}
    assert request(guard, headers=session).status == 200
    assert request(guard, "POST", "/logout", headers=session).status == 303
    assert request(guard, headers=session).status == 401


def test_a_wrong_login_says_so_and_sets_no_cookie():
    guard, _ = guarded(key=KEY)
    for key in ("wrong", "", "%00", "é", "a" * 5000):
        reply = login(guard, key)
        assert reply.status == 401 and "set-cookie" not in reply.headers and b"not the key" in reply.body
    assert request(guard, "PUT", "/login").status == 405


def test_sessions_end_and_their_number_is_bounded():
    clock = Clock()
    keys = Keys(KEY, clock)
    first = keys.new_session()
    tokens = [keys.new_session() for _ in range(MAX_SESSIONS)]
    assert not keys.know_session(first) and keys.know_session(tokens[0]) and len(set(tokens)) == MAX_SESSIONS
    clock.now += SESSION_S + 1
    assert not keys.know_session(tokens[-1])


@pytest.mark.parametrize("how", ["login", "bearer"])
def test_guessing_is_slowed_down(how):
    clock = Clock()
    guard, _ = guarded(key=KEY, clock=clock)

    def guess(key, client="10.0.0.7"):
        if how == "login":
            return login(guard, key, client=client)
        return request(guard, path="/v1/models", headers=bearer(key), client=client)

    assert [guess(f"guess{i}").status for i in range(GUESSES)] == [401] * GUESSES
    late = guess("another")
    assert late.status == 429 and 0 < int(late.headers["retry-after"]) <= WINDOW_S
    assert guess(KEY).status == 429  # or the right one would tell itself from the wrong ones
    assert guess(KEY, "10.0.0.8").status in (200, 303)
    clock.now += WINDOW_S + 1
    assert guess(KEY).status in (200, 303)


def test_one_program_with_an_old_key_does_not_lock_others_out():
    guard, _ = guarded(key=KEY)
    found = [request(guard, path="/v1/models", headers=bearer("old-key")).status for _ in range(5 * GUESSES)]
    assert set(found) == {401} and request(guard, path="/v1/models", headers=bearer(KEY)).status == 200


def test_the_page_stays_open_while_guesses_are_refused():
    guard, _ = guarded(key=KEY)
    cookie = {"cookie": f"neox_lite_session={guard.keys.new_session()}"}
    for i in range(GUESSES + 1):
        login(guard, f"guess{i}")
    assert login(guard, KEY).status == 429 and request(guard, headers=cookie).status == 200


def test_a_guesser_with_a_whole_ipv6_network_is_one():
    keys = Keys(KEY, Clock())
    for i in range(GUESSES):
        keys.check(f"guess{i}", f"2001:db8::{i:x}")
    assert keys.blocked_s("2001:db8::ffff") and not keys.blocked_s("2001:db8:0:1::1")


def test_memory_of_guesses_is_bounded():
    keys = Keys(KEY, Clock())
    for i in range(MAX_ADDRESSES + 50):
        keys.check("x", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}")
    assert len(keys._wrong) <= MAX_ADDRESSES


def test_keys_are_compared_in_constant_time(monkeypatch):
    calls = []
    real = secrets.compare_digest
    monkeypatch.setattr(secrets, "compare_digest", lambda a, b: calls.append((len(a), len(b))) or real(a, b))
    assert not Keys(KEY).check("x", "::1") and Keys(KEY).check(KEY, "::1")
    assert calls == [(32, 32)] * 2  # digests, so that not even the length is told


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_a_body_comes_through_in_one_piece():
    guard, inside = guarded()
    assert request(guard, "POST", "/v1/completions", parts=[b"ab", b"", b"cd"]).status == 200
    assert inside.bodies == [b"abcd"]


@pytest.mark.parametrize("length", ["1048577", "99999999999999999999", "-1", "abc", "1e3", ""])
def test_a_body_that_is_announced_too_large_is_not_read(length):
    guard, inside = guarded()
    reply = request(guard, "POST", "/v1/completions", headers={"content-length": length or "x"})
    assert reply.status == 413 and inside.reached == [] and reply.headers["connection"] == "close"


def test_a_body_in_pieces_ends_at_the_limit_and_a_login_too():
    guard, inside = guarded(max_body=1000)
    for parts, status in (([b"x" * 100] * 1000, 413), ([b"x" * 100] * 10 + [b"x"], 413), ([b"x" * 100] * 10, 200)):
        assert inside.reached == [] and request(guard, "POST", "/v1/completions", parts=parts).status == status
    assert login(guarded(key=KEY, max_body=1000)[0], "x" * 2000).status == 413


def test_a_body_that_does_not_come_is_given_up():
    guard, inside = guarded(body_timeout_s=0.05)
    waiting = asyncio.wait_for(ask(guard, "POST", "/v1/completions", parts=[]), 20)
    assert asyncio.run(waiting).status == 408 and inside.reached == []


def test_who_leaves_in_the_middle_of_a_body_is_forgotten():
    guard, inside = guarded()
    messages = {"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}
    assert sent(guard, scope_of("POST", "/v1/x"), *messages) == [] and inside.reached == []


def test_a_server_that_is_closing_takes_nothing_new():
    guard, inside = guarded()
    guard.closing = True
    reply = request(guard, path="/v1/models")
    assert reply.status == 503 and reply.headers["connection"] == "close" and inside.reached == []


def test_every_refusal_is_in_openais_form():
    guard, _ = guarded(key=KEY)
    for headers in (EVIL, {"origin": "null"}, {}):
        error = request(guard, path="/v1/models", headers=headers).json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
