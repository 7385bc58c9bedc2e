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
import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neox_lite import GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError, NeoxLiteError
from neox_lite_app.evaluation.quality import cut, perplexity_of
from neox_lite_app.terminal import bar, note, read_text
from neox_lite_quant import convert

NEOX = "Black et al. 2022, GPT-NeoX-20B, zero-shot results; quoted, not yet checked against the paper"
MAMBA = "Gu and Dao 2023, Mamba, table of zero-shot evaluations; quoted, not yet checked against the paper"
# No wikitext figure is published for this tokenization and these windows.
PUBLISHED: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-160m": {"lambada_accuracy": 0.330, "lambada_perplexity": 38.10, "source": MAMBA},
    "EleutherAI/pythia-410m": {"lambada_accuracy": 0.514, "lambada_perplexity": 10.84, "source": MAMBA},
    "EleutherAI/pythia-1b": {"lambada_accuracy": 0.561, "lambada_perplexity": 7.92, "source": MAMBA},
    "EleutherAI/pythia-1.4b": {"lambada_accuracy": 0.617, "lambada_perplexity": 6.08, "source": MAMBA},
    "EleutherAI/pythia-2.8b": {"lambada_accuracy": 0.647, "lambada_perplexity": 5.04, "source": MAMBA},
    "EleutherAI/pythia-6.9b": {"lambada_accuracy": 0.671, "lambada_perplexity": 4.45, "source": MAMBA},
    "EleutherAI/gpt-neox-20b": {"lambada_accuracy": 0.720, "lambada_perplexity": 3.657, "source": NEOX},
}
CONTEXT = 2048


def lambada_items(path: Path | None) -> list[tuple[str, str]]:
    """(everything before, the last word with its space) of every text."""
    if path is None:
        texts = [row["text"] for row in _dataset("EleutherAI/lambada_openai", "default")]
    else:
        try:
            texts = [json.loads(line)["text"] for line in read_text(str(path)).splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError):
            raise ArgumentError(f'--lambada {path}: expected a JSON object with "text" on every line') from None
    pairs = [text.strip().rpartition(" ") for text in texts]
    if not pairs or not all(before for before, _, _ in pairs):
        raise ArgumentError("the LAMBADA texts are empty, or one has a single word")
    return [(before, f" {word}") for before, _, word in pairs]


def _dataset(name: str, config: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ArgumentError(f"fetching {name} needs: pip install datasets; or give files: --text, --lambada") from None
    return datasets.load_dataset(name, config, split="test")


def wikitext(path: Path | None) -> str:
    """The test text as it stands in wiki.test.raw."""
    if path is not None:
        return read_text(str(path))
    return "".join(row["text"] for row in _dataset("Salesforce/wikitext", "wikitext-2-raw-v1"))


def score_lambada(
    model: GPTNeoXForCausalLM,
    items: list[tuple[str, str]],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, float]:
    """Accuracy and perplexity of last words."""
    right, total = 0, 0.0
    for done, (before, word) in enumerate(items, 1):
        ids = model.tokenizer(before + word, add_special_tokens=False).input_ids
        start = len(model.tokenizer(before, add_special_tokens=False).input_ids)
        ids, start = (
            ids[-model.config.max_position_embeddings :],
            start - len(ids),
        )  # start: tokens of the word, negative
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1].float().cpu()
        wanted = torch.tensor(ids[start:])
        total -= float(logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
        right += bool((logits.argmax(-1) == wanted).all())
        progress(done, len(items))
    return {"lambada_accuracy": right / len(items), "lambada_perplexity": math.exp(total / len(items))}


def measure(
    name: str, format: str, args: argparse.Namespace, items: list[tuple[str, str]], text: str
) -> dict[str, Any]:
    """One checkpoint in one format."""
    source = name
    if format != "plain":
        folder = args.home / f"{Path(name).name}-{format}"
        if not (folder / "config.json").is_file():
            with bar(f"{name} to {format}") as progress:
                convert(name, folder, format=format, progress=progress)
        source = str(folder)
    model = GPTNeoXForCausalLM.from_pretrained(source, device_map="auto")
    with bar(f"{name} {format}: LAMBADA", "text") as progress:
        found = score_lambada(model, items, progress)
    windows = cut(model, text, min(CONTEXT, model.config.max_position_embeddings))
    with bar(f"{name} {format}: perplexity", "window") as progress:
        found["wikitext2_perplexity"] = perplexity_of(model, windows, progress)
    row = {"model": name, "format": format, "lambada_items": len(items), "context": windows.shape[1], **found}
    del model
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="where quantized folders are kept; without it nothing is run")
    parser.add_argument("--models", default=",".join(PUBLISHED), help="hub ids or folders")
    parser.add_argument("--formats", default="plain,int8,int4")
    parser.add_argument("--items", type=int, help="use the first N LAMBADA texts")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lambada", type=Path)
    parser.add_argument("--out", type=Path, help="also write the JSON there, after every row")
    args = parser.parse_args()
    models, rows = args.models.split(","), []
    published = {name: PUBLISHED[name] for name in models if name in PUBLISHED}

    def keep() -> str:
        result = {
            "run": bool(rows),
            "published": published,
            "measured": rows,
            "torch": torch.__version__ if rows else None,
        }
        text = json.dumps(result, indent=1)
        if args.out:
            args.out.write_text(text + "\n")
        return text

    try:
        if args.home is not None:
            items, text = lambada_items(args.lambada)[: args.items], wikitext(args.text)
            for name in models:
                for format in args.formats.split(","):
                    rows.append(measure(name, format, args, items, text))
                    keep()
                    note(json.dumps(rows[-1]))
        print(keep())
    except NeoxLiteError as error:
        sys.exit(f"published: {error}")


if __name__ == "__main__":
    main()
