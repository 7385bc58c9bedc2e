"""neox-lite push: a folder that verifies, with a model card, as one commit of a hub repository.

The transport and the token (HF_TOKEN, or what `hf auth login` keeps) are huggingface_hub's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from neox_lite.checkpoint.manifest import ANY_WEIGHTS, INDEX
from neox_lite.checkpoint.reader import Checkpoint, inside
from neox_lite.errors import ArgumentError, CheckpointError, HubError
from neox_lite.hub import HEAD, SMALL_FILES, call_hub, check_id, fetch_files

from ..terminal import amount, note, print_json
from .inspect_model import problems_of
from .model_card import Origin, card, license_in, origin_of, read_rows

CARD, RESULTS = "README.md", "neox_lite_compare.json"
T = TypeVar("T")


def push(args: argparse.Namespace) -> int:
    """Verify, write the card, and upload; with --dry-run only show what would be uploaded."""
    folder, hub_id = Path(args.folder), args.hub_id
    check_id(hub_id, args.revision)
    if problems := problems_of(folder):
        more = f" (and {len(problems) - 1} more; see neox-lite verify)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}; nothing was uploaded")
    files = files_of(folder)
    text = card_of(args, folder, sum(path.stat().st_size for path in files.values()))
    sizes = {name: path.stat().st_size for name, path in files.items()} | {CARD: len(text.encode())}
    for name, count in sizes.items():
        note(f"{amount(count, 'B'):>10}  {name}")
    note(f"{amount(sum(sizes.values()), 'B'):>10}  in all")
    url = None
    if args.dry_run:
        if not args.json:
            print(text)
    else:
        url = upload(hub_id, files | {CARD: text.encode()}, args.private, args.revision)
        if not args.json:
            print(url)
    if args.json:
        print_json({"url": url, "files": sizes, "bytes": sum(sizes.values()), "card": text})
    return 0


def files_of(folder: Path) -> dict[str, Path]:
    """What belongs to the model, and nothing else that lies in the folder: name -> path."""
    with Checkpoint.open(folder) as checkpoint:
        weights = checkpoint.files
    if others := [path.name for path in weights if path.suffix != ".safetensors"]:
        raise CheckpointError(
            f"{folder}: {others[0]} is a pickle; run neox-lite quantize, and push the folder it writes"
        )
    names = [*SMALL_FILES, INDEX, *(path.name for path in weights), HEAD]
    return {name: inside(folder, name) for name in names if (folder / name).is_file()}


def card_of(args: argparse.Namespace, folder: Path, size: int) -> str:
    """The folder's own README.md, else one with the measured table and what is known of the source."""
    if (folder / CARD).is_file():
        if args.compare or args.base_model or args.license:
            raise ArgumentError(f"{folder / CARD}: is the card; move it away to have one with the table written")
        return inside(folder, CARD).read_text(encoding="utf-8")
    results = Path(args.compare) if args.compare else folder / RESULTS
    rows = read_rows(results) if args.compare or results.is_file() else None
    if rows is None:
        note("the card says that quality was not measured; --compare FILE has the table of `neox-lite compare --json`")
    origin = _with_license(origin_of(folder, args.base_model, args.license))
    return card(folder, args.hub_id, origin, rows, amount(size, "B"))


def _with_license(origin: Origin) -> Origin:
    """The license of the base model's own card, where none was given and the hub has it."""
    if origin.license is not None or origin.base_model is None:
        return origin
    try:
        found = license_in((fetch_files(origin.base_model, [CARD]) / CARD).read_text(encoding="utf-8"))
    except HubError as error:
        note(f"the card names no license: {error}")
        return origin
    return Origin(origin.base_model, found)


def upload(hub_id: str, files: dict[str, Path | bytes], private: bool, revision: str | None) -> str:
    """Put the files into a repository, which is made if need be, as one commit; return its address. Raises HubError."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise HubError(f"{hub_id}: uploading needs a token that may write: set HF_TOKEN, or run `hf auth login`")
    api = HfApi()
    _writing(lambda: api.create_repo(hub_id, private=private or None, exist_ok=True), hub_id)
    if revision not in (None, "main"):
        _writing(lambda: api.create_branch(hub_id, branch=revision, exist_ok=True), hub_id)
    info = _writing(lambda: api.model_info(hub_id, revision=revision), hub_id)
    _check_target(
        hub_id, {sibling.rfilename for sibling in info.siblings or ()}, files.keys(), private and not info.private
    )
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    message = "Upload with neox-lite"
    done = _writing(lambda: api.create_commit(hub_id, operations, commit_message=message, revision=revision), hub_id)
    return str(done.commit_url)


def _check_target(hub_id: str, present: set[str], ours: Any, is_public: bool) -> None:
    """Refuse a repository in which what is there and what comes would make no model, or that is not what was call_hub for."""
    if is_public:
        raise HubError(
            f"{hub_id}: exists and is public, which --private does not change; change it in its settings first"
        )
    beside = [name for name in sorted(present) if name not in ours and (ANY_WEIGHTS.fullmatch(name) or name == INDEX)]
    if beside:
        raise HubError(
            f"{hub_id}: holds {beside[0]} of another model; push to another repository, or delete it there first"
        )


def _writing(call: Callable[[], T], hub_id: str) -> T:
    """Call the hub; a refusal is about rights to write."""
    from huggingface_hub.errors import HfHubHTTPError

    def checked() -> T:
        try:
            return call()
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise HubError(
                    f"{hub_id}: the hub refuses it ({status}); the token needs the right to write to {hub_id.partition('/')[0]}"
                ) from error
            raise
        except ValueError as error:  # the hub does not accept the card's front matter
            raise HubError(f"{hub_id}: {' '.join(str(error).split())}") from error

    result: T = call_hub(checked, hub_id, None)
    return result
