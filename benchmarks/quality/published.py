"""LAMBADA and wikitext-2 figures of real checkpoints, plain and quantized, beside the published ones. Needs a network.

    python -m benchmarks.quality.published --home FOLDER [--models ID,ID] [--formats plain,int8,int4] [--items N]
                                           [--text FILE] [--lambada FILE.jsonl] [--out benchmarks/results/published.json]

Checkpoints come from the hub, and quantized folders are kept in --home. Texts come through the `datasets` package, or from
files: --text for perplexity, --lambada with one {"text": ...} a line, whose last word is to be guessed.
LAMBADA is scored as lm-evaluation-harness scores lambada_openai: the last word's tokens after all before it; accuracy counts
the words that greedy decoding would write, perplexity is exp of the mean negative log-likelihood of a word.
Until somebody has run it, the committed JSON holds the published figures alone and says "run": false.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_line, words, write_json
from neox_lite import GPTNeoXForCausalLM, NeoxLiteError
from neox_lite_app.evaluation.quality import cut, perplexity_of
from neox_lite_app.evaluation.scoring import Text, score
from neox_lite_app.terminal import bar, read_text
from neox_lite_quant import convert

NEOX = "Black et al. 2022, GPT-NeoX-20B, zero-shot results; quoted, not yet checked against the paper"
MAMBA = "Gu and Dao 2023, Mamba, table of zero-shot evaluations; quoted, not yet checked against the paper"
FIGURES = {  # LAMBADA accuracy and perplexity; no wikitext figure is published for this tokenization and these windows
    "EleutherAI/pythia-160m": (0.330, 38.10, MAMBA),
    "EleutherAI/pythia-410m": (0.514, 10.84, MAMBA),
    "EleutherAI/pythia-1b": (0.561, 7.92, MAMBA),
    "EleutherAI/pythia-1.4b": (0.617, 6.08, MAMBA),
    "EleutherAI/pythia-2.8b": (0.647, 5.04, MAMBA),
    "EleutherAI/pythia-6.9b": (0.671, 4.45, MAMBA),
    "EleutherAI/gpt-neox-20b": (0.720, 3.657, NEOX),
}
PUBLISHED = {
    name: {"lambada_accuracy": accuracy, "lambada_perplexity": perplexity, "source": source}
    for name, (accuracy, perplexity, source) in FIGURES.items()
}
CONTEXT = 2048


def texts_of(name: str, config: str) -> list[str]:
    import datasets

    return [row["text"] for row in datasets.load_dataset(name, config, split="test")]


def lambada_items(path: Path | None) -> list[tuple[str, str]]:
    """(everything before, the last word with its space) of every text."""
    if path is None:
        texts = texts_of("EleutherAI/lambada_openai", "default")
    else:
        texts = [json.loads(line)["text"] for line in read_text(str(path)).splitlines() if line.strip()]
    pairs = [text.strip().rpartition(" ") for text in texts]
    if not pairs or not all(before for before, _, _ in pairs):
        raise SystemExit("the LAMBADA texts are empty, or one has a single word")
    return [(before, f" {word}") for before, _, word in pairs]


def lambada(model: GPTNeoXForCausalLM, items: list[tuple[str, str]]) -> dict[str, float]:
    """Accuracy and perplexity of last words."""

    def ids(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False).input_ids

    longest = model.config.max_position_embeddings + 1
    texts = [Text(ids(before + word)[-longest:], len(ids(before + word)) - len(ids(before))) for before, word in items]
    scores, _ = score(model, texts)
    mean = sum(one.log_likelihood for one in scores) / len(scores)
    return {
        "lambada_accuracy": sum(one.is_greedy for one in scores) / len(scores),
        "lambada_perplexity": math.exp(-mean),
    }


def measure(
    name: str, format: str, args: argparse.Namespace, items: list[tuple[str, str]], text: str
) -> dict[str, Any]:
    """One checkpoint in one format."""
    source = name
    if format != "plain":
        source = str(args.home / f"{Path(name).name}-{format}")
        if not (Path(source) / "config.json").is_file():
            with bar(f"{name} to {format}") as progress:
                convert(name, source, format=format, progress=progress)
    model = GPTNeoXForCausalLM.from_pretrained(source, device_map="auto")
    windows = cut(model, text, min(CONTEXT, model.config.max_position_embeddings))
    with bar(f"{name} {format}: perplexity", "window") as progress:
        perplexity = perplexity_of(model, windows, progress)
    about = {"model": name, "format": format, "lambada_items": len(items), "context": windows.shape[1]}
    return {**about, **lambada(model, items), "wikitext2_perplexity": perplexity}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--home", type=Path, help="where quantized folders are kept; without it nothing is run")
    parser.add_argument("--models", type=words, default=list(PUBLISHED), help="hub ids or folders")
    parser.add_argument("--formats", type=words, default=["plain", "int8", "int4"])
    parser.add_argument("--items", type=int, help="use the first N LAMBADA texts")
    parser.add_argument("--text", type=Path, help="the test text as it stands in wiki.test.raw")
    parser.add_argument("--lambada", type=Path, help="JSON lines")
    args = parser.parse_args()
    published = {name: PUBLISHED[name] for name in args.models if name in PUBLISHED}
    result: dict[str, Any] = {"run": False, "published": published, "measured": [], "torch": None}
    if args.home is None:
        if args.out:
            write_json(args.out, result)
        return
    items = lambada_items(args.lambada)[: args.items]
    text = read_text(str(args.text)) if args.text else "".join(texts_of("Salesforce/wikitext", "wikitext-2-raw-v1"))
    for name, format in product(args.models, args.formats):
        try:
            row = measure(name, format, args, items, text)
        except NeoxLiteError as error:
            sys.exit(f"{name} {format}: {error}")
        result |= {"run": True, "measured": [*result["measured"], row], "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    main()
