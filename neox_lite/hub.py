"""Files of a hub repository -> a local folder. It knows file names only: never what is in a weight file or a config.

The transport, the cache, its progress bars and its environment (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE) are
huggingface_hub's. Everything is fetched at one commit, so files of two revisions never mix.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ArgumentError, CheckpointError, HubError
from .files import parse_json, write_atomically

logger = logging.getLogger("neox_lite")

# The small files of a model folder, and the int8 head, which is not in the index.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
OTHER_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
COMPANIONS = ("generation_config.json", *TOKENIZER_FILES, *OTHER_TOKENIZER_FILES)
MANIFEST = "neox_lite_manifest.json"
UNFINISHED = f"{MANIFEST}.partial"  # there while a folder is being written; holds the manifest of the model it replaces
SMALL_FILES = ("config.json", *COMPANIONS, MANIFEST)
HEAD = "neox_lite_head.safetensors"
# The first that a repository has is used and the others are never fetched: GPT-NeoX-20B has both, 80 GB together.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# An adapter's folder has these in place of a model's.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there
MERGE = "merge it into its base with peft (merge_and_unload, then save_pretrained), and use that folder"

Choose = Callable[[Collection[str], Callable[[str], bytes]], list[str]]
_announced: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Access:
    """A call's settings for the hub, in place of the environment's.

    cache_dir: in place of the hub cache. token: in place of HF_TOKEN and the login; False for none.
    local_files_only: only the cache is used.
    """

    cache_dir: Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @classmethod
    def take(cls, options: dict[str, Any]) -> "Access":
        """Pop transformers' arguments that belong here. Raises ArgumentError for a value of another type."""
        folder = options.pop("cache_dir", None)
        old = options.pop("use_auth_token", None)
        token, local = options.pop("token", old), options.pop("local_files_only", False)
        if folder is not None and not isinstance(folder, str | os.PathLike):
            raise ArgumentError(f"cache_dir is {folder!r}, expected the path of a folder")
        if token is not None and not isinstance(token, str | bool):  # its value is a secret
            raise ArgumentError(f"token is a {type(token).__name__}, expected a text, True or False")
        if not isinstance(local, bool):
            raise ArgumentError(f"local_files_only is {local!r}, expected True or False")
        return cls(None if folder is None else Path(folder).expanduser(), token, local)

    @property
    def cache(self) -> Path:
        from huggingface_hub import constants

        return self.cache_dir or Path(constants.HF_HUB_CACHE).expanduser()

    def check(self, repo_id: str) -> None:
        """Raises the error of an unreachable hub if only the cache may be used."""
        if self.local_files_only:
            raise _UnreachableError(
                f"{repo_id}: local_files_only is set, so {_endpoint()} is not contacted; leave it out"
            )


USUAL = Access()


class _UnreachableError(HubError):
    """The hub did not answer, so what the cache holds may be used instead."""


def resolve(
    folder_or_id: str | Path, revision: str | None = None, access: Access = USUAL, adapter: bool = False
) -> Path:
    """The folder of a model: an existing folder as it is, anything else as a hub id, fetched.

    adapter: whether it may be that of an adapter too. Raises as local_folder does, and HubError if the hub does not have it or
    cannot be reached.
    """
    return local_folder(folder_or_id, revision) or fetch_checkpoint(str(folder_or_id), revision, access, adapter)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's, and holds no weights of a model."""
    return _is_adapter({name for name in (ADAPTER_CONFIG, *WEIGHTS) if (folder / name).exists()})


def _is_adapter(listed: Collection[str]) -> bool:
    return ADAPTER_CONFIG in listed and not any(name in listed for name in WEIGHTS)


def no_model(where: str | Path) -> str:
    """The message for an adapter in place of a model."""
    return f"{where}: holds a LoRA adapter and no model; run it beside its base (adapter=, --adapter), or {MERGE}"


def local_folder(folder_or_id: str | Path, revision: str | None = None) -> Path | None:
    """An existing folder as it is, None for what can only be a hub id.

    Raises CheckpointError if it looks like a path and is no folder, or if a folder is given a revision.
    """
    text = str(folder_or_id)
    try:
        folder = Path(text).expanduser()
        found, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, ~ of nobody, NUL
        found, is_folder = False, False
    if text and is_folder:
        # Scripts pass "main" whatever they load.
        if revision not in (None, "main"):
            raise CheckpointError(f"{text}: is a folder, so revision {revision!r} means nothing; leave it out")
        return folder
    if text and found:
        raise CheckpointError(f"{text}: is a file; give the folder that holds config.json")
    if isinstance(folder_or_id, Path) or re.search(r"^[./~]|^[A-Za-z]:|[\\\0]|/.*/|/$|^$", text):
        raise CheckpointError(f"{text[:200]!r}: no such folder")
    return None


def fetch_checkpoint(repo_id: str, revision: str | None = None, access: Access = USUAL, adapter: bool = False) -> Path:
    """Fetch config, tokenizer and exactly one set of weights (safetensors before .bin); return the local folder.

    adapter: a repository of an adapter is fetched too. Raises HubError, one line that says what to try.
    """

    def choose(listed: Collection[str], read: Callable[[str], bytes]) -> list[str]:
        if adapter and _is_adapter(listed):
            return _adapter_files(repo_id, listed)
        small, weights = _checkpoint_files(repo_id, listed, read)
        small += [ADAPTER_CONFIG] if adapter and ADAPTER_CONFIG in listed else []
        return small + weights

    return _fetch(repo_id, revision, choose, access)


def resolve_adapter(folder_or_id: str | Path, access: Access = USUAL) -> Path:
    """The folder of an adapter, as `resolve` finds it."""

    def choose(listed: Collection[str], read: Callable[[str], bytes]) -> list[str]:
        return _adapter_files(str(folder_or_id), listed)

    return local_folder(folder_or_id) or _fetch(str(folder_or_id), None, choose, access)


def _adapter_files(repo_id: str, listed: Collection[str]) -> list[str]:
    """Settings, one file of weights, and the tokenizer that was saved with them."""
    weights = next((name for name in ADAPTER_WEIGHTS if name in listed), None)
    if ADAPTER_CONFIG not in listed or weights is None:
        lacking = ADAPTER_CONFIG if ADAPTER_CONFIG not in listed else " or ".join(ADAPTER_WEIGHTS)
        raise HubError(f"{repo_id}: has no {lacking}; not an adapter that can be loaded")
    return [ADAPTER_CONFIG, weights, *(name for name in TOKENIZER_FILES if name in listed)]


def _checkpoint_files(
    repo_id: str, listed: Collection[str], read: Callable[[str], bytes]
) -> tuple[list[str], list[str]]:
    """The small files, and one set of weights with its index."""
    if _is_adapter(listed):
        raise HubError(no_model(repo_id))
    if "config.json" not in listed:
        raise HubError(f"{repo_id}: has no config.json; not a checkpoint that can be loaded")
    return [name for name in SMALL_FILES if name in listed], _one_set_of_weights(repo_id, listed, read)


@dataclass(frozen=True)
class Remote:
    """A checkpoint at one commit: its small files are in folder; its weight files, name -> bytes, are fetched one by one.

    Methods raise HubError.
    """

    repo_id: str
    commit: str
    folder: Path
    sizes: dict[str, int]

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start..stop of a weight file."""
        return bytes(
            call_hub(partial(_read_range, self.repo_id, self.commit, name, start, stop), self.repo_id, self.commit)
        )

    def fetch(self, name: str, folder: Path) -> Path:
        """A weight file, fetched into a folder outside of the cache; resumes where an earlier call stopped."""
        import huggingface_hub as hub

        download = partial(hub.hf_hub_download, self.repo_id, name, revision=self.commit, local_dir=folder)
        try:
            path = Path(call_hub(download, self.repo_id, self.commit))
        except _UnreachableError as error:
            raise HubError(f"{error}; run again, it goes on where it stopped") from error
        if (found := path.stat().st_size) != self.sizes[name]:
            raise HubError(f"{path}: is {found} bytes, expected {self.sizes[name]}; delete it and run again")
        return path


def remote_checkpoint(repo_id: str, revision: str | None = None) -> Remote | None:
    """A checkpoint on the hub whose weight files can be fetched one at a time.

    None if the hub is away, if the cache has them all, or if they are no safetensors files: then it is `resolve`'s.
    """
    check_id(repo_id, revision)
    try:
        commit, sizes = call_hub(lambda: _model_info(repo_id, revision, USUAL), repo_id, revision)
    except _UnreachableError:
        return None
    weights: list[str] = []

    def choose(listed: Collection[str], read: Callable[[str], bytes]) -> list[str]:
        small, found = _checkpoint_files(repo_id, listed, read)
        weights.extend(name for name in found if name != HEAD and not name.endswith(".json"))
        return [*small, *(name for name in found if name.endswith(".json"))]

    folder = _download(repo_id, commit, sizes, choose, USUAL)
    if all((folder / name).is_file() for name in weights) or not all(n.endswith(".safetensors") for n in weights):
        return None
    return Remote(repo_id, commit, folder, {name: sizes[name] for name in weights})


def _read_range(repo_id: str, commit: str, name: str, start: int, stop: int) -> bytes:
    import huggingface_hub as hub
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    address = hub.hf_hub_url(repo_id, name, revision=commit, endpoint=_endpoint())
    response = get_session().get(address, headers=headers, timeout=hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    if len(response.content) != stop - start:
        raise HubError(f"{repo_id}: {_endpoint()} sends {name} only whole; fetch it first, with --keep-source")
    return response.content


def fetch_files(repo_id: str, names: Sequence[str], revision: str | None = None, access: Access = USUAL) -> Path:
    """Fetch those of the named files that a repository has; return the local folder. Raises HubError if it has none."""

    def choose(listed: Collection[str], read: Callable[[str], bytes]) -> list[str]:
        found = [name for name in names if name in listed]
        if not found:
            raise HubError(f"{repo_id}: has none of {', '.join(names)}")
        return found

    return _fetch(repo_id, revision, choose, access)


def _one_set_of_weights(repo_id: str, listed: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    entry = next((name for name in WEIGHTS if name in listed), None)
    if entry is None:
        raise HubError(f"{repo_id}: has no weights in a form that can be read; looked for {', '.join(WEIGHTS)}")
    extra = [HEAD] if HEAD in listed else []
    if not entry.endswith(".index.json"):
        return [entry, *extra]
    try:
        shards = sorted(set(parse_json(read(entry), f"{repo_id}: {entry}", HubError)["weight_map"].values()))
    except (LookupError, TypeError, AttributeError):
        raise HubError(f"{repo_id}: {entry} is not an index of weight files") from None
    suffix = ".bin" if ".bin." in entry else ".safetensors"
    for name in shards:
        if not isinstance(name, str) or not re.fullmatch(r"(\w[\w.-]*/)*\w[\w.-]*", name) or not name.endswith(suffix):
            raise HubError(f"{repo_id}: {entry} names {str(name)[:100]!r}, which is not a plain {suffix} file name")
    missing = [name for name in shards if name not in listed]
    if missing or not shards:
        raise HubError(f"{repo_id}: {entry} names {len(shards)} files, missing: {', '.join(missing[:4]) or 'all'}")
    return [entry, *shards, *extra]


# -- the hub and its cache --------------------------------------------------------------------------------------------


def _fetch(repo_id: str, revision: str | None, choose: Choose, access: Access) -> Path:
    """Let choose pick from the repository's file names, and fetch these at one commit; from the cache if the hub is away.

    choose is given the names and a reader of small files; it raises HubError if what it needs is not there.
    """
    check_id(repo_id, revision)
    try:
        access.check(repo_id)
        commit, sizes = call_hub(lambda: _model_info(repo_id, revision, access), repo_id, revision)
    except _UnreachableError as error:
        return _from_cache(repo_id, revision, choose, error, access)
    try:
        folder = _download(repo_id, commit, sizes, choose, access)
    except _UnreachableError as error:
        raise HubError(f"{error}; run again, the download continues where it stopped") from error
    _remember(folder, revision or "main", commit)
    return folder


def _download(repo_id: str, commit: str, sizes: dict[str, int], choose: Choose, access: Access) -> Path:
    """Fetch what choose picks and the cache lacks; return the commit's folder."""
    import huggingface_hub as hub

    where: dict[str, Any] = {"revision": commit, "cache_dir": access.cache_dir, "token": access.token}

    def read(name: str) -> bytes:
        return Path(call_hub(lambda: hub.hf_hub_download(repo_id, name, **where), repo_id, commit)).read_bytes()

    names = choose(sizes.keys(), read)
    folder = _snapshot(repo_id, commit, access)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        _check_space(repo_id, sum(sizes[name] for name in missing), access.cache)
        call_hub(lambda: hub.snapshot_download(repo_id, allow_patterns=missing, **where), repo_id, commit)
    lost = [name for name in missing if not (folder / name).is_file()]
    if lost:
        raise HubError(f"{repo_id}: {lost[0]} did not arrive; run again, the download continues where it stopped")
    return folder


def _model_info(repo_id: str, revision: str | None, access: Access) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and its files: name -> bytes (0 where the hub gives no size)."""
    from huggingface_hub import HfApi, constants

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi(token=access.token).model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise HubError(f"{repo_id}: {_endpoint()} names no commit for revision {revision or 'main'}")
    return info.sha, {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}


def _from_cache(repo_id: str, revision: str | None, choose: Choose, why: HubError, access: Access) -> Path:
    """The cached folder of the revision if it is complete, announced once; else raise why with what is lacking."""
    name = revision or "main"
    repo = _snapshot(repo_id, "", access).parent
    commit = name
    if (repo / "refs" / name).is_file():
        commit = (repo / "refs" / name).read_text().strip()
    folder = repo / "snapshots" / commit
    listed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        choose(listed, lambda file: (folder / file).read_bytes())
    except HubError as error:
        lacking = f"the cache does not have all of it ({error})" if listed else "it is not in the cache"
        raise HubError(f"{why}; {lacking}") from why
    if (repo_id, name) not in _announced and not (access.local_files_only or _offline_by_choice()):
        _announced.add((repo_id, name))
        logger.warning("%s; using the cached copy of commit %s", why, commit[:12])
    return folder


def _snapshot(repo_id: str, commit: str, access: Access) -> Path:
    """Where huggingface_hub keeps a commit's files: the layout that its documentation describes."""
    return access.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Store the commit of a branch or tag, as huggingface_hub does, when all files of that commit are in the cache."""
    ref = folder.parent.parent / "refs" / revision
    if revision == commit or (ref.is_file() and ref.read_text() == commit):
        return
    try:
        write_atomically(ref, commit, durable=False)
    except OSError as error:  # a cache that is shared and read-only still serves
        logger.warning("%s: cannot be written (%s), so %s cannot be found offline", ref, error.strerror, revision)


def check_id(repo_id: str, revision: str | None) -> None:
    name = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
    if not re.fullmatch(f"{name}/{name}", repo_id) or ".." in repo_id or "--" in repo_id:
        raise HubError(
            f"{repo_id[:200]!r}: neither a folder nor a hub id; a hub id is OWNER/NAME, such as EleutherAI/pythia-70m"
        )
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise HubError(f"{repo_id}: {revision!r} is not a branch, tag or commit")


def _check_space(repo_id: str, needed: int, cache: Path) -> None:
    cache = cache.absolute()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        raise HubError(f"{repo_id}: needs {needed} bytes, {free} are free in the hub cache {cache}; HF_HOME moves it")


# -- errors -----------------------------------------------------------------------------------------------------------


def call_hub(call: Callable[[], Any], repo_id: str, revision: str | None) -> Any:
    """Run a call to the hub and turn its errors into a HubError of one line; errors of other kinds pass unchanged."""
    try:
        return call()
    except HubError:
        raise
    except Exception as error:
        explained = _explain(error, repo_id, revision)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> HubError | None:
    from huggingface_hub import errors

    endpoint = _endpoint()
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        return _explain(cause, repo_id, revision) or _UnreachableError(f"{repo_id}: no connection to {endpoint}")
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repo_id}: gated; accept its terms at {endpoint}/{repo_id}, then set HF_TOKEN to your token")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo_id}: has no revision {revision!r} on {endpoint}; check its branches and tags")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{repo_id}: not on {endpoint}, or private; check the name, or set HF_TOKEN for a private model"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(getattr(error.response, "status_code", None), repo_id)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _UnreachableError(
            f"{repo_id}: HF_HUB_OFFLINE is set, so {endpoint} is not contacted; unset it to download"
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return HubError(f"{repo_id}: the disk of the hub cache is full; make room, or set HF_HOME to another disk")
    network = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")
    if type(error).__module__.split(".")[0] in network or isinstance(error, ConnectionError | TimeoutError):
        return _UnreachableError(
            f"{repo_id}: no connection to {endpoint} ({type(error).__name__}); check the network, or set HF_ENDPOINT"
        )
    if "Consistency check failed" in str(error):
        return HubError(f"{repo_id}: a download was cut short; run again")
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(f"{repo_id}: the hub cache cannot be written: {error.strerror}; HF_HOME moves it")
    if isinstance(error, RuntimeError) or type(error).__module__.startswith("huggingface_hub"):  # hf_xet: RuntimeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = re.sub(r"\?\S+", "?...", reason)  # the query of a download's address can hold a signature
        return HubError(f"{repo_id}: {endpoint}: {reason[:200]}; run again, or check the network")
    return None


def _explain_status(status: int | None, repo_id: str) -> HubError:
    endpoint = _endpoint()
    if status in (401, 403):
        return HubError(f"{repo_id}: {endpoint} refuses access ({status}); set HF_TOKEN to a token that may read it")
    if status == 429 or (status is not None and status >= 500):
        return _UnreachableError(f"{repo_id}: {endpoint} answers {status}; try again later")
    return HubError(f"{repo_id}: {endpoint} answers {status}; check the name and the revision")


def _endpoint() -> str:
    """The hub's address without the user name and password that a mirror's may carry."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _offline_by_choice() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
