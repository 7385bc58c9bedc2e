"""A LoRA adapter in peft's format: its settings and its tensors, read and checked. Knows no module and no operation.

y = W x + b + scale * B (A x), scale = lora_alpha / r, beside a weight W that stays as it is. Hu et al. 2021,
https://arxiv.org/abs/2106.09685; what settings mean is as in peft, in inference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GPTNeoXConfig
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..files import read_json
from ..hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MERGE
from ..units import DTYPES
from .reader import Checkpoint

FLOATING = tuple(DTYPES.values())
PREFIX, BASE = "base_model.model.", "gpt_neox."  # of every tensor's name, and of blocks that stand under a head
# The language head's name in checkpoints and in transformers 5. peft saves the whole weight beside a pair, as base_layer.
LANGUAGE_HEADS = ("embed_out", "lm_head")
HEADS = {"score": ("weight",), "classifier": ("weight", "bias"), "qa_outputs": ("weight", "bias")}
# Settings that change nothing once training is over. fan_in_fan_out: peft, too, drops it where weights are (out, in).
IDLE = {
    *("auto_mapping", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config"),
    *("lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "runtime_config", "task_type"),
    *("corda_config", "lora_ga_config"),  # of ways to start, which `init_lora_weights` names
}
HONOURED = {
    *("alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "revision"),
    *("target_modules", "use_rslora"),
}
REFUSED = {
    "use_dora": "DoRA divides by the length of the merged weight's columns",
    "lora_bias": "its B has a bias",
    "trainable_token_indices": "it changes rows of the embedding",
    "target_parameters": "it changes tensors that are no linear layer's",
    "layer_replication": "it runs layers several times",
    "megatron_config": "it was made for Megatron's layers",
    "alora_invocation_tokens": "activated LoRA begins at a token of the prompt",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA's matrices are in blocks",
    "arrow_config": "Arrow chooses among several adapters",
    "kasa_config": "KaSA is another arithmetic",
    "monteclora_config": "MonteCLoRA is another arithmetic",
    "velora_config": "VeLoRA is another arithmetic",
}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # that leave the base as it is


@dataclass(frozen=True)
class Settings:
    """adapter_config.json, as far as it says what is computed. Names of modules are as in the model that was trained.

    base, base_revision: the model that it was trained on. layers: numbers of the blocks that it is for, None for all.
    """

    path: Path
    base: str | None
    base_revision: str | None
    rank: int
    alpha: float
    root_scale: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_patterns: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    heads: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Raises ConfigError for what is no LoRA adapter's, UnsupportedError for one that needs more than this computes."""
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            raise ConfigError(f"{folder}: no {ADAPTER_CONFIG}; an adapter's folder holds it and {ADAPTER_WEIGHTS[0]}")
        keys = read_json(path, ConfigError)
        _refuse(keys, path)
        field = _Fields(keys, path)
        rank = field.number("r", 8)
        if not isinstance(rank, int):
            raise ConfigError(f"{path}: r is {rank}, expected a whole number of at least 1")
        layers = field.numbers("layers_to_transform")
        return cls(
            path,
            field.text("base_model_name_or_path"),
            field.text("revision"),
            rank,
            field.number("lora_alpha", 8),
            keys.get("use_rslora") is True,
            field.names("target_modules"),
            field.names("exclude_modules"),
            layers or None,
            field.patterns("layers_pattern"),
            field.by_name("rank_pattern"),  # type: ignore[arg-type]
            field.by_name("alpha_pattern"),
            _listed(field.names("modules_to_save")),
        )

    def adapts(self, name: str) -> bool:
        """Whether a module, by its full name, is one of the targets, by peft's rules."""
        if _matches(self.excluded, name) or not _matches(self.targets, name):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = self.layers_patterns or (r"[^.]*",)
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
        return any(int(match[match.lastindex or 0]) in self.layers for match in found if match)

    def rank_of(self, name: str) -> int:
        return _lookup(self.ranks, name, self.rank)

    def scale_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return _lookup(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.root_scale else rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model: for each linear layer that it changes, named as in the base model, A and B.

    name: as the caller gave it. low_ranks: "layers.3.attention.dense" -> (A, B) of shapes (r, in) as stored and (out, r)
    float32 with the scale in it. heads: "score.weight" and the like -> an output matrix that was trained with it.
    language_head: such a pair for the head of a language model, and the weight that it was saved with, if it was; both None
    where there are none.
    """

    name: str
    settings: Settings
    low_ranks: Mapping[str, tuple[Tensor, Tensor]]
    heads: Mapping[str, Tensor]
    language_head: tuple[tuple[Tensor, Tensor] | None, Tensor | None] = (None, None)

    @classmethod
    def open(
        cls, folder: Path, name: str, config: GPTNeoXConfig, head: str | None = None, language: bool = False
    ) -> Adapter:
        """The adapter in a folder, read whole. head: what the model calls its output matrix, None where it has none of a task.
        language: whether it is a language model with a head of its own.

        Raises CheckpointError for tensors that are not those that the settings and the model's shape say.
        """
        settings = Settings.read(folder)
        with open_weights(folder) as checkpoint:
            prefix = PREFIX + (BASE if any(n.startswith(PREFIX + BASE) for n in checkpoint.names()) else "")
            targets = {n: shape for n, shape in _linears(config) if settings.adapts(prefix[len(PREFIX) :] + n)}
            own_head = language and not config.tie_word_embeddings
            language_head = (
                next((h for h in LANGUAGE_HEADS if _pair_name(h, "A") in checkpoint), "") if own_head else ""
            )
            _check(checkpoint, settings, prefix, targets, head, language_head, config)
            low_ranks = {}
            for target in targets:
                a, b = (_own(checkpoint, f"{prefix}{target}.lora_{part}.weight") for part in "AB")
                scale = settings.scale_of(prefix[len(PREFIX) :] + target)
                low_ranks[target] = a, b.float() * scale
            heads = {n: _own(checkpoint, PREFIX + n) for n in _head_names(settings, head)}
            pair = None
            if language_head:
                a, b = (_own(checkpoint, _pair_name(language_head, part)) for part in "AB")
                pair = a, b.float() * settings.scale_of(language_head)
            saved = f"{PREFIX}{language_head}.base_layer.weight"
            whole = _own(checkpoint, saved) if saved in checkpoint else None
        return cls(name, settings, low_ranks, heads, (pair, whole))

    @property
    def layer_weights(self) -> dict[int, int]:
        """Numbers that it adds to each block that it changes."""
        counts: dict[int, int] = {}
        for name, pair in self.low_ranks.items():
            layer = int(name.split(".")[1])
            counts[layer] = counts.get(layer, 0) + sum(t.numel() for t in pair)
        return counts


def open_weights(folder: Path) -> Checkpoint:
    """The tensors of an adapter's folder. Raises CheckpointError where it has none."""
    found = next((name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{folder}: no weights of the adapter; looked for {' and '.join(ADAPTER_WEIGHTS)}")
    return Checkpoint.open_file(folder, found)


# Settings ---------------------------------------------------------------------------------------------------------------


def _refuse(keys: Mapping[str, Any], path: Path) -> None:
    kind = keys.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {kind!r}; adapters here are LoRA; {MERGE}")
    for key, value in keys.items():
        if key in IDLE or key in HONOURED or not value:
            continue
        reason = REFUSED.get(key, "this setting is not known here")
        raise UnsupportedError(f"{path}: {key} is {_short(value)}: {reason}; {MERGE}")
    if (bias := keys.get("bias", "none")) != "none":
        raise UnsupportedError(f"{path}: bias is {_short(bias)}: it changes the base model's biases; {MERGE}")
    start = keys.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UnsupportedError(
            f"{path}: init_lora_weights is {_short(start)}: training began with another base; save the adapter with peft's "
            "path_initial_model_for_weight_conversion"
        )
    others = [name for name in _listed(_Fields(keys, path).names("modules_to_save")) if name not in HEADS]
    if others:
        raise UnsupportedError(
            f"{path}: modules_to_save has {_short(others[0])}: the adapter brings whole weights of its own; {MERGE}"
        )
    if keys.get("target_modules") in (None, [], ""):
        raise ConfigError(f"{path}: target_modules is missing, so it does not say what it changes")


class _Fields:
    """The values of adapter_config.json by their types. Raises ConfigError naming the one that is of another."""

    def __init__(self, keys: Mapping[str, Any], path: Path) -> None:
        self._keys, self._path = keys, path

    def _wrong(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self._path}: {key} is {_short(self._keys.get(key))}, expected {expected}")

    def text(self, key: str) -> str | None:
        value = self._keys.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text")
        return value or None

    def number(self, key: str, default: int) -> float:
        value = self._keys.get(key, default)
        if not _is_number(value):
            raise self._wrong(key, "a number above 0")
        return value

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self._keys.get(key)
        value = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(n) is int for n in value):
            raise self._wrong(key, "numbers of layers")
        return tuple(value)

    def names(self, key: str) -> str | tuple[str, ...]:
        """One pattern, or a list of names."""
        value = self._keys.get(key) or ()
        if isinstance(value, str):
            self._compiled(key, value)
            return value
        if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
            raise self._wrong(key, "a list of names, or a pattern")
        return tuple(value)

    def patterns(self, key: str) -> tuple[str, ...]:
        found = _listed(self.names(key))
        for pattern in found:
            self._compiled(key, pattern)
        return found

    def by_name(self, key: str) -> dict[str, float]:
        value = self._keys.get(key) or {}
        if not isinstance(value, dict) or not all(_is_number(n) for n in value.values()):
            raise self._wrong(key, "numbers above 0 by module name")
        for name in value:
            self._compiled(key, name)
        return value

    def _compiled(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{self._path}: {key} has the pattern {_short(pattern)}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _short(value: object) -> str:
    return repr(value)[:100]


def _matches(targets: str | tuple[str, ...], name: str) -> bool:
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in targets)


def _lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that the end of a name fits."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


# Tensors ----------------------------------------------------------------------------------------------------------------


def _linears(config: GPTNeoXConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear layer of the blocks, named as in the base model, and its (out, in)."""
    for layer in range(config.num_hidden_layers):
        for name, (size, columns, _) in config.linear_shapes.items():
            yield f"layers.{layer}.{name}", (size, columns)


def _check(
    checkpoint: Checkpoint,
    settings: Settings,
    prefix: str,
    targets: Mapping[str, tuple[int, int]],
    head: str | None,
    language_head: str,
    config: GPTNeoXConfig,
) -> None:
    """Raise CheckpointError unless the tensors are exactly those of the targets, and of heads."""
    if not targets and not language_head:
        raise CheckpointError(
            f"{settings.path}: target_modules is {_short(settings.targets)}, which names no linear layer of this model; they "
            f"are {', '.join(n.rpartition('.')[2] for n in config.linear_shapes)} of {config.num_hidden_layers} layers"
        )
    for name in checkpoint.names():
        module, found, _ = name.removeprefix(PREFIX).partition(".lora_")
        if found and module != language_head and not re.search(r"(^|\.)layers\.\d+\.", module):
            raise UnsupportedError(
                f"{checkpoint.files[0]}: {_short(name)}: LoRA on {module} is not supported, only that of linear layers in the "
                f"blocks and of a head that is not tied to the embedding; {MERGE}"
            )
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    for target, (size, columns) in targets.items():
        rank = settings.rank_of(prefix[len(PREFIX) :] + target)
        expected[f"{prefix}{target}.lora_A.weight"] = (rank, columns), FLOATING
        expected[f"{prefix}{target}.lora_B.weight"] = (size, rank), FLOATING
    if language_head:
        rank, size = settings.rank_of(language_head), config.vocab_size
        expected[_pair_name(language_head, "A")] = (rank, config.hidden_size), FLOATING
        expected[_pair_name(language_head, "B")] = (size, rank), FLOATING
        if (saved := f"{PREFIX}{language_head}.base_layer.weight") in checkpoint:
            expected[saved] = (size, config.hidden_size), FLOATING
    shapes = {"weight": (_head_size(head, config), config.hidden_size), "bias": (_head_size(head, config),)}
    for name in _head_names(settings, head):
        expected[PREFIX + name] = shapes[name.rpartition(".")[2]], FLOATING
    for name in checkpoint.names():  # a class leaves the heads of others alone
        module = name.removeprefix(PREFIX).partition(".")[0]
        if module in HEADS and module != head and module in settings.heads:
            expected[name] = checkpoint.info(name).shape, FLOATING
    checkpoint.check(expected, f"{checkpoint.files[0]}", f"{ADAPTER_CONFIG} and the model")


def _pair_name(module: str, part: str) -> str:
    return f"{PREFIX}{module}.lora_{part}.weight"


def _head_names(settings: Settings, head: str | None) -> list[str]:
    """The tensors of the model's own head, where the adapter brings them."""
    return [f"{head}.{part}" for part in HEADS[head]] if head in settings.heads and head in HEADS else []


def _head_size(head: str | None, config: GPTNeoXConfig) -> int:
    return 2 if head == "qa_outputs" else config.num_labels


def _own(checkpoint: Checkpoint, name: str) -> Tensor:
    """A copy: what is small need not depend on its file. Raises CheckpointError for values that are not finite."""
    found = checkpoint.tensor(name).clone()
    if not bool(found.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint.files[0]}: {name} holds values that are not finite; train or fetch it again"
        )
    return found
