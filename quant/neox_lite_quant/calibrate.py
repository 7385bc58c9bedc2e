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
from neox_lite.offload.memory import free_memory

# Of a file: tokens in a window, at most the model's context, and the default number of windows.
CONTEXT, WINDOWS = 512, 128
OWN_CONTEXT, OWN_WINDOWS = 128, 512  # of the model's own text: many short windows vary more than a few long ones
SEED, MAX_WINDOWS = 0, 1 << 16
MAX_BYTES = 64 << 20  # of a file: 128 windows are about 256 KB of English

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Calibration:
    """windows (n, context) int64, and their source: a file's name and hash, or the model itself."""

    windows: Tensor
    source: str
    sha256: str | None = None

    def manifest(self) -> dict[str, Any]:
        count, context = self.windows.shape
        return {"calibration": self.source, "calibration_sha256": self.sha256, "windows": count, "context": context}


def shape_of(config: GPTNeoXConfig, own: bool, count: int | None) -> tuple[int, int]:
    """The number of windows and of tokens in each, of the model's own text or of a file.

    Raises ArgumentError for a count out of range.
    """
    context, default = (OWN_CONTEXT, OWN_WINDOWS) if own else (CONTEXT, WINDOWS)
    count = default if count is None else count
    if not 1 <= count <= MAX_WINDOWS:
        raise ArgumentError(f"calibration windows are {count}, expected 1 to {MAX_WINDOWS}")
    return count, min(context, config.max_position_embeddings)


def from_file(path: Path, folder: Path, config: GPTNeoXConfig, count: int | None = None) -> Calibration:
    """Windows at even distances over a file's texts, which are joined with the end-of-text token.

    Fewer than `count` where the file is too short. Raises ArgumentError for a file without text or with less than one window.
    """
    count, context = shape_of(config, False, count)
    texts, sha256 = read_texts(path)
    tokenizer = GPTNeoXTokenizerFast.from_pretrained(folder)
    ids: list[int] = []
    for text in texts:
        between = [] if not ids or config.eos_token_id is None else [config.eos_token_id]
        ids += between + tokenizer(text, add_special_tokens=False).input_ids
    available = len(ids) // context
    if not available:
        raise ArgumentError(f"{path}: has {len(ids)} tokens, fewer than one window of {context}; give more text")
    if max(ids) >= config.vocab_size:
        raise ArgumentError(
            f"{path}: gives id {max(ids)}, but the model has {config.vocab_size} ids: the tokenizer is another model's"
        )
    windows = torch.tensor(ids[: available * context]).view(available, context)
    chosen = torch.arange(min(count, available)) * available // min(count, available)
    return Calibration(windows[chosen], path.name, sha256)


def read_texts(path: Path) -> tuple[list[str], str]:
    """The texts of a UTF-8 file, and its SHA-256.

    .jsonl: on each line a string or an object with "text". .json: a list of those. Anything else is one text.
    """
    try:
        if not path.is_file() and path.exists():
            raise ArgumentError(f"{path}: is no regular file; expected a text file")
        if path.stat().st_size > MAX_BYTES:
            raise ArgumentError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; a sample of it is enough")
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
    """Windows that the model writes, each from a random first token, sampled at temperature 1 with a fixed seed.

    The quantized model should keep the distribution of this text. Raises ArgumentError where the model does not fit into free
    memory, because each token would read it from the disk again.
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
    cached, written = None, [ids]
    for step in range(1, context):
        out = model(ids, past_key_values=cached, use_cache=True)
        cached = out.past_key_values
        logits = out.logits[:, -1].float().masked_fill_(~known, float("-inf"))
        if not torch.isfinite(logits.amax(-1)).all():
            raise ArgumentError(f"{folder}: its logits are not finite; run neox-lite verify")
        ids = torch.multinomial(logits.softmax(-1), 1, generator=random)
        written.append(ids)
        progress(step + 1, context)
    return Calibration(torch.cat(written, 1), "own text")
