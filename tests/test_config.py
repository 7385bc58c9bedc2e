"""config.json: both generations of keys, every published shape, and each trap answered by name."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.refusals import refused

from neox_lite import GPTNeoXConfig
from neox_lite.config import FIELDS
from neox_lite.errors import CheckpointError, ConfigError

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}

# Every rope form with each of its keys somewhere; original_max_position_embeddings differs from the context on purpose.
LENGTH = {"factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LENGTH, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", **LENGTH},
    "yarn-all-keys": {"rope_type": "yarn", **LENGTH, "truncate": False, **YARN_KEYS},
}
MORE = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}  # of rope_parameters, which have no default here


def write(folder: Path, keys: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(keys if isinstance(keys, str) else json.dumps(keys))
    return folder


def quiet(**keys: Any) -> GPTNeoXConfig:
    """A config from keys, or from a folder, that must not cause a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return GPTNeoXConfig.from_pretrained(keys["folder"]) if "folder" in keys else GPTNeoXConfig(**keys)


# Published checkpoints ------------------------------------------------------------------------------------------------

# layers, hidden, heads, rotary share, parallel, vocabulary -> head size, rotary dimensions
PUBLISHED = {
    "gpt-neox-20b": (44, 6144, 64, 0.25, True, 50432, 96, 24),
    "pythia-70m": (6, 512, 8, 0.25, True, 50304, 64, 16),
    "pythia-1b": (16, 2048, 8, 0.25, True, 50304, 256, 64),
    "pythia-2.8b": (32, 2560, 32, 0.25, True, 50304, 80, 20),
    "pythia-6.9b": (32, 4096, 32, 0.25, True, 50432, 128, 32),
    "pythia-12b": (36, 5120, 40, 0.25, True, 50688, 128, 32),
    "dolly-v2-3b": (32, 2560, 32, 0.25, True, 50280, 80, 20),
    "dolly-v2-12b": (36, 5120, 40, 0.25, True, 50280, 128, 32),
    "oasst-sft-pythia-12b": (36, 5120, 40, 0.25, True, 50288, 128, 32),
    "redpajama-incite-3b": (32, 2560, 32, 1.0, False, 50432, 80, 80),
    "redpajama-incite-7b": (32, 4096, 32, 1.0, False, 50432, 128, 128),
    "stablelm-alpha-3b": (16, 4096, 32, 0.25, True, 50688, 128, 32),
    "stablelm-alpha-7b": (16, 6144, 48, 0.25, True, 50432, 128, 32),
    "polyglot-ko-1.3b": (24, 2048, 16, 0.5, True, 30080, 128, 64),
    "polyglot-ko-12.8b": (40, 5120, 40, 0.5, True, 30080, 128, 64),
    "rinna-3.6b": (36, 2816, 22, 1.0, False, 32000, 128, 128),
    "opencalm-small": (12, 768, 12, 1.0, False, 52096, 64, 64),
    "opencalm-7b": (32, 4096, 32, 1.0, False, 52224, 128, 128),
    "line-3.6b": (30, 3072, 32, 1.0, False, 51200, 96, 96),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_the_published_shapes(name: str) -> None:
    layers, hidden, heads, share, parallel, vocab, head_dim, rotary_dim = PUBLISHED[name]
    config = quiet(
        **{"architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
        **{"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02, "layer_norm_eps": 1e-5},
        **{"model_type": "gpt_neox", "torch_dtype": "float16", "transformers_version": "4.28.1"},
        **{"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": heads},
        **{"num_hidden_layers": layers, "rotary_emb_base": 10000, "rotary_pct": share, "vocab_size": vocab},
        hidden_act="gelu_fast" if name == "gpt-neox-20b" else "gelu",
        max_position_embeddings=4096 if "stablelm" in name else 2048,
        tie_word_embeddings=name == "line-3.6b",
        use_cache="dolly" not in name,
        use_parallel_residual=parallel,
    )
    assert (config.head_dim, config.rotary_dim) == (head_dim, rotary_dim)
    assert config.use_parallel_residual is parallel
    assert config.tie_word_embeddings is (name == "line-3.6b")
    assert config.dtype == "float16"
    assert config.activation == ("tanh" if name == "gpt-neox-20b" else "erf")


def test_a_missing_key_means_what_it_means_in_transformers() -> None:
    theirs, ours = transformers.GPTNeoXConfig(), quiet()
    for name in (*FIELDS, "rope_parameters", "num_labels", "id2label"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.dtype is theirs.dtype is None
    assert (ours.num_hidden_layers, ours.head_dim, ours.rotary_dim) == (44, 96, 24)  # the 20B


# v4 and v5 keys -----------------------------------------------------------------------------------------------------------


def test_v4_and_v5_spellings_mean_the_same_and_v5_keys_win() -> None:
    v4 = {"rotary_pct": 0.5, "rotary_emb_base": 25000, "torch_dtype": "bfloat16"}
    rope = {"rope_type": "default", "rope_theta": 25000, "partial_rotary_factor": 0.5}
    v5 = quiet(**SMALL, rope_parameters=rope, dtype="bfloat16")
    assert quiet(**SMALL, **v4) == v5
    assert (v5.rotary_pct, v5.rotary_emb_base, v5.rope_scaling, v5.dtype) == (0.5, 25000, None, "bfloat16")
    other = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    config = quiet(**SMALL, **v4, rope_parameters=other, dtype="float16")
    assert (config.rotary_pct, config.rotary_emb_base, config.dtype) == (1.0, 500.0, "float16")


@pytest.mark.parametrize("form", ROPES)
@pytest.mark.parametrize("keys", [["type"], ["rope_type"], ["rope_type", "type"]], ids="-".join)
def test_rope_scaling_and_rope_parameters_mean_the_same(form: str, keys: list[str]) -> None:
    scaling = {k: v for k, v in ROPES[form].items() if k != "rope_type"} | dict.fromkeys(keys, ROPES[form]["rope_type"])
    v4 = quiet(**SMALL, rope_scaling=scaling, rotary_pct=0.5, rotary_emb_base=500)
    assert v4.rope_parameters == quiet(**SMALL, rope_parameters={**ROPES[form], **MORE}).rope_parameters


def test_original_length_defaults_to_the_context_and_may_stand_outside() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert quiet(**SMALL, rope_scaling=yarn).rope_parameters["original_max_position_embeddings"] == 2048
    outside = quiet(**SMALL, rope_scaling=yarn, original_max_position_embeddings=64)
    assert outside.rope_parameters["original_max_position_embeddings"] == 64


def test_dtype_is_understood_under_both_names_and_as_torch_writes_it() -> None:
    for keys in ({"torch_dtype": "float16"}, {"dtype": "torch.float16"}, {"dtype": torch.float16}):
        assert quiet(**SMALL, **keys).dtype == "float16"
    assert quiet(**SMALL, torch_dtype="auto").dtype is None


# Traps ----------------------------------------------------------------------------------------------------------------


def test_false_is_kept_and_can_be_overridden(tmp_path: Path) -> None:
    folder = write(tmp_path, {**SMALL, "use_cache": False, "attention_bias": False})
    config, changed = quiet(folder=folder), GPTNeoXConfig.from_pretrained(folder, use_cache=True)
    assert (config.use_cache, config.attention_bias, changed.use_cache) == (False, False, True)


def test_overrides_beat_the_file_whichever_spelling_either_uses(tmp_path: Path) -> None:
    rope = {**ROPES["linear"], "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    v5 = write(tmp_path / "v5", {**SMALL, "rope_parameters": rope, "dtype": "float16"})
    v4 = write(tmp_path / "v4", {**SMALL, "rotary_pct": 1.0, "rotary_emb_base": 500, "rope_scaling": ROPES["linear"]})
    yarn = {**ROPES["yarn"], "rope_theta": 9.0, "partial_rotary_factor": 0.25}
    for folder in (v4, v5):
        changed = GPTNeoXConfig.from_pretrained(folder, rotary_pct=0.5)
        assert changed.rope_parameters == {**rope, "partial_rotary_factor": 0.5}
        changed = GPTNeoXConfig.from_pretrained(folder, rope_scaling=None)
        assert (changed.rope_scaling, changed.rotary_emb_base) == (None, 500)
        assert GPTNeoXConfig.from_pretrained(folder, rope_parameters=yarn).rope_parameters == yarn
        assert GPTNeoXConfig.from_pretrained(folder, torch_dtype="bfloat16").dtype == "bfloat16"
    copied = GPTNeoXConfig.from_pretrained(v5).copy(rope_parameters={**ROPES["yarn"], "partial_rotary_factor": 0.25})
    assert copied.rope_parameters["rope_type"] == "yarn"


def test_a_copy_is_independent() -> None:
    config = GPTNeoXConfig(**SMALL, rope_parameters=ROPES["yarn"])
    config.copy().rope_parameters["factor"] = 100.0
    assert config.rope_parameters["factor"] == 4.0


WIDE = {"hidden_size": 4096, "num_attention_heads": 1, "rotary_pct": 1.0, "max_position_embeddings": 1 << 20}
TWICE, FOUR = {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 4.0}
ROPES_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "dynamic"}, "rope_type 'dynamic' needs factor"),
    ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "rope_type 'longrope' is refused"),
    ({"rope_type": "su"}, "rope_type is 'su', expected one of default, linear, dynamic, llama3, yarn"),
    ({"rope_type": "linear"}, "rope_type 'linear' needs factor"),
    ({"rope_type": "linear", "factor": 0.5}, "rope factor is 0.5, expected a number at least 1"),
    ({"rope_type": "linear", "factor": True}, "rope factor is True"),
    ({"rope_type": "llama3", "factor": 8.0}, "rope_type 'llama3' needs high_freq_factor, low_freq_factor"),
    ({**ROPES["llama3"], "high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor"),
    ({**ROPES["yarn"], "rope_theta": 1}, "rope_theta is 1, expected a number above 1 for yarn"),
    ({**ROPES["yarn"], "truncate": 1}, "rope truncate is 1, expected true or false"),
    ({**ROPES["yarn"], "original_max_position_embeddings": 64.5}, "original_max_position_embeddings is 64.5"),
]


TWO_ROPES = {"rope_parameters": TWICE, "rope_scaling": FOUR}
TWO_LENGTHS = {"rope_scaling": ROPES["yarn"], "original_max_position_embeddings": 128}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 3}, "hidden_size 64 is not divisible by num_attention_heads 3"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map asks for code"),
    ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt_neox'"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu', expected one of gelu, gelu_fast"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1, expected 2"),
    ({"head_dim": 16}, "head_dim is 16, expected hidden_size / num_attention_heads"),
    ({"head_dim": "x", "num_attention_heads": None}, "head_dim is 'x'"),
    ({"sliding_window": 4096}, "sliding_window is 4096, which GPT-NeoX does not define"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"output_attentions": True}, "output_attentions is True"),
    ({"return_dict": "no"}, "return_dict is 'no', expected true or false"),
    ({"dtype": "float64"}, "dtype is 'float64', expected one of float32, float16, bfloat16"),
    ({"quantization_config": "int4"}, "quantization_config is 'int4', expected an object"),
    ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
    ({"id2label": ["a", "b"]}, "id2label is"),
    ({"id2label": {"x": "a"}}, "id2label is"),
    ({"id2label": {"0": "a"}, "label2id": {"a": "x"}}, "label2id is"),
    ({"id2label": {"0": "a"}, "label2id": ["a"]}, "label2id is"),
    ({"num_labels": 0}, "num_labels is 0, expected an integer of at least 1"),
    ({"rotary_pct": 0.1}, r"rotary share 0.1 of head size 32 gives 3 rotary dimensions"),
    (WIDE, "4096 rotary dimensions at max_position_embeddings 1048576 make tables"),
    (TWO_ROPES, "rope_parameters.factor is 2.0 but rope_scaling.factor"),
    ({**TWO_ROPES, "rope_parameters": {"rope_type": "default"}}, "is 'default' but rope_scaling.rope_type is"),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4.0}}, "is 'linear' but type is 'yarn'"),
    (TWO_LENGTHS, "is 128 but the rope settings say 64"),
    *(({"rope_parameters": rope}, told) for rope, told in ROPES_REFUSED),
]


@pytest.mark.parametrize(("keys", "told"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(keys: dict[str, Any], told: str) -> None:
    refused(ConfigError, told, GPTNeoXConfig, **{**SMALL, **keys})


def test_the_same_keys_are_accepted_in_silence_where_they_change_nothing() -> None:
    quiet(**SMALL, num_key_value_heads=2, head_dim=32, sliding_window=None, is_encoder_decoder=False)
    quiet(**SMALL, chunk_size_feed_forward=0, pruned_heads={}, output_hidden_states=False, return_dict=True)


WRONG: dict[str, list[Any]] = {
    "hidden_size": [True, "64", 64.0, 0, None],
    "num_hidden_layers": [-1],
    "vocab_size": [[131]],
    "hidden_act": [None, ["gelu"]],
    "layer_norm_eps": [float("nan"), float("inf"), 10**400, 0, "1e-5"],
    "use_parallel_residual": [1, "false"],
    "attention_bias": [None],
    "tie_word_embeddings": [0],
    "eos_token_id": ["0", [0, -5]],
    "bos_token_id": [True],
    "rotary_pct": [0.0, 1.5, True, "0.25", float("nan")],
    "rotary_emb_base": [0, "10000"],
    "rope_scaling": ["linear", {"type": ["linear"]}],
    "rope_parameters": [[1]],
    "num_labels": [1 << 31],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(key: str) -> None:
    names = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta", "rope_scaling": "rope_"}
    for value in WRONG[key]:
        refused(ConfigError, names.get(key, key), GPTNeoXConfig, **{**SMALL, key: value})


def test_folders_and_files_that_hold_no_config_are_refused_by_name(tmp_path: Path) -> None:
    twice = write(tmp_path / "twice", '{"hidden_size": 64, "hidden_size": 128}')
    open_config = GPTNeoXConfig.from_pretrained
    refused(ConfigError, r"config\.json: not valid JSON: key 'hidden_size' appears twice", open_config, twice)
    refused(ConfigError, r"no config\.json", open_config, tmp_path)
    GPTNeoXConfig(**SMALL).save_pretrained(tmp_path)
    told = "is a folder, so revision 'v2' means nothing"
    refused(CheckpointError, told, open_config, tmp_path, revision="v2")
    refused(CheckpointError, "is a file", open_config, tmp_path / "config.json")
    for name in ("/no/such/folder", ""):
        refused(CheckpointError, "no such folder", open_config, name)


def test_unknown_keys_are_warned_about_once_by_name_and_kept(tmp_path: Path) -> None:
    odd = {"favourite_colour": "teal", "use_paralel_residual": False, "extra": 1, "copy": 2}
    with pytest.warns(UserWarning, match="copy, extra, favourite_colour, use_paralel_residual") as caught:
        config = GPTNeoXConfig(**SMALL, **odd)
        config.copy().save_pretrained(tmp_path)  # known by now, so not announced again
    assert "'use_paralel_residual' resembles 'use_parallel_residual'" in str(caught[0].message)
    assert len(caught) == 1
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in odd} == odd


def test_labels_follow_num_labels_and_names() -> None:
    assert quiet(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = quiet(id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    assert (named.num_labels, named.id2label, named.label2id) == (2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1})


# Writing --------------------------------------------------------------------------------------------------------------


def test_writes_both_forms_of_the_rope_keys(tmp_path: Path) -> None:
    rope = {**ROPES["llama3"], "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    GPTNeoXConfig(**SMALL, rope_parameters=rope, dtype="float16").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"] == rope
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 500.0)
    assert written["rope_scaling"] == ROPES["llama3"]
    assert written["dtype"] == written["torch_dtype"] == "float16"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


KEYS = {"use_parallel_residual": False, "eos_token_id": [0, 3], "num_labels": 3, "dtype": "float16"}


@pytest.mark.parametrize("form", ROPES)
def test_reads_back_what_it_wrote(form: str, tmp_path: Path) -> None:
    others = {"attention_bias": False, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    rope = {**ROPES[form], "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    config = GPTNeoXConfig(**{**SMALL, **KEYS, **others}, rope_parameters=rope, hidden_act="gelu_fast")
    config.save_pretrained(tmp_path)
    again = GPTNeoXConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.bos_token_id is again.eos_token_id is None


@pytest.mark.parametrize("form", ROPES)
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_a_config_means_the_same_here_and_in_transformers(writer: str, form: str, tmp_path: Path) -> None:
    kind = GPTNeoXConfig if writer == "ours" else transformers.GPTNeoXConfig
    written = kind(**SMALL, **KEYS, rope_parameters={**ROPES[form], **MORE})
    written.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.GPTNeoXConfig)
    ours = [quiet(folder=tmp_path)] + ([quiet(**written.to_dict())] if writer == "theirs" else [])
    for config in ours:
        for name in (*FIELDS, "rope_parameters", "num_labels"):
            assert getattr(config, name) == getattr(theirs, name) == getattr(written, name), name
        assert (config.num_labels, config.dtype, theirs.dtype) == (3, "float16", torch.float16)
