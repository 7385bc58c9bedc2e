"""Small checkpoints of the family's shapes, with random weights and a tokenizer, as a hub holds them under their real ids."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken

import neox_lite
from neox_lite import GPTNeoXConfig

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SEQUENTIAL = {"use_parallel_residual": False, "rotary_pct": 1.0}
CHAT = ("<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>", "<|prompter|>", "<|assistant|>", "### End", "### Response:")
REPOSITORIES: dict[str, dict[str, Any]] = {
    "EleutherAI/gpt-neox-20b": {"hidden_act": "gelu_fast"},
    "EleutherAI/pythia-70m-deduped": {},
    "EleutherAI/polyglot-ko-1.3b": {"rotary_pct": 0.5},
    "databricks/dolly-v2-3b": {"use_cache": False},
    "togethercomputer/GPT-NeoXT-Chat-Base-20B": {"hidden_size": 128, "hidden_act": "gelu_fast"},
    "togethercomputer/RedPajama-INCITE-Chat-3B-v1": SEQUENTIAL,
    "StabilityAI/stablelm-tuned-alpha-7b": {"max_position_embeddings": 4096},
    "OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5": {},
    "cyberagent/open-calm-small": SEQUENTIAL,
    "rinna/japanese-gpt-neox-3.6b": SEQUENTIAL,
    "line-corporation/japanese-large-lm-3.6b": {**SEQUENTIAL, "tie_word_embeddings": True},
    "h2oai/h2ogpt-oasst1-512-20b": {"hidden_act": "gelu_fast"},
    "someone/neox-classifier": {"id2label": {0: "bad", 1: "fair", 2: "good"}},
    "someone/neox-tagger": {"num_labels": 4},
    "someone/neox-answers": {},
    "someone/llama-model": {},
}
CLASSES = {
    "someone/neox-classifier": "GPTNeoXForSequenceClassification",
    "someone/neox-tagger": "GPTNeoXForTokenClassification",
    "someone/neox-answers": "GPTNeoXForQuestionAnswering",
}


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with the family's special tokens; the number of its ids."""
    words = ["<|endoftext|>", "<|padding|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*words[:2], *CHAT)])
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": words[0], "eos_token": words[0], "unk_token": words[0], "pad_token": words[1]}
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def repository(repo_id: str, folder: Path, seed: int) -> dict[str, bytes]:
    """The files of a small checkpoint of that one's shape, whose every id can come."""
    folder.mkdir(parents=True)
    size = save_tokenizer(folder)
    torch.manual_seed(seed)
    name = CLASSES.get(repo_id, "GPTNeoXForCausalLM")
    config = GPTNeoXConfig(
        **{**SMALL, "vocab_size": size, "eos_token_id": 0, "initializer_range": 0.2, **REPOSITORIES[repo_id]},
        architectures=[name],
    )
    getattr(neox_lite, name)(config).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if repo_id.startswith("rinna/"):
        del files["tokenizer.json"]
        files["spiece.model"] = b"sentencepiece"
    if repo_id.endswith("llama-model"):
        files["config.json"] = json.dumps({**json.loads(files["config.json"]), "model_type": "llama"}).encode()
    return {name: data for name, data in files.items() if not name.startswith("neox_lite_")}
