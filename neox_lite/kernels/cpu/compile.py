"""From LLVM IR to functions in memory, for one processor, with a cache of object files on disk. Knows no kernel.

A compiled kernel is kept under a name that its source code, LLVM's version and the processor's features decide, so a
second start only maps it. Where the cache folder cannot be written, a temporary folder of this user is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from ... import user_cache
from ...files import write_atomically
from .target import Target

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no thread that would ever let go of it
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))
_loaded: dict[tuple[str, ...], int] = {}
_libraries: list[object] = []  # code must outlive every call
_announced = False


def compiled(name: str, build: Callable[[ir.Module], None], target: Target) -> int:
    """Address of the function `name` that `build` writes into a module; `name` says all that it depends on but the target."""
    key = (name, target.cpu, target.features)
    with _lock:
        if key not in _loaded:
            _loaded[key] = _link(name, _object_code(name, build, target))
        return _loaded[key]


def assembly(build: Callable[[ir.Module], None], target: Target) -> str:
    """What the target's processor would run, as text; the target need not be this machine."""
    machine = _machine(target)
    return machine.emit_assembly(_optimized(build, target, machine))


def _object_code(name: str, build: Callable[[ir.Module], None], target: Target) -> bytes:
    identity = (name, target.triple, target.cpu, target.features, llvmlite.__version__, _source_hash())
    file = f"{name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:24]}.o"
    for folder in cache_folders():
        with suppress(OSError):
            if _ours(folder) and _intact(found := (folder / file).read_bytes()):
                return found[:-32]
    _announce()
    machine = _machine(target)
    made = machine.emit_object(_optimized(build, target, machine))
    for folder in cache_folders():
        if _keep(folder, file, made):
            break
    return made


def _optimized(build: Callable[[ir.Module], None], target: Target, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    source = ir.Module()
    source.triple = target.triple
    build(source)
    # With a frame pointer LLVM may align the stack; without, vectors that it spills there lie across two cache lines.
    text = re.sub(r"^(define .*\))", r'\1 "frame-pointer"="all"', str(source), flags=re.MULTILINE)
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = False  # unrolled by hand where it pays
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module


def _machine(target: Target) -> llvm.TargetMachine:
    with _lock:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    kind = llvm.Target.from_triple(target.triple)
    return kind.create_target_machine(target.cpu, target.features, opt=3, reloc="pic", jit=True)


@cache
def _jit() -> llvm.LLJIT:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


def _link(name: str, code: bytes) -> int:
    builder = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(name).add_current_process()
    library = builder.link(_jit(), f"{name}-{len(_libraries)}")
    _libraries.append(library)
    return library[name]


# The cache ------------------------------------------------------------------------------------------------------------


@cache
def _source_hash() -> str:
    """Of the modules that write kernels: a change to any of them makes new kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folders() -> list[Path]:
    """Where object files are looked for and kept, the first that works first; those that this system can name."""
    user = getattr(os, "getuid", lambda: "user")()
    folders = []
    with suppress(OSError):  # there is no home
        folders.append(user_cache.folder() / "kernels")
    with suppress(OSError):  # nor a folder for temporary files that can be written
        folders.append(Path(tempfile.gettempdir()) / f"neox-lite-kernels-{user}")
    return folders


def _ours(folder: Path) -> bool:
    """Whether the folder belongs to this user: code that someone else put under a guessable name is not ours to run."""
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()


def _intact(found: bytes) -> bool:
    """Whether an object file is followed by its own SHA-256: a machine that lost power may leave less."""
    return len(found) > 32 and hashlib.sha256(found[:-32]).digest() == found[-32:]


def _keep(folder: Path, file: str, code: bytes) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _ours(folder):
            return False
        write_atomically(folder / file, code + hashlib.sha256(code).digest(), durable=False, private=True)
    except OSError:
        return False
    return True


def _announce() -> None:
    global _announced
    if not _announced:
        print("neox-lite: compiling kernels for this processor (once; a few seconds)", file=sys.stderr)
    _announced = True
