"""GPTNeoXConfig: reads v4 and v5 keys, refuses what it cannot honour. Knows no tensor and no file but JSON."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import read_json, write_atomically
from .hub import UNFINISHED, Access, fetch_files, holds_adapter, local_folder, no_model
from .units import DTYPES, dtype_name

MAX_LABELS = 1 << 16
MAX_ROTARY_ELEMENTS = 1 << 27  # half a GiB of cosines and sines: a million positions of 128 dimensions

# The two activation functions of the family under the names checkpoints give them: the erf form and the tanh form.
ACTIVATIONS = {"gelu": "erf", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

# Required and optional keys of each rope form that is computed once and never changes cached keys.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    # Up to max_position_embeddings, beyond which no text goes here, it is the default.
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}
ROPE_REFUSED = {"longrope": "it changes keys that are already cached"}

# Keys that would change the computation in a way this architecture does not define: accepted at the "off" value only.
OFF_ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "output_attentions": (False, None),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_window": (None,),
    "layer_types": (None,),
    "qk_layernorm": (False,),
    "logit_scale": (None, 1, 1.0),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
    "mlp_bias": (True,),
    "use_rmsnorm": (False,),
    "alibi": (False,),
    "use_alibi": (False,),
}
# Keys of checkpoints that do not change the computation (bookkeeping, training): preserved and written back.
PRESERVED = {
    "_attn_implementation",
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "attn_implementation",
    "architectures",
    "attention_probs_dropout_prob",
    "custom_pipelines",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "is_decoder",
    "prefix",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "transformers_version",
}
# Settings of generation that old transformers versions wrote into config.json, and the values that change nothing.
GENERATION: dict[str, Any] = {
    "max_length": None,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "remove_invalid_values": False,
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("penalty_alpha", "min_p", "epsilon_cutoff", "eta_cutoff", "decoder_start_token_id")),
}

Check = Callable[[Any], str | None]


def _integer(low: int, high: int = 1 << 63) -> Check:
    def check(v: Any) -> str | None:
        if isinstance(v, int) and not isinstance(v, bool) and low <= v <= high:
            return None
        return f"an integer of at least {low}" + ("" if high == 1 << 63 else f" and at most {high}")

    return check


def _number(low: float, high: float = math.inf, open_low: bool = False) -> Check:
    def check(v: Any) -> str | None:
        ok = isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= sys.float_info.max  # false for NaN
        ok = ok and (v > low if open_low else v >= low) and v <= high
        bound = f"above {low}" if open_low else f"at least {low}"
        return None if ok else f"a number {bound}" + ("" if high == math.inf else f" and at most {high}")

    return check


def _boolean(v: Any) -> str | None:
    return None if isinstance(v, bool) else "true or false"


def _optional(check: Check) -> Check:
    def either(v: Any) -> str | None:
        return None if v is None or (found := check(v)) is None else f"null or {found}"

    return either


def _token_ids(v: Any) -> str | None:
    ids = v if isinstance(v, list) else [v]
    return None if all(_integer(-1)(i) is None for i in ids) else "a token id or a list of token ids"


def _without_minus_one(ids: Any) -> Any:
    """Token ids without -1, which old files write for none."""
    if isinstance(ids, list):
        return [i for i in ids if i != -1] or None
    return None if ids == -1 else ids


def _one_of(*choices: str) -> Check:
    def check(v: Any) -> str | None:
        return None if v in choices else "one of " + ", ".join(choices)

    return check


@dataclass(frozen=True)
class Field:
    default: Any
    check: Check


# Upper bounds keep a hostile file from asking for tables that no machine holds.
# Defaults are those of the architecture's published configuration class: a key that config.json leaves out means this.
FIELDS: dict[str, Field] = {
    "vocab_size": Field(50432, _integer(1, 1 << 24)),
    "hidden_size": Field(6144, _integer(1, 1 << 20)),
    "num_hidden_layers": Field(44, _integer(1, 1 << 12)),
    "num_attention_heads": Field(64, _integer(1, 1 << 16)),
    "intermediate_size": Field(24576, _integer(1, 1 << 22)),
    "hidden_act": Field("gelu", _one_of(*ACTIVATIONS)),
    "max_position_embeddings": Field(2048, _integer(1, 1 << 20)),
    "layer_norm_eps": Field(1e-5, _number(0, open_low=True)),
    "use_parallel_residual": Field(True, _boolean),
    "attention_bias": Field(True, _boolean),
    "tie_word_embeddings": Field(False, _boolean),
    "use_cache": Field(True, _boolean),
    "bos_token_id": Field(0, _optional(_integer(-1))),
    "eos_token_id": Field(2, _optional(_token_ids)),
    "pad_token_id": Field(None, _optional(_integer(-1))),
    "initializer_range": Field(0.02, _number(0)),
    "attention_dropout": Field(0.0, _number(0, 1)),
    "hidden_dropout": Field(0.0, _number(0, 1)),
    "classifier_dropout": Field(0.1, _optional(_number(0, 1))),
    "problem_type": Field(
        None, _optional(_one_of("regression", "single_label_classification", "multi_label_classification"))
    ),
}


# What a forward pass returns where its caller does not say.
RETURNED = {"output_hidden_states": False, "return_dict": True}


class GPTNeoXConfig:
    """The shape of a GPT-NeoX model and how to run it.

    Attributes carry the names of config.json. Rotary settings are kept once, as `rope_parameters` (rope_type,
    rope_theta, partial_rotary_factor and the form's own keys); `rotary_pct`, `rotary_emb_base` and `rope_scaling` are
    views of it.
    Raises ConfigError naming the key for every value that cannot be honoured.
    """

    model_type = "gpt_neox"
    is_encoder_decoder = False

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    layer_norm_eps: float
    use_parallel_residual: bool
    attention_bias: bool
    tie_word_embeddings: bool
    use_cache: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    initializer_range: float
    attention_dropout: float
    hidden_dropout: float
    classifier_dropout: float | None
    problem_type: str | None
    rope_parameters: dict[str, Any]
    dtype: str | None
    output_hidden_states: bool
    return_dict: bool
    id2label: dict[int, str]
    label2id: dict[str, int]
    quantization_config: dict[str, Any] | None

    def __init__(self, **keys: Any) -> None:
        keys = copy.deepcopy(keys)
        where, announced = keys.pop("_where", "GPTNeoXConfig"), keys.pop("_announced", ())
        self.extra: dict[str, Any] = {}
        _refuse(keys, where)
        for name, field in FIELDS.items():
            value = keys.pop(name, field.default)
            if (expected := field.check(value)) is not None:
                raise ConfigError(f"{where}: {name} is {value!r}, expected {expected}")
            setattr(self, name, value)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, _without_minus_one(getattr(self, name)))
        for name, default in RETURNED.items():
            value = keys.pop(name, None)
            if value not in (None, True, False):
                raise ConfigError(f"{where}: {name} is {value!r}, expected true or false")
            setattr(self, name, default if value is None else bool(value))
        self.dtype = _pop_dtype(keys, where)
        self.rope_parameters = _pop_rope(keys, self, where)
        self.id2label, self.label2id = _pop_labels(keys, where)
        self.quantization_config = keys.pop("quantization_config", None)
        if self.quantization_config is not None and not isinstance(self.quantization_config, dict):
            raise ConfigError(f"{where}: quantization_config is {self.quantization_config!r}, expected an object")
        # compressed-tensors writes so of a model that it has made plain again.
        status = (self.quantization_config or {}).get("quantization_status")
        self.was_decompressed = status == "decompressed"
        if self.was_decompressed:
            self.quantization_config = None
        self._check_shape(where)
        self._keep(keys, where, announced)

    def _check_shape(self, where: str) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{where}: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; GPT-NeoX heads all have hidden_size / num_attention_heads elements"
            )
        if self.rotary_dim * self.max_position_embeddings > MAX_ROTARY_ELEMENTS:
            raise ConfigError(
                f"{where}: {self.rotary_dim} rotary dimensions at max_position_embeddings "
                f"{self.max_position_embeddings} make tables of more than {MAX_ROTARY_ELEMENTS} numbers"
            )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise ConfigError(
                f"{where}: rotary share {self.rotary_pct} of head size {self.head_dim} gives {self.rotary_dim} rotary "
                "dimensions, expected an even number of at least 2"
            )

    def _keep(self, keys: dict[str, Any], where: str, announced: Collection[str]) -> None:
        unknown = sorted(k for k in keys if k not in PRESERVED and k not in GENERATION and k not in announced)
        if unknown:
            known = [*FIELDS, "rope_parameters", "rotary_pct", "rotary_emb_base"]
            near = {k: difflib.get_close_matches(k, known, 1, 0.8) for k in unknown}
            hints = "".join(f"; {k!r} resembles {v[0]!r}" for k, v in near.items() if v)
            warnings.warn(
                f"{where}: keys {', '.join(unknown)} are not part of GPT-NeoX and have no effect{hints}", stacklevel=3
            )
        self.extra = keys
        for key, value in keys.items():
            if not hasattr(self, key):
                setattr(self, key, value)

    # Derived sizes ----------------------------------------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How many leading elements of each head are rotated."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def rotary_pct(self) -> float:
        return self.rope_parameters["partial_rotary_factor"]

    @property
    def rotary_emb_base(self) -> float:
        return self.rope_parameters["rope_theta"]

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The v4 form of a non-default rope, or None."""
        if self.rope_parameters["rope_type"] == "default":
            return None
        return {k: v for k, v in self.rope_parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int, bool]]:
        """The linear layers of one layer: name -> (out_features, in_features, whether it has a bias)."""
        hidden, inner, bias = self.hidden_size, self.intermediate_size, self.attention_bias
        return {
            "attention.query_key_value": (3 * hidden, hidden, bias),
            "attention.dense": (hidden, hidden, bias),
            "mlp.dense_h_to_4h": (inner, hidden, True),
            "mlp.dense_4h_to_h": (hidden, inner, True),
        }

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the language model, counted as numbers, whatever stores them."""
        norm = 2 * self.hidden_size
        layer = 2 * norm + sum(out * (columns + bias) for out, columns, bias in self.linear_shapes.values())
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + norm

    @property
    def activation(self) -> str:
        """ "erf" or "tanh": the GELU that `hidden_act` names."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label, self.label2id = _labels(count)

    @property
    def generation_settings(self) -> dict[str, Any]:
        """Settings of generation in config.json, which hold where a folder has no generation_config.json."""
        return {k: v for k, v in self.extra.items() if k in GENERATION and v not in (None, GENERATION[k])}

    # Reading and writing ----------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, keys: dict[str, Any], **overrides: Any) -> GPTNeoXConfig:
        return cls(**_overridden(keys, overrides))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], revision: str | None = None, **overrides: Any
    ) -> GPTNeoXConfig:
        """Read config.json from a folder or hub id; `overrides` replace its keys, but for `hub.Access`'s options."""
        name, access = pretrained_model_name_or_path, Access.take(overrides)
        folder = local_folder(name if isinstance(name, Path) else os.fspath(name), revision)
        folder = folder or fetch_files(os.fspath(name), ["config.json"], revision, access)
        path = folder / "config.json"
        if not path.is_file():
            if (folder / UNFINISHED).exists():
                raise ConfigError(f"{folder}: unfinished; run the command that wrote it again")
            if holds_adapter(folder):
                raise ConfigError(no_model(folder))
            layers = any(folder.glob("layer_00-model_*-model_states.pt"))
            advice = "; copy that of the same model on the hub beside its layer files" if layers else ""
            raise ConfigError(f"{folder}: no config.json; a model folder holds config.json and its weights{advice}")
        return cls(**{**_overridden(read_json(path, ConfigError), overrides), "_where": str(path)})

    def to_dict(self) -> dict[str, Any]:
        """All keys, in both the v4 and the v5 form, ready for config.json."""
        keys: dict[str, Any] = {k: v for k, v in self.extra.items() if not k.startswith("_")}
        nullable = ("bos_token_id", "eos_token_id")  # left out, they would mean 0 and 2
        keys |= {k: v for k in FIELDS if (v := getattr(self, k)) is not None or k in nullable}
        keys |= {
            "model_type": self.model_type,
            "rotary_pct": self.rotary_pct,
            "rotary_emb_base": self.rotary_emb_base,
            "rope_parameters": self.rope_parameters,
        }
        if self.rope_scaling is not None:
            keys["rope_scaling"] = self.rope_scaling
        keys |= {name: value for name, default in RETURNED.items() if (value := getattr(self, name)) != default}
        if self.dtype is not None:
            keys["torch_dtype"] = keys["dtype"] = self.dtype
        if self.id2label != _labels(2)[0]:
            keys["id2label"], keys["label2id"] = self.id2label, self.label2id
        if self.quantization_config is not None:
            keys["quantization_config"] = self.quantization_config
        return copy.deepcopy(keys)

    def to_diff_dict(self) -> dict[str, Any]:
        """The keys whose values are not the default's."""
        usual = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "model_type" or k not in usual or v != usual[k]}

    def update(self, keys: dict[str, Any]) -> None:
        """Replace keys, checked as when reading. Those that decide shapes change nothing in a model that exists."""
        if not isinstance(keys, dict):
            raise ConfigError(f"update: found a {type(keys).__name__}, expected keys and values")
        self.__dict__.update(self.copy(**keys).__dict__)

    def get_text_config(self, *args: Any, **kwargs: Any) -> GPTNeoXConfig:
        """Itself: there is nothing but text here."""
        return self

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json into `folder`, under its final name only when complete."""
        write_atomically(Path(folder) / "config.json", self.to_json_string())

    def copy(self, **overrides: Any) -> GPTNeoXConfig:
        """An independent copy with some keys replaced; rotary keys may be given in either form."""
        return type(self)(**_overridden(self.to_dict(), overrides), _announced=tuple(self.extra))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPTNeoXConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"GPTNeoXConfig {self.to_json_string().strip()}"


def _overridden(keys: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`keys` with some replaced, so that a key's other spelling in `keys` does not outvote the override."""
    keys, v4 = dict(keys), {"rotary_pct", "rotary_emb_base", "rope_scaling"}
    if "rope_parameters" in overrides:
        keys = {k: v for k, v in keys.items() if k not in v4}
    elif (given := v4 & overrides.keys()) and isinstance(rope := keys.pop("rope_parameters", None), dict):
        old = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
        keys |= {name: rope[key] for name, key in old.items() if key in rope}
        if "rope_scaling" not in given:
            keys["rope_scaling"] = {k: v for k, v in rope.items() if k not in old.values()}
    if {"dtype", "torch_dtype"} & overrides.keys():
        keys = {k: v for k, v in keys.items() if k not in ("dtype", "torch_dtype")}
    return {**keys, **overrides}


def _refuse(keys: dict[str, Any], where: str) -> None:
    """Drop or refuse what is not a setting of this architecture."""
    if "auto_map" in keys:
        raise ConfigError(f"{where}: auto_map asks for code from the checkpoint, which is never run; remove the key")
    found = keys.pop("model_type", "gpt_neox")
    if found != "gpt_neox":
        raise ConfigError(f"{where}: model_type is {found!r}, expected 'gpt_neox', the one architecture this runs")
    heads, kv_heads = keys.get("num_attention_heads", 64), keys.pop("num_key_value_heads", None)
    if kv_heads not in (None, heads):
        raise ConfigError(f"{where}: num_key_value_heads is {kv_heads!r}, expected {heads}: no grouped queries here")
    head_dim = keys.pop("head_dim", None)
    fits = head_dim is None or (isinstance(head_dim, int) and isinstance(heads, int))
    if not fits or (head_dim is not None and head_dim * heads != keys.get("hidden_size", 6144)):
        raise ConfigError(f"{where}: head_dim is {head_dim!r}, expected hidden_size / num_attention_heads")
    for key, allowed in OFF_ONLY.items():
        if key in keys and (value := keys.pop(key)) not in allowed:
            raise ConfigError(f"{where}: {key} is {value!r}, which GPT-NeoX does not define; expected {allowed[0]!r}")


def _pop_dtype(keys: dict[str, Any], where: str) -> str | None:
    old, new = keys.pop("torch_dtype", None), keys.pop("dtype", None)
    found = new if new is not None else old
    name = dtype_name(found) if found is not None else None
    if name not in (None, "auto", *DTYPES):
        raise ConfigError(f"{where}: dtype is {found!r}, expected one of {', '.join(DTYPES)}")
    return None if name == "auto" else name


def _pop_rope(keys: dict[str, Any], config: GPTNeoXConfig, where: str) -> dict[str, Any]:
    """v5 `rope_parameters` win over the v4 keys; two forms that contradict each other are refused."""
    new, old = keys.pop("rope_parameters", None) or {}, keys.pop("rope_scaling", None) or {}
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} is {value!r}, expected an object")
    new, old = _named(dict(new), f"{where}: rope_parameters"), _named(dict(old), f"{where}: rope_scaling")
    for key in new.keys() & old.keys():
        if new[key] != old[key]:
            raise ConfigError(f"{where}: rope_parameters.{key} is {new[key]!r} but rope_scaling.{key} is {old[key]!r}")
    pct, base = keys.pop("rotary_pct", None), keys.pop("rotary_emb_base", None)
    if (trained := keys.pop("original_max_position_embeddings", None)) is not None:
        found = {**old, **new}.get("original_max_position_embeddings", trained)
        if found != trained:
            raise ConfigError(
                f"{where}: original_max_position_embeddings is {trained!r} but the rope settings say {found!r}"
            )
        if {**old, **new}.get("rope_type") in ("llama3", "yarn"):
            new["original_max_position_embeddings"] = trained
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0 if base is None else base,
        "partial_rotary_factor": 0.25 if pct is None else pct,
        **old,
        **new,
    }
    rope = _checked_rope(rope, config.max_position_embeddings, where)
    # transformers 4.46 to 4.57 repeat these beside the older keys.
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in keys and keys[key] == rope[key]:
            del keys[key]
    return rope


def _named(rope: dict[str, Any], where: str) -> dict[str, Any]:
    """Rope settings with their form under `rope_type` alone; old files say `type`, and some say both."""
    kinds = {key: kind for key in ("rope_type", "type") if (kind := rope.pop(key, None)) is not None}
    if kinds.get("type", kinds.get("rope_type")) != kinds.get("rope_type", kinds.get("type")):
        raise ConfigError(f"{where}: rope_type is {kinds['rope_type']!r} but type is {kinds['type']!r}; keep one")
    return {**rope, "rope_type": next(iter(kinds.values()))} if kinds else rope


def _checked_rope(rope: dict[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    kind = rope["rope_type"]
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: rope_type is {kind!r}, expected one of {', '.join(ROPE_KEYS)}")
    if kind in ROPE_REFUSED:
        raise ConfigError(f"{where}: rope_type {kind!r} is refused: {ROPE_REFUSED[kind]}; use {', '.join(ROPE_KEYS)}")
    if kind not in ROPE_KEYS:
        raise ConfigError(f"{where}: rope_type is {kind!r}, expected one of {', '.join(ROPE_KEYS)}")
    required, optional = ROPE_KEYS[kind]
    allowed = required | optional | {"rope_type", "rope_theta", "partial_rotary_factor"}
    rope = {k: v for k, v in rope.items() if v is not None}
    if "original_max_position_embeddings" in required:
        rope.setdefault("original_max_position_embeddings", max_positions)
    if missing := required - rope.keys():
        raise ConfigError(f"{where}: rope_type {kind!r} needs {', '.join(sorted(missing))}")
    if unknown := rope.keys() - allowed:
        warnings.warn(f"{where}: rope_type {kind!r} has no use for {', '.join(sorted(unknown))}", stacklevel=5)
        rope = {k: v for k, v in rope.items() if k in allowed}
    checks: dict[str, Check] = {
        "rope_theta": _number(0, open_low=True),
        "partial_rotary_factor": _number(0, 1, open_low=True),
        "factor": _number(1),
        "low_freq_factor": _number(0, open_low=True),
        "high_freq_factor": _number(0, open_low=True),
        "original_max_position_embeddings": _integer(1),
        "attention_factor": _number(0, open_low=True),
        "beta_fast": _number(0, open_low=True),
        "beta_slow": _number(0, open_low=True),
        "mscale": _number(0, open_low=True),
        "mscale_all_dim": _number(0, open_low=True),
        "truncate": _boolean,
    }
    for key, value in rope.items():
        if key in checks and (expected := checks[key](value)) is not None:
            raise ConfigError(f"{where}: rope {key} is {value!r}, expected {expected}")
    if kind == "yarn" and rope["rope_theta"] <= 1:
        raise ConfigError(f"{where}: rope rope_theta is {rope['rope_theta']!r}, expected a number above 1 for yarn")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ConfigError(f"{where}: rope high_freq_factor must be above low_freq_factor {rope['low_freq_factor']}")
    return rope


def _labels(count: int) -> tuple[dict[int, str], dict[str, int]]:
    names = {i: f"LABEL_{i}" for i in range(count)}
    return names, {v: k for k, v in names.items()}


def _pop_labels(keys: dict[str, Any], where: str) -> tuple[dict[int, str], dict[str, int]]:
    names, ids, count = keys.pop("id2label", None), keys.pop("label2id", None), keys.pop("num_labels", None)
    if count is not None and (expected := _integer(1, MAX_LABELS)(count)) is not None:
        raise ConfigError(f"{where}: num_labels is {count!r}, expected {expected}")
    if names is None:
        return _labels(2 if count is None else count)
    try:
        labels = {int(k): str(v) for k, v in names.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: id2label is {names!r}, expected an object from label numbers to names") from error
    try:
        numbers = {str(k): int(v) for k, v in (ids or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: label2id is {ids!r}, expected an object from names to label numbers") from error
    if count is not None and count != len(labels):
        return _labels(count)  # transformers lets num_labels win over a list of names with another length
    return labels, numbers or {v: k for k, v in labels.items()}
