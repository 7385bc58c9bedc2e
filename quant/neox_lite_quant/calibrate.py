"""Windows of token ids to calibrate with: from a text file, or written by the model itself. Knows no layer and no format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_lite import GPTNeoXForCausalLM, GPTNeoXTokenizerFast
from neox_lite.config import GPTNeoXConfig
from neox_lite.errors import ArgumentError
from neox_lite.offload.profile import free_memory

CONTEXT, WINDOWS = 512, 128  # tokens a window of a file's, where the model has as many, and their default number
OWN_CONTEXT, OWN_WINDOWS = 128, 512  # of the model's own text: many short windows vary more than a few long ones
SEED, MOST_WINDOWS = 0, 1 << 16
MOST_BYTES = 64 << 20  # of a file: 128 windows are about 256 KB of English

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Calibration:
    """windows (n, context) int64, and where they come from: a file's name and hash, or the model itself."""

    windows: Tensor
    source: str
    sha256: str | None = None

    def manifest(self) -> dict[str, Any]:
        count, context = self.windows.shape
        return {"calibration": self.source, "calibration_sha256": self.sha256, "windows": count, "context": context}


def shape_of(config: GPTNeoXConfig, own: bool, count: int | None) -> tuple[int, int]:
    """Windows and tokens a window, of the model's own text or a file's. Raises ArgumentError for a count out of range."""
    context, usual = (OWN_CONTEXT, OWN_WINDOWS) if own else (CONTEXT, WINDOWS)
    count = usual if count is None else count
    if not 1 <= count <= MOST_WINDOWS:
        raise ArgumentError(f"calibration windows are {count}, expected 1 to {MOST_WINDOWS}")
    return count, min(context, config.max_position_embeddings)


def from_file(path: Path, folder: Path, config: GPTNeoXConfig, count: int | None = None) -> Calibration:
    """Windows at even distances over a file's texts, which follow each other with the end-of-text token between.

    Fewer than `count` where the file is short of them. Raises ArgumentError for a file that holds no text or not one window.
    """
    count, context = shape_of(config, False, count)
    texts, sha256 = read_texts(path)
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(folder)
    ids: list[int] = []
    for text in texts:
        between = [] if not ids or config.eos_token_id is None else [config.eos_token_id]
        ids += between + tokenizer(text, add_special_tokens=False).input_ids
    whole = len(ids) // context
    if not whole:
        raise ArgumentError(f"{path}: has {len(ids)} tokens, fewer than one window of {context}; give more text")
    if max(ids) >= config.vocab_size:
        raise ArgumentError(f"{path}: gives id {max(ids)}, but the model has {config.vocab_size}: another's tokenizer")
    windows = torch.tensor(ids[: whole * context]).view(whole, context)
    chosen = torch.arange(min(count, whole)) * whole // min(count, whole)
    return Calibration(windows[chosen], path.name, sha256)


def read_texts(path: Path) -> tuple[list[str], str]:
    """The texts of a UTF-8 file, and its SHA-256.

    .jsonl: one a line, a string or an object with "text". .json: a list of such. Anything else is one text.
    """
    try:
        if not path.is_file() and path.exists():
            raise ArgumentError(f"{path}: is no regular file; expected a text file")
        if path.stat().st_size > MOST_BYTES:
            raise ArgumentError(f"{path}: is larger than {MOST_BYTES >> 20} MiB; a sample of it is enough")
        raw = path.read_bytes()
        content = raw.decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}") from error
    texts = [text for text in _texts(path, content) if text.strip()]
    if not texts:
        raise ArgumentError(f"{path}: holds no text")
    return texts, hashlib.sha256(raw).hexdigest()


def _texts(path: Path, content: str) -> list[str]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        lines = content.split("\n")  # not splitlines: JSON strings may hold its other separators
        return [
            _text(_json(path, line, f"line {i}"), path, f"line {i}") for i, line in enumerate(lines, 1) if line.strip()
        ]
    if kind == ".json":
        entries = _json(path, content, "it")
        if not isinstance(entries, list):
            raise ArgumentError(f"{path}: holds {type(entries).__name__}, expected a list of texts")
        return [_text(entry, path, f"entry {i}") for i, entry in enumerate(entries, 1)]
    return [content]


def _json(path: Path, content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path}: {where} is not JSON: {error}") from error


def _text(entry: Any, path: Path, where: str) -> str:
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ArgumentError(f'{path}: {where} is no text; expected a string or {{"text": "..."}}')
    return text


@torch.no_grad()
def own_text(
    folder: Path, config: GPTNeoXConfig, count: int | None = None, progress: Progress = lambda done, total: None
) -> Calibration:
    """Windows that the model writes, each from a random first token, drawn at temperature 1 with a fixed seed.

    That is the text whose distribution a quantized model should keep. Raises ArgumentError where the model does not fit into
    free memory: it would be read from the disk once for each token.
    """
    count, context = shape_of(config, True, count)
    weights = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    cache = 8 * config.num_hidden_layers * config.hidden_size * count * context  # float32 keys and values
    free = free_memory()[1]
    if free is not None and weights + cache > free:
        raise ArgumentError(
            f"{folder}: writing its own calibration text takes {(weights + cache) / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB "
            "are free; give --calibration FILE"
        )
    model = GPTNeoXForCausalLM.from_pretrained(folder, device_map="cpu")
    random = torch.Generator().manual_seed(SEED)
    known = torch.ones(config.vocab_size, dtype=torch.bool)
    if (folder / "tokenizer.json").is_file():
        known[model.padding_ids] = False
    ids = torch.multinomial(known.float().expand(count, -1), 1, generator=random)
    kept, written = None, [ids]
    for step in range(1, context):
        out = model(ids, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        logits = out.logits[:, -1].float().masked_fill_(~known, float("-inf"))
        if not torch.isfinite(logits.amax(-1)).all():
            raise ArgumentError(f"{folder}: its logits are not finite; see neox-lite verify")
        ids = torch.multinomial(logits.softmax(-1), 1, generator=random)
        written.append(ids)
        progress(step + 1, context)
    return Calibration(torch.cat(written, 1), "own text")
