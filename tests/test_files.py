"""files.py: a file is replaced whole or not at all, and JSON is read in one way only."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
from support.commands import run_python
from support.faults import disk_full_at
from support.refusals import refused

from neox_lite import files
from neox_lite.errors import ConfigError
from neox_lite.files import AtomicFile, parse_json, partials, read_json, write_atomically

POSIX = pytest.mark.skipif(os.name == "nt", reason="no locks, links or modes there")


def names(folder):
    return {path.name for path in folder.iterdir()}


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["text\nü\r\n", b"\x00bytes"], ids=["text", "bytes"])
@pytest.mark.parametrize("durable", [True, False])
def test_a_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path, content, durable):
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"old", durable)
    write_atomically(path, content, durable)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == {"file"}


@pytest.fixture
def old(tmp_path):
    write_atomically(tmp_path / "file", "old")
    return tmp_path / "file"


def test_readers_see_the_old_file_until_the_new_one_is_whole(old):
    with AtomicFile(old) as file:
        file.write(b"new")
        file.flush()
        assert old.read_text() == "old"
        assert len(partials(old.parent)) == 1
    assert old.read_text() == "new" and names(old.parent) == {"file"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full-disk", "ctrl-c"])
def test_an_error_while_writing_leaves_the_old_file_alone(old, error):
    with pytest.raises(type(error)), AtomicFile(old) as file:
        file.write(b"new")
        raise error
    assert old.read_text() == "old" and names(old.parent) == {"file"}


@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace"), (os, "fdopen")])
def test_a_system_call_that_fails_leaves_the_old_file_alone(old, owner, call):
    with disk_full_at(1, owner, call), pytest.raises(OSError, match="No space left"):
        write_atomically(old, "new")
    assert old.read_text() == "old" and names(old.parent) == {"file"}


@POSIX
@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_a_private_file_is_for_this_user_alone_and_others_follow_the_umask(tmp_path, private, mode):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "folder" / "file", "x", private=private)
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == (0o700 if private else 0o750)


@POSIX
def test_a_link_is_replaced_and_never_written_through(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_atomically(tmp_path / "file", "new")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "file").read_text() == "new"
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 16)
    (tmp_path / f"file.{'0' * 16}.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", "newer")
    assert (tmp_path / "elsewhere").read_text() == "precious" and (tmp_path / "file").read_text() == "new"


@POSIX
def test_what_a_killed_process_left_is_removed_by_the_next_write_in_that_folder(tmp_path):
    run_python(
        "import os, signal, sys; from pathlib import Path; from neox_lite.files import AtomicFile\n"
        "with AtomicFile(Path(sys.argv[1])) as file: file.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path / "killed",
    )
    assert len(partials(tmp_path)) == 1
    for name in ("mine.partial", "notes.0123.partial"):
        (tmp_path / name).write_text("somebody else's")
    with AtomicFile(tmp_path / "slow") as file:
        write_atomically(tmp_path / "file", "x")
        assert len(partials(tmp_path)) == 1  # the one that is being written
        file.write(b"y")
    assert names(tmp_path) == {"file", "slow", "mine.partial", "notes.0123.partial"}


@POSIX
def test_a_file_that_was_taken_for_a_stale_one_before_its_lock_is_begun_again(tmp_path, monkeypatch):
    real, calls = files.lock, []

    def late(file, path):
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return real(file, path)

    monkeypatch.setattr(files, "lock", late)
    write_atomically(tmp_path / "file", "x")
    assert len(calls) == 2 and (tmp_path / "file").read_text() == "x" and names(tmp_path) == {"file"}


# -- reading ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "empty": ("", "not valid JSON"),
    "cut-short": ('{"a":', "not valid JSON: Expecting value: line 1"),
    "two-values": ("{} {}", "not valid JSON"),
    "a-list": ("[1, 2]", "found a JSON list, expected an object"),
    "not-utf-8": (b'{"\xff": 1}', "not valid JSON: not UTF-8 text: byte 2 is wrong"),
    "nested": ('{"a":' + "[" * 100_000, "nested too deeply"),
    "many-digits": ('{"a": ' + "9" * 100_000 + "}", "integer of 100000 digits"),
    "lone-surrogate": ('{"\\ud800": 1}', "not valid JSON"),
}
REFUSED_IF_STRICT = {
    "key-twice": ('{"a": 1, "a": 2}', "key 'a' appears twice; keep one"),
    "inner-key-twice": ('{"a": {"b": 1, "b": 1}}', "key 'b' appears twice; keep one"),
    "nan": ('{"a": NaN}', "NaN is not JSON"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not JSON"),
    "too-large": ('{"a": 1e999}', "1e999 is too large for a float"),
}


@pytest.mark.parametrize("kind", [*REFUSED, *REFUSED_IF_STRICT])
def test_json_that_could_be_read_in_two_ways_is_refused_in_one_line_that_names_the_file(tmp_path, kind):
    text, words = {**REFUSED, **REFUSED_IF_STRICT}[kind]
    (tmp_path / "x.json").write_bytes(text.encode() if isinstance(text, str) else text)
    message = refused(ConfigError, re.escape(words), read_json, tmp_path / "x.json", ConfigError)
    assert message.startswith(f"{tmp_path / 'x.json'}: ") and len(message) < len(str(tmp_path)) + 200
    if kind in REFUSED:
        refused(ConfigError, re.escape(words), parse_json, text, "x", ConfigError, strict=False)
    else:  # files that other libraries read pass where strict is off; nan is not nan
        assert repr(parse_json(text, "x", ConfigError, strict=False)) == repr(json.loads(text))


def test_a_file_that_is_missing_too_large_or_no_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json", ConfigError, max_bytes=8) == {"a": 1}
    refused(ConfigError, r"x\.json: larger than 7 bytes", read_json, tmp_path / "x.json", ConfigError, max_bytes=7)
    refused(ConfigError, r"y\.json: cannot be read: No such file", read_json, tmp_path / "y.json", ConfigError)
    refused(ConfigError, "not a regular file", read_json, tmp_path, ConfigError)
