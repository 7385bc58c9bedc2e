"""Conversations: alternatives are kept, exports come back as they were, hostile files are refused in one sentence."""

import json
import multiprocessing
import random

import pytest

from neox_lite_app.conversations.conversation import (
    MAX_BYTES,
    MAX_MESSAGES,
    Conversation,
    ConversationError,
    Store,
    imported,
    read_file,
)
from neox_lite_app.paths import data_folder


@pytest.fixture
def talk():
    """user "one" -> "1" -> user "two" -> "2"."""
    talk = Conversation(system="Be brief.")
    for user, answer in (("one", "1"), ("two", "2")):
        talk.append("user", user)
        talk.append("assistant", answer, tokens=1, finish_reason="stop")
    return talk


def texts(conversation):
    return [message.text for message in conversation.path()]


# The tree --------------------------------------------------------------------------------------------------------------


def test_the_path_is_what_was_said_in_order(talk):
    assert texts(talk) == ["one", "1", "two", "2"]
    assert talk.chat()[:2] == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    assert talk.label == "one" and talk.last.details == {"tokens": 1, "finish_reason": "stop"}


def test_regenerating_keeps_the_earlier_answer_as_an_alternative_and_answers_what_has_none(talk):
    first = talk.leaf
    talk.regenerate()
    talk.extend("two")
    talk.extend(" again", tokens=2)
    assert texts(talk) == ["one", "1", "two", "two again"] and talk.place(talk.leaf) == (2, 2)
    for _ in range(2):  # there is none before the first
        talk.switch(talk.leaf, -1)
        assert talk.leaf == first and talk.place(first) == (1, 2)
    talk.append("user", "three")
    talk.regenerate()
    assert texts(talk)[-2:] == ["three", ""] and talk.place(talk.leaf) == (1, 1)


def test_an_edited_message_stands_beside_the_old_one_with_nothing_after_it(talk):
    root, old_leaf = talk.path()[0].id, talk.leaf
    new = talk.edit(root, "uno")
    assert texts(talk) == ["uno"] and talk.place(new.id) == (2, 2)
    talk.append("assistant", "I")
    talk.show(root)
    assert talk.leaf == old_leaf  # down to the newest message below


def test_continuing_extends_the_last_answer_and_its_details(talk):
    talk.extend(" and more", tokens=4)
    assert talk.last.text == "2 and more" and talk.last.details == {"tokens": 4, "finish_reason": "stop"}


def test_a_branch_is_a_conversation_of_its_own(talk):
    talk.rename("Numbers")
    branch = talk.branch(talk.path()[1].id)
    branch.append("user", "elsewhere")
    assert texts(branch) == ["one", "1", "elsewhere"] and texts(talk) == ["one", "1", "two", "2"]
    assert branch.id != talk.id and branch.title == "Numbers (branch)" and branch.system == "Be brief."


def test_deleting_shows_an_alternative_or_else_what_was_answered(talk):
    first = talk.leaf
    talk.regenerate()
    talk.delete(talk.leaf)
    assert talk.leaf == first and talk.place(first) == (1, 1)
    talk.regenerate()
    talk.extend("other")
    talk.delete(first)  # what is not shown leaves the path as it is
    assert texts(talk)[-1] == "other" and first not in talk.messages
    talk.delete(talk.path()[1].id)
    assert texts(talk) == ["one"] and len(talk.messages) == 1
    talk.delete(talk.leaf)
    assert talk.leaf is None and talk.path() == [] and talk.label == "New conversation"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda talk: talk.append("assistant", "again"), "is of the user, not of the assistant"),
        (lambda talk: Conversation().append("assistant", "hello"), "first message is of the user"),
        (lambda talk: talk.append("root", "hello"), "role is 'root'"),
        (lambda talk: talk.append("user", "a\ud800"), "half a character"),
        (lambda talk: talk.extend("", tokens_per_s=float("nan")), "finite number"),
        (lambda talk: talk.branch(talk.path()[0].id).extend("x"), "no answer to continue"),
        (lambda talk: talk.edit("x", "y"), "no message 'x'"),
    ],
)
def test_what_cannot_be_saved_is_refused_when_it_is_said(talk, act, message):
    with pytest.raises(ConversationError, match=message):
        act(talk)
    assert texts(talk) == ["one", "1", "two", "2"]


def test_more_than_a_conversation_holds_is_refused_when_it_is_said_or_written(talk, monkeypatch):
    monkeypatch.setattr("neox_lite_app.conversations.conversation.MAX_MESSAGES", 4)
    with pytest.raises(ConversationError, match="4 messages, the most"):
        talk.append("user", "five")
    talk.system = "\ud800"
    with pytest.raises(ConversationError, match="system text holds half a character"):
        talk.to_json()
    talk.system = ""
    talk.extend("x" * MAX_BYTES)
    with pytest.raises(ConversationError, match=f"more than the {MAX_BYTES}"):
        talk.to_json()


def test_ten_thousand_turns_deep_is_no_trouble():
    talk = Conversation()
    for number in range(MAX_MESSAGES):
        talk.append(("user", "assistant")[number % 2], str(number))
    again = Conversation.from_json(talk.to_json())
    assert again == talk and len(again.path()) == MAX_MESSAGES
    again.show(again.path()[0].id)
    assert again.leaf == talk.leaf
    again.delete(again.path()[0].id)
    assert again.messages == {}


# JSON ------------------------------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was(talk):
    talk.regenerate()
    talk.extend("```\n# 日本語 \x00\x1b[31m\r\n\u2028", tokens_per_s=1.5, model=None)
    talk.rename("A\x1b title\nof two lines")
    again = Conversation.from_json(talk.to_json())
    assert again == talk and list(again.messages) == list(talk.messages) and again.title == "A title of two lines"


def change(talk, **fields):
    return json.dumps({**json.loads(talk.to_json()), **fields})


def changed_message(talk, number, **fields):
    value = json.loads(talk.to_json())
    value["messages"][number] |= fields
    return json.dumps(value)


HOSTILE_FIELDS = [
    *({"schema": "other"}, {"version": 2}, {"script": "x"}, {"id": "../../../etc/passwd"}, {"id": []}),
    *({"title": "a\nb"}, {"title": 3}, {"title": "a" * 201}, {"created": 1e300}),
    *({"updated": "2026-01-01T00:00:00"}, {"updated": "2026-01-01T00:00:00+01:00"}),  # no zone, another zone
    *({"leaf": "0" * 32}, {"leaf": []}, {"leaf": None}),
    *({"messages": []}, {"messages": {}}, {"messages": [1]}, {"messages": [{}] * (MAX_MESSAGES + 1)}),
]
HOSTILE_MESSAGES = [  # changes of the first message
    *(
        {"role": "system"},
        {"role": []},
        {"text": 1},
        {"text": "\udc00"},
        {"text": "x" * MAX_BYTES},
        {"html": "<script>"},
    ),
    *({"details": []}, {"details": {"a": {}}}, {"details": {"a": 10**30}}, {"details": {"a": "x" * 1001}}),
    *({"details": {"a" * n: 1 for n in range(1, 35)}}, {"details": {"__class__": 1}}),
]
HOSTILE = {
    **{ascii(fields)[:60]: lambda talk, fields=fields: change(talk, **fields) for fields in HOSTILE_FIELDS},
    **{
        ascii(fields)[:60]: lambda talk, fields=fields: changed_message(talk, 0, **fields)
        for fields in HOSTILE_MESSAGES
    },
    "nothing": lambda talk: "",
    "a list": lambda talk: "[]",
    "no JSON": lambda talk: talk.to_json()[:-20],
    "NaN": lambda talk: talk.to_json().replace('"tokens": 1', '"tokens": NaN', 1),
    "infinite details": lambda talk: talk.to_json().replace('"tokens": 1', '"tokens": 1e999', 1),
    "a key twice": lambda talk: talk.to_json().replace('"version"', '"schema": 1, "version"', 1),
    "nested without end": lambda talk: '{"schema":' + "[" * 200_000,
    "a number of many digits": lambda talk: '{"version": ' + "9" * 5000 + "}",
    "a missing key": lambda talk: json.dumps({k: v for k, v in json.loads(talk.to_json()).items() if k != "leaf"}),
    "an unknown parent": lambda talk: changed_message(talk, 2, parent="0" * 32),
    "itself as parent": lambda talk: changed_message(talk, 1, parent=talk.path()[1].id),
    "a cycle": lambda talk: changed_message(talk, 0, parent=talk.path()[3].id),
    "the same id twice": lambda talk: changed_message(talk, 2, id=talk.path()[0].id),
    "two users in a row": lambda talk: changed_message(talk, 1, role="user"),
    "more than 10 MB in UTF-8": lambda talk: talk.to_json().replace("one", "日" * (MAX_BYTES // 3)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(name, talk):
    text = HOSTILE[name](talk)
    with pytest.raises(ConversationError) as caught:
        Conversation.from_json(text, "export.json")
    message = str(caught.value)
    assert message.startswith("export.json: ") and "\n" not in message and len(message) < 400


def test_random_damage_is_refused_or_harmless(talk):
    draw, text = random.Random(0), talk.to_json()
    for _ in range(2000):
        at, end = sorted(draw.choices(range(len(text)), k=2))
        damaged = text[:at] + draw.choice(['"', "{", "null", "[]", "\\ud800", "", "0"]) + text[min(end, at + 40) :]
        try:
            Conversation.from_json(Conversation.from_json(damaged).to_json())
        except ConversationError as error:
            assert "\n" not in str(error)


def test_an_import_never_overwrites_what_was_saved(talk, tmp_path):
    store = Store(tmp_path)
    store.save(talk)
    copy = imported(talk.to_json())
    copy.append("user", "more")
    store.save(copy)
    assert copy.id != talk.id and store.load(talk.id) == talk and len(store.list()) == 2


# Markdown --------------------------------------------------------------------------------------------------------------

AWKWARD = [
    "",
    "\n",
    "\n\n\nspace around  \n\n",
    "# Title\n## User\n### x",
    "## User <!-- neox-lite -->",
    "a\n\\## Assistant <!-- neox-lite -->\n\\\\## System <!-- neox-lite -->\n",
    "```python\nprint(1)\n",
    "~~~\n```\n",
    "## Assistant <!-- neox-lite -->\r\nb\rc\n",
    "<!-- neox-lite -->\n---\n> quote\n\\# x",
    "\x0c\x0b\x85\u2028\u2029tab\t",
]


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("other", AWKWARD)
def test_markdown_brings_the_shown_path_back_to_the_letter(text, other):
    talk = Conversation(title="Ways", system=other)
    talk.append("user", text)
    talk.append("assistant", other)
    talk.append("user", text)
    again = imported(talk.to_markdown())
    assert again.chat() == talk.chat() and again.system == talk.system and again.title == "Ways"


def test_markdown_is_readable_and_survives_an_editor_of_another_system(talk):
    text = talk.to_markdown()
    assert text.startswith(
        "# one\n\n## System <!-- neox-lite -->\n\nBe brief.\n\n## User <!-- neox-lite -->\n\none\n\n"
        "## Assistant <!-- neox-lite -->\n\n1\n\n## User"
    )
    assert imported(text.replace("\n", "\r\n").rstrip()).chat() == talk.chat()


USER = "## User <!-- neox-lite -->\n\n"
OTHER = {
    "nothing": "",
    "a title alone": "# A title alone\n",
    "no title": f"{USER}no title\n",
    "text without a role": f"# t\n\nlost text\n\n{USER}x\n",
    "an answer first": "# t\n\n## Assistant <!-- neox-lite -->\n\nfirst\n",
    "a system text last": f"# t\n\n{USER}x\n\n## System <!-- neox-lite -->\n\nlate\n",
    "more than 10 MB": f"# t\n\n{USER}" + "x" * MAX_BYTES,
    "three users in a row": "# t\n\n" + USER * 3,
}


@pytest.mark.parametrize("name", OTHER)
def test_other_markdown_is_refused_in_one_sentence(name):
    with pytest.raises(ConversationError) as caught:
        Conversation.from_markdown(OTHER[name])
    assert "\n" not in str(caught.value)


# Saved conversations ---------------------------------------------------------------------------------------------------


def test_saved_conversations_come_back_newest_first(talk, tmp_path):
    store = Store(tmp_path / "new" / "folder")
    assert store.list() == []
    other = Conversation(title="Other")
    other.append("user", "hello")
    store.save(talk)
    store.save(other)
    assert [entry.title for entry in store.list()] == ["Other", "one"] and store.load(talk.id) == talk
    talk.append("user", "newer")
    store.save(talk)
    assert [(entry.title, entry.messages) for entry in store.list()] == [("one", 5), ("Other", 1)]
    store.rename(talk.id, "Renamed")
    assert store.list()[0].title == "Renamed" == Store(store.folder).list()[0].title
    store.delete(talk.id)
    store.delete(talk.id)
    assert [entry.id for entry in store.list()] == [other.id]


def test_saved_conversations_are_for_their_owner_only(talk, tmp_path):
    store = Store(tmp_path / "mine")
    store.save(talk)
    (path,) = store.folder.iterdir()
    assert path.stat().st_mode & 0o077 == 0 and store.folder.stat().st_mode & 0o077 == 0


def test_a_corrupt_file_is_reported_and_not_lost(talk, tmp_path):
    store = Store(tmp_path)
    store.save(talk)
    corrupt = tmp_path / f"{'0' * 32}.json"
    corrupt.write_bytes(b"\xff{")
    (tmp_path / f"{'1' * 32}.json").mkdir()
    (tmp_path / f"{'2' * 32}.json").write_text(talk.to_json())
    (tmp_path / "notes.json").write_text("not ours")
    with (tmp_path / f"{'3' * 32}.json").open("wb") as file:
        file.truncate(MAX_BYTES * 1000)
    good, *bad = store.list()
    assert good.id == talk.id and good.problem is None
    assert len(bad) == 4 and all(entry.problem and "\n" not in entry.problem for entry in bad)
    assert corrupt.read_bytes() == b"\xff{"
    with pytest.raises(ConversationError, match="not UTF-8"):
        store.load("0" * 32)


def test_a_folder_that_cannot_be_used_is_an_error_of_one_sentence(talk, tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    for act in (lambda: store.save(talk), store.list):
        with pytest.raises(ConversationError, match=r"cannot be (written|listed)"):
            act()


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(talk, tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(talk)
    before = store.load(talk.id)
    talk.append("user", "new")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConversationError, match="No space left"):
        store.save(talk)
    assert store.load(talk.id) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("id", ["../x", "", "0" * 31, "A" * 32, "0" * 32 + "\n", None])
def test_ids_are_never_paths(id, tmp_path):
    for act in (Store(tmp_path).load, Store(tmp_path).delete):
        with pytest.raises(ConversationError, match="32 hexadecimal digits"):
            act(id)


def test_processes_share_a_folder_without_losing_conversations(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=save_many, args=(tmp_path, number)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    entries = Store(tmp_path).list()
    assert len(entries) == 21 and not any(entry.problem for entry in entries)
    assert len(list(tmp_path.iterdir())) == 21


def save_many(folder, number):
    store = Store(folder)
    shared = Conversation(id="f" * 32)
    for turn in range(10):
        one = Conversation(title=f"{number}.{turn}")
        one.append("user", "x" * 10_000)
        shared.append(("user", "assistant")[turn % 2], f"{number}" * 10_000)
        store.save(one)
        store.save(shared)
        assert {len(set(message.text)) for message in store.load("f" * 32).path()} == {1}  # whole, whoever wrote last


def test_a_file_is_read_by_what_it_holds(talk, tmp_path):
    for name, text in (("a.json", talk.to_json()), ("a.md", talk.to_markdown())):
        (tmp_path / name).write_text(text, newline="")
        assert read_file(tmp_path / name).chat() == talk.chat()
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConversationError):
            read_file(path)


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("NEOX_LITE_DATA", raising=False)
    assert Store().folder == tmp_path / "xdg" / "neox-lite" / "conversations"
    monkeypatch.setenv("NEOX_LITE_DATA", str(tmp_path / "own"))
    assert data_folder("models") == tmp_path / "own" / "models"
