"""The page in a real browser over the demo model: what people do there, by mouse, by keyboard and on a phone.

NEOX_LITE_SCREENSHOTS=1 writes pictures to docs/images.
"""

import asyncio
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="needs pip install '.[page]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install '.[test]'")
expect = playwright.expect
expect.set_options(timeout=30_000)  # nothing here takes so long, unless it hangs

from support.machine import known_machine
from support.serving import serving

from neox_lite import GPTNeoXForCausalLM
from neox_lite.generation.sampling import TokenLogprob
from neox_lite_app.cli import build_parser
from neox_lite_app.conversations.conversation import Conversation, ConversationError, Store
from neox_lite_app.page import badges, chat, chat_tab, notebook
from neox_lite_app.page.settings import FIELDS, PRESETS
from neox_lite_app.paths import DEMO
from neox_lite_app.server import build
from neox_lite_app.serving.engine import Engine
from neox_lite_app.serving.jobs import Update
from neox_lite_app.serving.keys import Keys
from neox_lite_app.serving.security import Hosts

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PICTURES = Path(__file__).parents[1] / "docs" / "images" if os.environ.get("NEOX_LITE_SCREENSHOTS") else None
WIDE, PHONE = {"width": 1360, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium in PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The user's own folder, for all tests of this file."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEOX_LITE_DATA", str(folder))
        known_machine(patch)
        yield folder


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def opening():
    """What the server waits for before it opens a conversation; set, but in tests that clear it."""
    event, opened = threading.Event(), chat_tab.Tab.open
    event.set()

    async def open(tab, said):
        await asyncio.to_thread(event.wait)
        async for update in opened(tab, said):
            yield update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_tab.Tab, "open", open)
        yield event


@pytest.fixture(scope="module")
def streamed():
    """Sizes of all parts of streams that the server sent."""
    return []


@pytest.fixture(scope="module")
def site(data, engine, opening, streamed):
    app = build(engine, Hosts(), page=build_parser().parse_args(["serve", "--device", "cpu"]))

    async def metered(scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.body" and scope["path"].endswith("/queue/data"):
                streamed.append(len(message["body"]))
            await send(message)

        await app(scope, receive, sending)

    with serving(metered, lifespan="on") as address:
        yield address


@pytest.fixture
def demo(engine):
    """The demo is loaded, and nothing runs."""
    if engine.name != str(DEMO):
        engine.load(str(DEMO), lambda: GPTNeoXForCausalLM.from_pretrained(DEMO, device_map="cpu"))
    return engine


@pytest.fixture
def held(engine, monkeypatch):
    """Answers wait once they have begun, until this is set, or until one of them is cancelled."""
    more, take_jobs = threading.Event(), Engine._take_jobs

    def waiting(engine, scheduler):
        while not (more.is_set() or engine._cancelled or engine._halted or len(engine._queue)):
            if not engine._running or any(ticket.clock.tokens < 8 for ticket in engine._running.values()):
                break
            more.wait(0.01)
        return take_jobs(engine, scheduler)

    monkeypatch.setattr(Engine, "_take_jobs", waiting)
    yield more
    more.set()


@pytest.fixture
def open_page(browser, site):
    """Opens the page in a browser that remembers nothing; at the end nothing may have failed or gone elsewhere."""
    contexts, wrong = [], []

    def open(size=WIDE, view=None, context=None, before=None, **options):
        if context is None:
            context = browser.new_context(viewport=size, **options)
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda m: m.type == "error" and not is_left(m.text) and wrong.append(f"console: {m.text}"))
        page.on("request", lambda r: is_foreign(r.url, site) and wrong.append(f"request: {r.url}"))
        if before is not None:
            before(page)
        page.goto(site)
        expect(page.locator(".strip .model")).not_to_be_empty()
        if view is not None:
            page.get_by_role("tab", name=view).click()
        return page

    yield open
    for context in contexts:
        for page in context.pages:
            wrong.extend(f"toast: {text}" for text in page.locator(".toast-body").all_inner_texts())
        context.close()
    assert not wrong


def own_address():
    """This machine's address as others see it, or else one of its loopback ones."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def is_left(text):
    """What Gradio says of a stream whose page is reloaded or closed."""
    aborted = "BodyStreamBuffer was aborted" in text or "signal is aborted without reason" in text
    return aborted or text == "Unexpected error Connection errored out. "


def is_foreign(url, site):
    return urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != urlsplit(site).netloc


def shoot(page, name):
    if PICTURES is not None:
        PICTURES.mkdir(exist_ok=True)
        page.mouse.move(0, 0)
        page.screenshot(path=PICTURES / f"{name}.png", animations="disabled")


# What people do in it ----------------------------------------------------------------------------------------------------


def field(page, label):
    return page.locator("#nx-settings").get_by_label(label, exact=True)


def at_most(page, tokens, preset="Greedy"):
    """Answers of a few tokens."""
    page.get_by_role("button", name=preset, exact=True).click()
    field(page, "Max new tokens").fill(str(tokens))


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def turns(page, role=None):
    return page.locator(f".turn.{role}" if role else ".turn")


def answered(page, count):
    """`count` answers are there and the last is complete."""
    expect(turns(page, "assistant")).to_have_count(count)
    expect(page.locator(".turn.live")).to_have_count(0)
    expect(turns(page, "assistant").last.locator(".turn-tools")).to_be_visible()


def ask(page, text, count):
    say(page, text)
    answered(page, count)


def begin(page, text):
    """Have an answer that has begun, and stays so where answers are held."""
    say(page, text)
    expect(page.locator(".turn.live .body p").first).not_to_be_empty()


def until(condition):
    """Wait for what no page shows."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


def saved(title):
    """The one saved conversation of that title."""
    (entry,) = [entry for entry in Store().list() if entry.title == title]
    return Store().load(entry.id)


def titles():
    return [entry.title for entry in Store().list()]


def show(page, title):
    page.locator(".conversations .title", has_text=title).click()


def rename(page, title):
    """Rename the conversation that is shown."""
    here = page.locator(".conversations .here")
    here.get_by_role("button", name="Rename").click()
    page.get_by_role("dialog").get_by_role("textbox").fill(title)
    page.keyboard.press("Enter")
    expect(here.locator(".title span")).to_have_text(title)


def count_updates(page, kind):
    """Count what the server sends of a kind from now on, in window.updates."""
    page.evaluate("kind => { window.updates = 0; neox.onUpdate(kind, () => window.updates++); }", kind)


def text_of(page, role, which=-1):
    return turns(page, role).nth(which).locator(".body").inner_text()


def tool(page, name, turn=None):
    return (turn or turns(page, "assistant").last).get_by_role("button", name=name, exact=True)


def notice(page):
    return page.get_by_role("alert").locator("p")


def chat_page(open_page, tokens=12, **options):
    page = open_page(view="Chat", **options)
    at_most(page, tokens)
    return page


# First run, models ----------------------------------------------------------------------------------------------------


def test_from_nothing_to_an_answer_in_three_clicks_also_where_they_are_double(open_page, engine):
    engine.unload()
    page = open_page()
    expect(page.get_by_role("heading", name="Choose a model")).to_be_visible()
    expect(page.locator(".card.demo .badge")).to_contain_text("fits")  # the plan has been made
    shoot(page, "first-run")
    page.get_by_role("button", name="Start the demo").dblclick()
    expect(page.get_by_role("tab", name="Notebook")).to_have_attribute("aria-selected", "true")  # a base model
    expect(notice(page)).to_have_count(0)
    page.get_by_role("textbox", name="Text").fill("KING RICHARD III:\n")
    page.get_by_role("button", name="Complete").click()
    expect(page.get_by_role("button", name="Undo")).to_be_enabled()
    assert len(page.get_by_role("textbox", name="Text").input_value()) > 100


def test_the_model_tab_tells_what_fits_and_unloads_and_then_nothing_is_sent(open_page, demo):
    page = open_page()
    rows = page.locator(".family .row")
    expect(rows).to_have_count(23)
    expect(rows.first.locator(".badge").first).to_contain_text("fits")
    expect(rows.filter(has_text="gpt-neox-20b").locator(".badge").first).to_contain_text("GiB")
    card = page.locator(".card.demo")
    expect(card.get_by_role("button", name="Quantize")).to_have_text(badges.offered())
    expect(rows.first.locator(".offer")).to_have_count(len(badges.offered()))
    expect(page.locator(".loaded")).to_contain_text("Shakespeare demo")
    page.get_by_role("button", name="Unload").click()
    expect(page.get_by_role("heading", name="Choose a model")).to_be_visible()
    assert demo.status().state == "empty"
    page.get_by_role("tab", name="Chat").click()
    say(page, "Is anybody there?")
    expect(notice(page)).to_contain_text("No model is loaded")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Is anybody there?")
    expect(turns(page)).to_have_count(0)


def test_a_model_is_quantized_with_progress_and_loaded(open_page, data):
    page = open_page()
    page.get_by_role("button", name="Quantize Shakespeare demo to int4").click()
    page.get_by_role("button", name="Load it").click()
    expect(page.locator(".strip .model")).to_contain_text("demo_model-int4")
    expect(page.get_by_role("tab", name="Notebook")).to_have_attribute("aria-selected", "true")
    assert (data / "models" / "demo_model-int4" / "config.json").is_file()
    page.get_by_role("tab", name="Model").click()
    expect(page.locator(".card").filter(has_text="demo_model-int4")).to_be_visible()


def test_loading_can_be_called_off(open_page, engine, monkeypatch):
    engine.unload()
    gate = threading.Event()

    def wait(model, progress):
        while not gate.wait(0.01):
            progress(1, 4)

    monkeypatch.setattr(GPTNeoXForCausalLM, "warm", wait)
    page = open_page()
    page.get_by_role("button", name="Start the demo").click()
    expect(page.locator(".work progress")).to_have_attribute("value", "0.25")
    cancel = page.get_by_role("button", name="Cancel")
    cancel.hover()
    page.mouse.down()
    count_updates(page, "status")
    page.wait_for_function("window.updates > 1")
    page.mouse.up()
    expect(page.locator(".work")).to_contain_text("Called off")
    expect(page.get_by_role("button", name="Dismiss")).to_be_focused()
    assert engine.status().state == "empty"


def test_what_cannot_be_loaded_is_said_in_a_sentence(open_page, tmp_path):
    page = open_page()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    page.get_by_label("Folder or hub id").fill(str(tmp_path))
    page.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator(".work.failed .problem")).to_contain_text("llama")
    assert "Traceback" not in page.locator("body").inner_text()
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator(".work.failed")).to_have_count(0)


# A key ----------------------------------------------------------------------------------------------------------------


def test_a_phone_of_the_home_network_gets_in_with_the_key(browser, demo, data):
    address = own_address()
    args = build_parser().parse_args(["serve", "--device", "cpu", "--host", address])
    app = build(demo, Hosts(address), Keys("open-sesame-and-more"), page=args)
    with serving(app, address, lifespan="on") as site:
        page = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True).new_page()
        page.goto(site)
        expect(page).to_have_url(f"{site}/login")
        page.get_by_label("API key of this server").fill("open-sesame")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.get_by_label("API key of this server").fill("open-sesame-and-more")
        shoot(page, "phone-key")
        page.keyboard.press("Enter")
        page.get_by_role("tab", name="Chat").click()
        ask(page, "Is it safe here?", 1)
        page.reload()
        expect(page.get_by_role("tab", name="Chat")).to_be_visible()  # the browser stays in
        page.context.close()


# Chat ----------------------------------------------------------------------------------------------------


def test_an_answer_streams_in_is_kept_and_is_there_after_a_reload(open_page, demo, data):
    page = chat_page(open_page)
    expect(page.locator(".welcome")).to_contain_text("base model")
    ask(page, "Who are you?", 1)
    answer = text_of(page, "assistant")
    assert text_of(page, "user") == "Who are you?" and answer
    kept = saved("Who are you?")
    assert [m.role for m in kept.path()] == ["user", "assistant"] and kept.last.text.split() == answer.split()
    assert kept == Store(data / "conversations").load(kept.id)
    page.reload()
    expect(turns(page)).to_have_count(2)
    page.get_by_role("tab", name="Chat").click()
    assert text_of(page, "assistant") == answer
    expect(field(page, "Max new tokens")).to_have_value("12")  # and the settings


def test_an_answer_outlives_a_redrawn_conversation_and_stop_keeps_what_there_is(open_page, demo, held):
    page = chat_page(open_page, 400)
    begin(page, "Tell me a long story")
    rename(page, "A long tale")
    begun = page.locator(".turn.live .body").inner_text()
    assert begun
    page.get_by_role("button", name="Stop", exact=True).click()
    answered(page, 1)
    expect(turns(page, "assistant").last).to_contain_text("stopped")
    assert demo.status().active == 0 and text_of(page, "assistant").startswith(begun)
    assert saved("A long tale").last.text.split() == text_of(page, "assistant").split()


def test_an_answer_is_made_anew_goes_on_and_is_rewritten(open_page, demo):
    page = chat_page(open_page)
    at_most(page, 12, "Creative")
    ask(page, "Speak", 1)
    first = text_of(page, "assistant")
    tool(page, "Regenerate").click()
    expect(page.locator(".siblings")).to_contain_text("2/2")
    answered(page, 1)
    second = text_of(page, "assistant")
    tool(page, "Previous version").click()
    expect(page.locator(".siblings")).to_contain_text("1/2")
    assert text_of(page, "assistant") == first != second
    expect(tool(page, "Previous version")).to_be_disabled()
    tool(page, "Continue").click()
    expect(turns(page, "assistant").last).to_contain_text("24 tokens")
    assert text_of(page, "assistant").startswith(first) and len(text_of(page, "assistant")) > len(first)
    tool(page, "Edit").click()
    page.get_by_label("Edit the message").fill("My own words")
    page.get_by_role("button", name="Save").click()
    expect(turns(page, "assistant").last.locator(".body")).to_have_text("My own words")
    expect(page.locator(".siblings")).to_contain_text("3/3")


def test_a_branch_is_one_conversation_of_its_own_even_by_a_double_click(open_page, demo):
    page = chat_page(open_page, 4)
    ask(page, "First", 1)
    ask(page, "Second", 2)
    tool(page, "Branch into a new conversation", turns(page, "assistant").first).dblclick()
    expect(turns(page)).to_have_count(2)
    expect(page.locator(".conversation-title")).to_have_text("First (branch)")
    ask(page, "Here", 2)
    assert titles().count("First (branch)") == 1
    show(page, re.compile("^First(?! \\(branch)"))
    expect(turns(page)).to_have_count(4)
    assert text_of(page, "user") == "Second"


def import_file(page, name, content):
    with page.expect_file_chooser() as choosing:
        page.get_by_role("button", name="Import a conversation").click()
    choosing.value.set_files({"name": name, "mimeType": "text/plain", "buffer": content})


def test_what_is_exported_can_be_imported_and_other_files_are_refused_in_a_sentence(open_page, demo):
    page = chat_page(open_page, 4)
    ask(page, "Keep this", 1)
    for kind, ending in (("JSON", ".json"), ("Markdown", ".md")):
        page.get_by_label("Export", exact=True).click()
        with page.expect_download() as saving:
            page.get_by_role("button", name=f"Export as {kind}").click()
        assert saving.value.suggested_filename.endswith(ending)
        page.get_by_role("button", name="New conversation", exact=True).click()
        expect(turns(page)).to_have_count(0)
        import_file(page, f"kept{ending}", saving.value.path().read_bytes())
        expect(turns(page)).to_have_count(2)
        assert text_of(page, "user") == "Keep this"
    import_file(page, "list.md", b"eggs, flour")
    expect(notice(page)).to_contain_text("list.md: not a conversation")


RUBBISH = """
for (const [key, value] of Object.entries({ settings: '{"toString": 1}', conversation: "rubbish", theme: "?", view: "x" }))
localStorage["neox-lite." + key] = sessionStorage["neox-lite." + key] = value;"""
NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"])
Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });"""


@pytest.mark.parametrize("storage", [RUBBISH, NO_STORAGE], ids=["rubbish", "none"])
def test_a_browser_that_remembers_rubbish_or_nothing_can_talk(open_page, demo, storage):
    page = chat_page(open_page, 4, before=lambda page: page.add_init_script(storage))
    ask(page, "Is this kept?", 1)
    expect(page.locator(".conversations .here")).to_contain_text("Is this kept?")


def test_a_conversation_that_cannot_be_read_is_said_and_the_others_are_there(open_page, demo, data):
    page = chat_page(open_page, 4)
    for text in ("The one that is well", "The one that breaks"):
        page.get_by_role("button", name="New conversation", exact=True).click()
        ask(page, text, 1)
    broken = data / "conversations" / f"{saved('The one that breaks').id}.json"
    broken.write_bytes(broken.read_bytes()[:40])
    page.reload()
    expect(notice(page)).to_contain_text(broken.name)
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator(".conversations .here")).to_contain_text("cannot be read")
    show(page, "The one that is well")
    ask(page, "Still well", 2)
    broken.unlink()


def test_a_reload_keeps_what_is_being_written_and_escape_ends_a_completion(open_page, demo, held):
    page = chat_page(open_page, 400)
    page.get_by_label("Message", exact=True).fill("Half a mess")
    page.reload()
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Half a mess")
    page.get_by_role("tab", name="Notebook").click()
    text = page.get_by_role("textbox", name="Text")
    text.fill("KING:\n")
    text.press("Control+Enter")
    expect(text).not_to_have_value("KING:\n")
    page.reload()
    expect(text).to_have_value(re.compile("KING:\n.+"))
    expect(text).to_be_editable()
    until(lambda: not demo.status().active)
    text.press("Control+Enter")
    until(lambda: demo.status().active)
    page.keyboard.press("Escape")
    assert len(completed(page)) < 1000
    assert demo.status().active == 0


def test_a_server_that_is_gone_leaves_the_text_to_its_writer(open_page, demo, monkeypatch):
    """Its polls are not answered; a page whose connection breaks is reloaded by Gradio as soon as there is one again."""
    gate = asyncio.Event()

    async def silent(*given):
        await gate.wait()
        yield {}

    page = chat_page(open_page, 4)
    ask(page, "Hello", 1)
    with monkeypatch.context() as patch:
        patch.setattr(chat.Chat, "answer", silent)
        say(page, "Into the void")
        expect(turns(page, "user")).to_have_count(2)
        page.evaluate("document.dispatchEvent(new CustomEvent('neox:lost'))")
        expect(turns(page, "user")).to_have_count(1)
        expect(page.get_by_label("Message", exact=True)).to_have_value("Into the void")
    page.get_by_role("tab", name="Notebook").click()
    with monkeypatch.context() as patch:
        patch.setattr(notebook, "_complete", silent)
        page.get_by_role("textbox", name="Text").fill("KING:\n")
        page.get_by_role("button", name="Complete").click()
        expect(page.get_by_role("textbox", name="Text")).not_to_be_editable()
        page.evaluate("document.dispatchEvent(new CustomEvent('neox:lost'))")
        expect(page.get_by_role("textbox", name="Text")).to_be_editable()
        expect(page.get_by_role("button", name="Complete")).to_be_visible()


def test_two_tabs_talk_at_once_and_never_mix(open_page, demo, held):
    one, two = chat_page(open_page, 40), chat_page(open_page, 40)
    begin(one, "I am one")
    begin(two, "I am two")
    held.set()
    answered(one, 1)
    answered(two, 1)
    assert (text_of(one, "user"), text_of(two, "user")) == ("I am one", "I am two")
    assert turns(one).count() == turns(two).count() == 2


def test_a_closed_tab_ends_its_answer_and_keeps_what_there_is(open_page, demo, held):
    page = chat_page(open_page, 450)
    begin(page, "I shall leave in the middle")
    page.close()
    until(lambda: not demo.status().active)
    until(lambda: saved("I shall leave in the middle").last.text)
    assert saved("I shall leave in the middle").last.details["tokens"] < 450


def test_the_oldest_turns_are_dropped_and_marked(open_page, demo, data):
    shutil.rmtree(data / "conversations", ignore_errors=True)
    conversation = Conversation(title="Forty turns")
    for number in range(40):
        conversation.append("user", f"What is the number {number} that I think of just now?")
        conversation.append("assistant", "I cannot know that, my good lord.")
    Store().save(conversation)
    page = chat_page(open_page)
    show(page, "Forty turns")
    expect(turns(page)).to_have_count(80)
    ask(page, "And now?", 41)
    marker = page.locator(".dropped")
    expect(marker).to_have_text(re.compile(r"context full: the oldest \d+ messages are no longer sent"))
    assert marker.evaluate("node => node.previousElementSibling.classList.contains('old')")
    assert not marker.evaluate("node => node.nextElementSibling.classList.contains('old')")
    marker.scroll_into_view_if_needed()
    shoot(page, "context-full")


def test_an_edit_outlives_an_answer_and_a_refusal(open_page, demo):
    page = chat_page(open_page, 8)
    ask(page, "One", 1)
    mine = turns(page, "user").last
    mine.hover()
    tool(page, "Edit", mine).click()
    edit = page.get_by_label("Edit the message")
    edit.fill("all the world is a stage " * 200)
    tool(page, "Regenerate").click()
    expect(turns(page, "assistant").locator(".siblings")).to_contain_text("2/2")
    answered(page, 1)
    expect(edit).to_have_value(re.compile("all the world"))
    edit.press("Enter")
    expect(notice(page)).to_contain_text(re.compile(r"last message takes \d+ tokens"))
    expect(edit).to_have_value(re.compile("all the world"))
    edit.fill("Two")
    edit.press("Enter")
    expect(mine.locator(".siblings")).to_contain_text("2/2")
    answered(page, 1)
    expect(edit).to_have_count(0)
    assert text_of(page, "user") == "Two"


def test_an_answer_that_cannot_be_kept_is_shown_and_ends(open_page, demo, held, monkeypatch):
    def full(store, conversation):
        raise ConversationError("the disk is full; free some space")

    page = chat_page(open_page, 30)
    begin(page, "Write on a full disk")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", full)
        held.set()
        expect(notice(page)).to_contain_text("The disk is full")
        answered(page, 1)
        assert text_of(page, "assistant")
    ask(page, "There is room again", 2)


def test_more_than_can_be_sent_is_said_and_nothing_waits_for_it(open_page, demo):
    page = chat_page(open_page, 4)
    message, text = page.get_by_label("Message", exact=True), page.get_by_role("textbox", name="Text")
    huge = "a b " * 300_000
    for tab, box, button in (("Chat", message, "Send"), ("Notebook", text, "Complete")):
        page.get_by_role("tab", name=tab).click()
        box.evaluate("(box, text) => { box.value = text; }", huge)
        page.get_by_role("button", name=button, exact=True).click()
        expect(notice(page)).to_contain_text("more than the 1 MB")
        page.get_by_role("button", name="Dismiss").click()
        expect(page.get_by_role("button", name=button, exact=True)).to_be_visible()
        assert box.input_value() == huge and box.is_editable()
    page.get_by_role("tab", name="Chat").click()
    ask(page, "Shorter", 1)


@pytest.fixture
def late(opening, monkeypatch):
    """What the server waits for before it opens a conversation, and before it begins an answer; both are set at first."""
    beginning, prompted = threading.Event(), chat.Chat.turn
    beginning.set()
    monkeypatch.setattr(chat.Chat, "turn", lambda *given: (beginning.wait(), prompted(*given))[1])
    yield opening, beginning
    opening.set()
    beginning.set()


def test_a_message_goes_into_the_conversation_on_the_screen(open_page, demo, late):
    opening, beginning = late
    page = chat_page(open_page, 4)
    ask(page, "Into the first", 1)
    opening.clear()
    beginning.clear()
    page.get_by_role("button", name="New conversation", exact=True).click()
    say(page, "Into the second")
    expect(turns(page, "user")).to_have_text("Into the second")  # before the server has heard of it
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    count_updates(page, "transcript")
    opening.set()
    page.wait_for_function("window.updates > 0")  # the opened conversation is here
    expect(turns(page, "user")).to_have_text("Into the second")
    beginning.set()
    answered(page, 1)
    opening.clear()
    show(page, "Into the first")
    say(page, "Into the first again")
    opening.set()
    answered(page, 2)
    assert [text_of(page, "user", which) for which in (0, 1)] == ["Into the first", "Into the first again"]
    assert len(saved("Into the second").messages) == 2


def test_the_system_text_stays_with_its_conversation(open_page, demo, late):
    opening, _ = late
    page = chat_page(open_page, 4)
    page.get_by_text("System text and prompt form").click()
    page.get_by_label("System text", exact=True).fill("You are the first")
    ask(page, "First of two", 1)
    opening.clear()
    page.get_by_role("button", name="New conversation", exact=True).click()
    ask(page, "Second of two", 1)
    opening.set()
    expect(page.get_by_label("System text", exact=True)).to_have_value("")
    opening.clear()
    show(page, "First of two")
    say(page, "On with it")  # its system text is not here yet
    opening.set()
    answered(page, 2)
    assert saved("First of two").system == "You are the first" and saved("Second of two").system == ""


def test_a_system_text_may_be_written_while_an_answer_comes_and_stands_in_the_raw_prompt(open_page, demo, held):
    page = chat_page(open_page, 40)
    page.get_by_text("System text and prompt form").click()
    begin(page, "Who art thou?")
    page.get_by_label("System text", exact=True).press_sequentially("Speak like")
    held.set()
    page.get_by_label("System text", exact=True).press_sequentially(" a king.")
    answered(page, 1)
    expect(page.get_by_label("System text", exact=True)).to_have_value("Speak like a king.")
    page.get_by_label("Message", exact=True).focus()
    page.reload()
    expect(page.get_by_label("System text", exact=True)).to_have_value("Speak like a king.")
    page.get_by_role("button", name="Raw prompt").click()
    raw = page.locator(".nx-dialog .raw")
    expect(raw).to_have_text("Speak like a king.\n\nUser: Who art thou?\nAssistant:")
    page.keyboard.press("Escape")
    expect(raw).to_have_count(0)


def test_an_answer_that_has_not_begun_can_be_stopped(open_page, demo, held, late):
    _, beginning = late
    page = chat_page(open_page, 400)
    beginning.clear()
    say(page, "Never mind")
    page.keyboard.press("Escape")
    beginning.set()
    answered(page, 1)
    expect(turns(page, "assistant").last).to_contain_text("stopped")


def test_a_conversation_that_is_left_keeps_what_was_written_and_disturbs_no_other(open_page, demo, held):
    page = chat_page(open_page, 1000)
    begin(page, "I am left behind")
    page.get_by_role("button", name="New conversation", exact=True).click()
    until(lambda: not demo.status().active)
    held.set()
    at_most(page, 20)
    ask(page, "I am the next", 1)
    expect(turns(page, "assistant").last).to_contain_text("20 tokens")
    show(page, "I am left behind")
    expect(turns(page, "assistant").last).to_contain_text("stopped")
    assert text_of(page, "assistant")


def test_a_conversation_is_found_by_its_new_name_and_deleted_while_it_is_answered(open_page, demo, held):
    page = chat_page(open_page, 400)
    begin(page, "A rose by any other name")
    rename(page, "Roses")
    page.get_by_label("Search conversations").fill("rOSe")
    expect(page.locator(".conversations .title")).to_have_count(1)
    page.get_by_role("button", name="Delete Roses").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(turns(page)).to_have_count(0)
    expect(page.locator(".conversations .title")).to_have_count(0)
    until(lambda: not demo.status().active)
    held.set()
    at_most(page, 4)
    ask(page, "All the same", 1)
    assert "Roses" not in titles()


# Output of the model is text --------------------------------------------------------------------------------------------------

PAYLOADS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror=\"window.hacked = 1\">",
    "<img src=\"http://evil.example/pixel.png\">",
    "![pixel](http://evil.example/pixel.png)",
    "![x](x \"onerror=window.hacked=1\")",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt&colon;window.hacked=1)",
    "<a href=\"javascript:window.hacked=1\">click</a>",
    "<svg onload=\"window.hacked=1\"></svg>",
    "<svg><script>window.hacked=1</script></svg>",
    "<iframe srcdoc=\"<script>parent.hacked=1</script>\"></iframe>",
    "<details open ontoggle=\"window.hacked=1\">x</details>",
    "<body onload=\"window.hacked=1\">",
    "<style>@import 'http://evil.example/a.css';</style>",
    "<link rel=stylesheet href=\"http://evil.example/a.css\">",
    "<meta http-equiv=refresh content=\"0;url=http://evil.example\">",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=window.hacked=1>",
    "```html\n<img src=x onerror=window.hacked=1>\n```",
    "`<img src=x onerror=window.hacked=1>` **<b onclick=window.hacked=1>b</b>**",
    "${window.hacked=1} {{constructor.constructor('window.hacked=1')()}}",
    "<video src=\"http://evil.example/v\" onerror=window.hacked=1 autoplay>",
    "</textarea></template><script>window.hacked=1</script>",
    "- <object data=\"http://evil.example/o\"></object>\n1. <embed src=\"http://evil.example/e\">",
    "http://evil.example/auto www.evil.example",
)  # fmt: skip


def inert(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")  # scripts had their turn
    assert page.evaluate("window.hacked") is None
    kinds = "img, script, iframe, a, style, link, meta, object, embed, video, details, math, b"
    return page.locator(".turn .body").locator(kinds).count() == 0


def test_payloads_saved_or_streamed_stay_text(open_page, demo, monkeypatch):
    conversation = Conversation(title="<img src=x onerror=window.hacked=1>", system=PAYLOADS[0])
    for payload in PAYLOADS:
        conversation.append("user", payload)
        conversation.append("assistant", payload)
    Store().save(conversation)
    text = "\n\n".join(PAYLOADS)

    async def hostile(ticket):
        for start in range(0, len(text), 7):
            yield [Update(text[start : start + 7], 5)]
            await asyncio.sleep(0.001)
        yield [Update("", None, "stop")]

    monkeypatch.setattr(chat, "batches", hostile)
    page = chat_page(open_page)
    show(page, "<img src=x")
    expect(turns(page)).to_have_count(2 * len(PAYLOADS))
    assert inert(page)
    assert text_of(page, "assistant", 0) == PAYLOADS[0] and text_of(page, "user", 1) == PAYLOADS[1]
    page.get_by_role("button", name="New conversation", exact=True).click()
    ask(page, "Attack me", 1)
    assert inert(page)
    assert "<script>window.hacked = 1</script>" in text_of(page, "assistant")


def test_markdown_is_shown_and_streamed_like_the_whole(open_page, demo):
    text = "# Title\nfirst *line*\nsecond **line**\n\n- a `b`\n- c\n\n1. one\n2. two\n\n```python\nx = '*a*'\n```\n> said\nend"
    page = open_page(view="Chat")
    whole, streamed = page.evaluate(
        """text => [[text], [...text]].map(pieces => {
            const place = document.createElement("div"), prose = new neox.Prose(place);
            for (const piece of pieces) prose.add(piece);
            prose.end();
            return place.innerHTML;
        })""",
        text,
    )
    assert whole == streamed
    parts = ("<h3>Title</h3>", "<em>line</em>\n", "<li>a <code>b</code></li>", "<pre>x = '*a*'</pre>", '<ol start="1">')
    assert all(part in whole for part in parts)


# Notebook ----------------------------------------------------------------------------------------------------


def notebook_page(open_page, text, tokens=20, **options):
    page = open_page(view="Notebook", **options)
    at_most(page, tokens)
    page.get_by_role("textbox", name="Text").fill(text)
    return page


def completed(page):
    expect(page.locator("#nx-view-notebook[data-busy]")).to_have_count(0)
    return page.locator("#nx-text").input_value()


def test_a_text_is_completed_taken_back_and_completed_at_the_cursor(open_page, demo):
    page = notebook_page(open_page, "KING HENRY:\n")
    page.get_by_role("button", name="Complete").click()
    expect(page.get_by_role("button", name="Undo")).to_be_enabled()
    once = completed(page)
    assert once.startswith("KING HENRY:\n") and len(once) > 20
    page.get_by_role("button", name="Complete").click()
    expect(page.locator("#nx-text")).not_to_have_value(once)
    assert completed(page).startswith(once)
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("textbox", name="Text")).to_have_value("KING HENRY:\n")
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    page.get_by_role("textbox", name="Text").fill("KING HENRY:\n\nTHE END")
    page.locator("#nx-text").evaluate("node => node.setSelectionRange(12, 12)")
    page.get_by_role("button", name="At cursor").click()
    expect(page.get_by_role("button", name="Undo")).to_be_enabled()
    text = completed(page)
    assert text.startswith("KING HENRY:\n") and text.endswith("\nTHE END") and len(text) > 40


def test_probabilities_and_alternatives_are_shown_by_mouse_and_keyboard(open_page, demo):
    page = notebook_page(open_page, "KING RICHARD III:\n", 60)
    page.get_by_role("switch", name="Probabilities").check()
    page.get_by_role("button", name="Complete").click()
    completed(page)
    tokens = page.locator(".tokens .token")
    expect(tokens).to_have_count(60)
    shown = page.get_by_role("tooltip")
    tokens.nth(10).hover()
    expect(shown).to_be_visible()
    shares = [float(t.strip("<% \n")) for t in shown.locator("b").all_inner_texts()]
    assert shares[:5] == sorted(shares[:5], reverse=True) and sum(shares[:5]) <= 101
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    expect(tokens.nth(2)).to_have_attribute("aria-describedby", "nx-alternatives")
    tokens.nth(4).focus()
    shoot(page, "notebook")
    text = page.locator("#nx-text").input_value()
    assert "".join(tokens.all_text_contents()) == text.removeprefix("KING RICHARD III:\n")


def test_a_text_of_ones_own_is_scored_and_stays_where_the_engine_refuses_it(open_page, demo):
    page = notebook_page(open_page, "To be, or not to be")
    text, tokens = page.get_by_role("textbox", name="Text"), page.locator(".tokens .token")
    page.get_by_role("button", name="Score text").click()
    expect(tokens.first).to_be_visible()
    assert "".join(tokens.all_text_contents()) == "To be, or not to be"
    expect(tokens.first).to_have_class(re.compile("unknown"))  # nothing stands before it
    page.get_by_role("switch", name="Probabilities").uncheck()
    text.fill("To be, or so")
    page.get_by_role("switch", name="Probabilities").check()
    expect(page.locator(".tokens")).to_have_text("To be, or so")  # an edit ends what was known
    page.get_by_role("switch", name="Probabilities").uncheck()
    page.get_by_text("Repetition, stop strings, bias").click()
    field(page, "Logit bias").fill("99999:5")
    page.get_by_role("button", name="Complete").click()
    expect(notice(page)).to_contain_text("99999")
    expect(text).to_have_value("To be, or so")
    expect(page.get_by_role("button", name="Complete")).to_be_enabled()


# Settings ----------------------------------------------------------------------------------------------------


def test_presets_set_the_controls_and_an_emptied_one_is_not_taken_for_zero(open_page, demo):
    page = open_page(view="Chat")
    for name, values in PRESETS.items():
        page.get_by_role("button", name=name, exact=True).click()
        for control in FIELDS[:4]:
            wanted = values.get(control.name, control.neutral)
            assert float(field(page, control.label).input_value()) == wanted
        expect(page.get_by_role("button", name=name, exact=True)).to_have_attribute("aria-pressed", "true")
    field(page, "Temperature").fill("0.55")
    expect(page.locator(".preset[aria-pressed=true]")).to_have_count(0)
    field(page, "Temperature").fill("")
    say(page, "How hot?")
    expect(notice(page)).to_contain_text("Temperature is empty")
    expect(page.get_by_label("Message", exact=True)).to_have_value("How hot?")


# Looks and ways ----------------------------------------------------------------------------------------------------


def see_plans(page):
    """Wait for what fits, on the tab Model."""
    page.get_by_role("tab", name="Model").click()
    expect(page.locator(".family .badge").first).not_to_have_class(re.compile("waiting"))


def widest(page):
    """How far anything reaches beyond the window's right edge, in pixels."""
    return page.evaluate(
        """() => Math.max(0, ...[...document.querySelectorAll("body *")]
            .filter(e => e.checkVisibility({visibilityProperty: true}) && !e.closest(".offscreen, .raw, pre"))
            .map(e => Math.round(e.getBoundingClientRect().right - window.innerWidth)))"""
    )


def test_nothing_overflows_on_a_phone(open_page, demo, data):
    shutil.rmtree(data / "conversations", ignore_errors=True)
    page = open_page(PHONE, has_touch=True, is_mobile=True)
    see_plans(page)
    assert widest(page) == 0
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Sampling settings").click()
    at_most(page, 40)
    expect(page.locator("#nx-settings")).to_be_in_viewport()
    page.get_by_role("button", name="Close settings").click()
    ask(page, "a-very-long-word-" * 20, 1)
    assert widest(page) == 0
    box = page.locator(".composer").bounding_box()
    assert box["y"] + box["height"] > PHONE["height"] - 80  # it sticks to the bottom
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation", exact=True)).to_be_in_viewport()
    page.get_by_role("button", name="New conversation", exact=True).click()
    ask(page, "What news, my lord?", 1)
    shoot(page, "phone-chat")
    page.get_by_role("tab", name="Notebook").click()
    page.get_by_role("textbox", name="Text").fill("word " * 300)
    assert widest(page) == 0
    for name in ("Complete", "At cursor", "Undo", "Score text"):
        expect(page.get_by_role("button", name=name)).to_be_in_viewport()
    page.set_viewport_size({"width": 320, "height": 640})
    assert widest(page) == 0
    page.get_by_role("tab", name="Chat").click()
    assert widest(page) == 0


def test_the_keyboard_alone_is_enough(open_page, demo, held):
    page = open_page()
    page.keyboard.press("Control+Shift+Digit2")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.live .body p").first).not_to_be_empty()
    assert text_of(page, "user") == "first line\nsecond line"
    page.keyboard.press("Escape")
    answered(page, 1)
    page.keyboard.press("Control+Shift+Enter")
    expect(page.locator(".turn.live")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".siblings")).to_contain_text("2/2")
    page.keyboard.press("Control+Shift+KeyL")
    expect(turns(page)).to_have_count(0)
    page.keyboard.press("Control+Shift+Digit1")
    page.get_by_role("tab", name="Model").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Chat")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_the_focus_stays_where_it_was(open_page, demo, held):
    page = chat_page(open_page, 40)
    held.set()
    ask(page, "Hold on", 1)
    for _ in range(2):
        held.clear()
        tool(page, "Regenerate").press("Enter")
        expect(page.get_by_role("region", name="Conversation")).to_be_focused()  # there are no tools meanwhile
        expect(page.locator(".turn.live")).to_have_count(1)
        held.set()
        answered(page, 1)
    tool(page, "Previous version").press("Enter")
    expect(page.locator(".siblings")).to_contain_text("2/3")
    expect(tool(page, "Previous version")).to_be_focused()
    tool(page, "Edit").press("Enter")
    page.keyboard.press("Escape")
    expect(tool(page, "Edit")).to_be_focused()
    here = page.locator(".conversations .here")
    here.get_by_role("button", name="Rename").press("Enter")
    page.keyboard.type("Held")
    page.keyboard.press("Enter")
    expect(here.get_by_role("button", name="Rename Held")).to_be_focused()
    here.get_by_role("button", name="Delete").press("Enter")
    page.keyboard.press("Enter")
    expect(turns(page)).to_have_count(0)
    expect(page.get_by_role("button", name="New conversation", exact=True)).to_be_focused()


def test_tab_reaches_every_control_and_shows_where_it_is(open_page, demo, data):
    shutil.rmtree(data / "conversations", ignore_errors=True)
    page = chat_page(open_page, 4)
    ask(page, "Hello", 1)
    page.evaluate("document.activeElement.blur()")
    reached, rings = set(), set()
    for _ in range(70):
        page.keyboard.press("Tab")
        name, ring = page.evaluate(
            """() => {
                const e = document.activeElement, box = e.closest(".composer") || e, style = getComputedStyle(e);
                const ring = style.outlineStyle !== "none" || getComputedStyle(box).boxShadow !== "none";
                return [e.ariaLabel || e.labels?.[0]?.textContent || e.textContent, ring];
            }"""
        )
        if page.evaluate("document.activeElement !== document.body"):  # where it begins anew
            reached.add(name.strip())
            rings.add(ring)
    assert {"Message", "Send", "Regenerate", "Continue", "Edit", "Copy", "New conversation"} <= reached
    assert {"Temperature", "Seed", "Precise"} <= reached and rings == {True}


def test_dark_and_light_follow_the_system_and_the_switch(open_page, demo, data):
    shutil.rmtree(data / "conversations", ignore_errors=True)

    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark, light = chat_page(open_page, color_scheme="dark"), chat_page(open_page, color_scheme="light")
    assert background(dark) != background(light)
    for page, seed, text in (
        (dark, "4", "What news from the field?"),
        (light, "2", "Shall I compare thee to a summer's day?"),
    ):
        at_most(page, 90, "Balanced")
        field(page, "Seed").fill(seed)
        ask(page, text, 1)
    shoot(dark, "chat-dark")
    shoot(light, "chat")
    light.get_by_role("button", name="Dark colours").click()
    assert background(light) == background(dark)
    light.reload()
    expect(light.get_by_role("button", name="Light colours")).to_be_visible()
    see_plans(dark)


CONTRAST = """() => {
    const rgb = c => { const x = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        x.fillStyle = c; x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c[3] === 255) return c;
        }
        return [255, 255, 255];
    };
    const faint = e => { let o = 1; for (; e; e = e.parentElement) o *= Number(getComputedStyle(e).opacity); return o; };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        if (e.closest(":disabled, .offscreen, script, style")) continue;
        const back = behind(e), o = faint(e), ink = rgb(getComputedStyle(e).color).map((v, i) => v * o + back[i] * (1 - o));
        const [a, b] = [light(ink), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${walker.currentNode.data.trim().slice(0, 40)}`);
    }
    return [...new Set(found)];
}"""


NAMELESS = """() => [...document.querySelectorAll("button, input:not([aria-hidden=true]), textarea, select, summary, [role]")]
    .filter(e => e.checkVisibility() && !(e.ariaLabel || e.labels?.length || e.textContent.trim()
        || e.getAttribute("aria-labelledby") || ["alert", "presentation", "status"].includes(e.role)))
    .map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable_and_every_control_has_a_name(open_page, demo, scheme):
    page = chat_page(open_page, 12, color_scheme=scheme)
    ask(page, "Who is there?", 1)
    page.get_by_text("System text and prompt form").click()
    assert page.evaluate(CONTRAST) == page.evaluate(NAMELESS) == []
    see_plans(page)
    assert page.evaluate(CONTRAST) == page.evaluate(NAMELESS) == []
    page.get_by_role("tab", name="Notebook").click()
    page.get_by_role("textbox", name="Text").fill("KING:\n")
    page.get_by_role("switch", name="Probabilities").check()
    page.get_by_role("button", name="Complete").click()
    completed(page)
    page.locator(".tokens .token").nth(3).focus()
    assert page.evaluate(CONTRAST) == page.evaluate(NAMELESS) == []


# How much is sent ----------------------------------------------------------------------------------------------------


async def thousand_tokens(ticket):
    for number in range(100):
        yield [Update(f" word{number % 10}", 5, None, TokenLogprob(-1.0, ((5, -1.0), (6, -2.0))))] * 10
        await asyncio.sleep(0.005)
    yield [Update("", None, "length")]


@pytest.mark.parametrize("view", ["Chat", "Notebook"])
def test_an_update_costs_the_same_at_1000_tokens(open_page, demo, monkeypatch, streamed, view):
    monkeypatch.setattr(chat if view == "Chat" else notebook, "batches", thousand_tokens)
    page = open_page(view=view)
    streamed.clear()
    if view == "Chat":
        ask(page, "KING:\n", 1)
        text = text_of(page, "assistant")
    else:
        page.get_by_role("textbox", name="Text").fill("KING:\n")
        page.get_by_role("switch", name="Probabilities").check()
        page.get_by_role("button", name="Complete").click()
        expect(page.get_by_role("button", name="Undo")).to_be_enabled()
        text = completed(page)
    assert text.count("word") == 1000
    updates = [size for size in streamed if size > 150]
    assert len(updates) > 90  # it did stream
    early, late = median(updates[3:13]), median(updates[-13:-3])
    assert late < 1.5 * early, updates
