"""Fields that other programs send beside OpenAI's and vLLM's, and which of them are taken. Knows no request.

ST is SillyTavern (text completion: "ooba" or "vllm"), OWUI is Open WebUI.
"""

from __future__ import annotations

from typing import Any

from neox_lite.generation.parameters import NUMBERS

# Anything goes, because nothing here depends on it:
HARMLESS: dict[str, str] = {
    **dict.fromkeys(("store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"), "openai client"),
    **dict.fromkeys(("prompt_cache_retention", "parallel_tool_calls", "verbosity"), "openai client"),
    **dict.fromkeys(("reasoning_effort", "include_reasoning"), "OWUI, ST: there is no separate reasoning here"),
    **dict.fromkeys(("chat_id", "session_id", "id", "keep_alive"), "OWUI"),
    "prediction": "Continue: a hint for speed",
    **dict.fromkeys(("api_type", "api_server", "legacy_api", "cache_prompt", "trim_stop"), "ST: its own settings"),
    **dict.fromkeys(("truncation_length", "num_ctx"), "ST: it has cut the prompt itself"),
    **dict.fromkeys(
        ("add_bos_token", "spaces_between_special_tokens"), "ST: this family's tokenizers have no use for them"
    ),
    **dict.fromkeys(("length_penalty", "early_stopping"), "ST: of samplers below that must be off"),
    **dict.fromkeys(
        ("mirostat_tau", "mirostat_eta", "rep_pen_slope", "repetition_decay"), "ST: of samplers below that must be off"
    ),
    **dict.fromkeys(("dry_base", "dry_allowed_length", "dry_penalty_last_n"), "ST: of samplers below that must be off"),
    **dict.fromkeys(
        ("dry_sequence_breakers", "dynatemp_low", "dynatemp_high"), "ST: of samplers below that must be off"
    ),
    **dict.fromkeys(
        ("dynatemp_range", "dynatemp_exponent", "adaptive_decay"), "ST: of samplers below that must be off"
    ),
    **dict.fromkeys(
        ("smoothing_curve", "xtc_threshold", "negative_prompt", "min_keep"), "ST: of samplers below that must be off"
    ),
    **dict.fromkeys(
        ("temperature_last", "sampler_priority", "sampler_order", "samplers"), "ST: the order here is fixed"
    ),
    **dict.fromkeys(("speculative_ngram", "n_probs"), "ST: for other servers"),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), "ST, vllm: here there is one backend"),
}
# Taken with the value that means "off", for what is not supported otherwise:
OFF_ONLY: dict[str, tuple[Any, ...]] = {
    # openai client, OWUI
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "modalities": (["text"],),
    # ST: samplers
    **dict.fromkeys(("mirostat_mode", "mirostat", "dry_multiplier", "xtc_probability", "smoothing_factor"), (0,)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "top_a", "skew", "nsigma"), (0,)),
    "top_n_sigma": (0,),
    **dict.fromkeys(("num_beams", "guidance_scale", "encoder_repetition_penalty", "tfs", "tfs_z"), (1,)),
    **dict.fromkeys(("use_beam_search", "dynamic_temperature"), (False,)),
    "adaptive_target": (-0.01, 0, -1),
    # ST: penalties look at the whole text; temperature 0 is greedy
    **dict.fromkeys(("rep_pen_range", "repetition_penalty_range", "repeat_last_n"), (0,)),
    "do_sample": (True,),
    # ST: where an answer ends, and what is shown of it; ignore_eos and stop do it
    **dict.fromkeys(("max_tokens_second", "min_length"), (0,)),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    # ST, vllm: logit_bias, guided_json and guided_regex do it
    "custom_token_bans": ("", []),
    **dict.fromkeys(("banned_strings", "guided_choice"), ([],)),
    **dict.fromkeys(("grammar", "grammar_string", "guided_grammar"), ("",)),
    "json_schema": ({},),
}
# ST says the same again under the names of other servers; one that stands alone, or says something else, is not ignored:
REPEATED: dict[str, str] = {
    "ban_eos_token": "ignore_eos",
    **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict"), "max_tokens"),
    "stopping_strings": "stop",
    **{other: parameter.name for parameter in NUMBERS for other in parameter.other_names},
}
