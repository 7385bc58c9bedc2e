"""neox-lite list: the models of this architecture that are on this machine. Reads their small JSON files only, no weights."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ConfigError, NeoxLiteError
from neox_lite.files import read_json
from neox_lite.hub import HEAD, WEIGHTS
from neox_lite.loading.quantized_cache import cache_root

from ..load_for_command import common_label, formats_in
from ..paths import data_folder
from ..terminal import amount, print_json, printable

MAX_FOLDERS = 1000  # looked at in one place


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. name: what commands take for it; where: "folder", "hub" cache, or kept when it was "quantized"
    while loading. bytes: of its weight files; tokenizer: whether it has its own, without which it takes ids only.

    problem: why it cannot be used as it is; then the figures that are not known are None.
    """

    name: str
    path: str
    where: str
    revision: str | None = None  # of a hub id, where it is not the main one
    format: str | None = None  # "int4 g128", "float16", …
    bytes: int | None = None
    parameters: int | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    context: int | None = None
    tokenizer: bool = False
    problem: str | None = None


def show(args: argparse.Namespace) -> None:
    found = local_models([Path(folder) for folder in args.folders])
    if args.json:
        print_json({"models": [asdict(model) for model in found]})
        return
    for model in found:
        print(printable(describe(model)))
    if not found:
        print(f"no models here, in {data_folder('models')} or in the hub cache; neox-lite demo brings its own")


def describe(model: LocalModel) -> str:
    """One line for people."""
    name = f"{model.name} (revision {model.revision})" if model.revision else model.name
    if model.format is None or model.bytes is None:
        return f"{name}  {model.problem}"
    shape = f"{model.layers} layers, hidden {model.hidden}, {model.heads} heads, context {model.context}"
    size = f"{amount(model.parameters or 0)} parameters, {model.format}, {amount(model.bytes, 'B')}"
    notes = [
        "kept from loading" if model.where == "quantized" else None,
        None if model.tokenizer else "no tokenizer",
        model.problem,
    ]
    note = "; ".join(filter(None, notes))
    return f"{name}  {size}, {shape}" + (f"  ({note})" if note else "")


def local_models(folders: Sequence[Path] = ()) -> list[LocalModel]:
    """The models in folders given, this one, the user's own and the caches; each of the places may hold models or be one."""
    places = [*folders, Path(), data_folder("models")]
    sources: list[Iterator[LocalModel]] = [_below(place, "folder", place in folders) for place in places]
    sources += [_in_hub_cache(), _below(cache_root(), "quantized", False)]
    found: dict[str, LocalModel] = {}
    for model in itertools.chain(*sources):
        found.setdefault(_real(model.path), model)
    return list(found.values())


def _below(place: Path, where: str, by_name: bool) -> Iterator[LocalModel]:
    """A folder's own model, or those of its sub-folders. by_name: the command names it, so its problem is reported."""
    try:
        folders = [place, *_folders(place)]
    except OSError as error:
        if by_name:
            yield LocalModel(str(place), str(place), where, problem=f"cannot be listed: {error.strerror or error}")
        return
    for folder in folders:
        if (model := _model(str(folder), folder, where)) is not None:
            yield model


def _in_hub_cache() -> Iterator[LocalModel]:
    """What huggingface_hub keeps: for each repository, the commits that branches and tags stood for."""
    from huggingface_hub import constants

    for repo in _entries(lambda: _folders(Path(constants.HF_HUB_CACHE).expanduser())):
        if not (named := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", repo.name)):
            continue
        for ref in _entries(lambda repo=repo: _files(repo / "refs")):  # type: ignore[misc]
            commit = _commit(ref)
            if commit is None:
                continue
            revision = ref.relative_to(repo / "refs").as_posix()
            model = _model(
                f"{named[1]}/{named[2]}",
                repo / "snapshots" / commit,
                "hub",
                None if revision == "main" else revision,
            )
            if model is not None:
                yield model


def _model(name: str, folder: Path, where: str, revision: str | None = None) -> LocalModel | None:
    """What a folder holds; None where that is no model of this architecture."""
    try:
        if not (folder / "config.json").is_file() or (folder / "config.json").stat().st_size == 0:
            return None
        if read_json(folder / "config.json", ConfigError).get("model_type") != GPTNeoXConfig.model_type:
            return None
        config = GPTNeoXConfig.from_pretrained(folder)
        format = common_label(formats_in(config), str(config.dtype or "as stored"))
        size, problem = _weights(folder)
        tokenizer = (folder / "tokenizer.json").is_file()
    except (NeoxLiteError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return LocalModel(name, str(folder), where, revision, problem=" ".join(str(reason).split())[:300])
    return LocalModel(
        name,
        str(folder),
        where,
        revision,
        format=format,
        bytes=size,
        parameters=config.num_parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        context=config.max_position_embeddings,
        tokenizer=tokenizer,
        problem=problem,
    )


def _weights(folder: Path) -> tuple[int, str | None]:
    """Bytes of the weight files that would be loaded, and what is wrong with them."""
    entry = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if entry is None:
        return 0, "no weight files"
    names = [entry]
    if entry.endswith(".index.json"):
        index: Any = read_json(folder / entry, ConfigError).get("weight_map")
        plain = isinstance(index, dict) and all(isinstance(n, str) and Path(n).name == n for n in index.values())
        if not plain:
            raise ConfigError(f"{folder / entry}: not an index of weight files; fetch it again")
        names = sorted(set(index.values()))
    there = [folder / name for name in names if (folder / name).is_file()]
    lacking = len(names) - len(there)
    there += [folder / HEAD] if (folder / HEAD).is_file() else []
    problem = f"{lacking} of {len(names)} weight files are missing" if lacking else None
    return sum(path.stat().st_size for path in there), problem


def _folders(place: Path) -> list[Path]:
    """Sub-folders by name. Raises OSError where the place cannot be listed."""
    entries = itertools.islice(place.iterdir(), MAX_FOLDERS)
    return sorted(path for path in entries if not path.name.startswith(".") and _is_folder(path))


def _files(place: Path) -> list[Path]:
    return sorted(path for path in itertools.islice(place.rglob("*"), MAX_FOLDERS) if path.is_file())


def _entries(listing: Callable[[], list[Path]]) -> list[Path]:
    """What a place lists; nothing where there is no such place or it is not ours to read."""
    try:
        return listing()
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _commit(ref: Path) -> str | None:
    """The commit that a small file of the hub cache names."""
    try:
        text = ref.read_text(encoding="ascii") if ref.stat().st_size < 100 else ""
    except (OSError, ValueError):
        return None
    return text.strip() if re.fullmatch(r"\s*[0-9a-f]{40}\s*", text) else None


def _real(path: str) -> str:
    """One name for one folder, whichever way leads there."""
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError):  # a loop of links
        return path
