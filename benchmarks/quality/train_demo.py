"""Train the demo checkpoint: a 4-layer GPT-NeoX with a tokenizer of its own, from one small text file, on a CPU.

    python -m benchmarks.quality.train_demo --text shakespeare.txt --out demo --epochs 32 --threads 1
    python -m benchmarks.quality.train_demo --standard-library --out other --minutes 15 --threads 1

The text is cut at blank lines into 90 % training, 5 % validation and 5 % held out, in that order. The tokenizer and
the weights see the training part only; the validation part chooses which checkpoint is kept; the held-out part is
written to ``heldout.txt`` and scored once, at the end, from the fp16 files as saved. The same ``--seed``, ``--epochs``
and ``--threads`` give the same weights on the same machine; with ``--minutes`` the result depends on its speed.

The second model of formats.py, which is not committed, has seen the .py files at the top of the running Python's standard
library, shuffled with a fixed seed so that training and held-out parts are alike, 3 MB of them.
Needs ``transformers`` (``pip install neox-lite[test]``), for the model to train only.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.common import command_line, write_json

CONTEXT = 512
VOCABULARY = 1500  # tokenizer entries; the model's are padded to 128s
BATCH = 4  # windows of CONTEXT tokens a step
LEARNING_RATE, DROPOUT = 2e-3, 0.15
SPLIT = 0.1  # chance that a merge is undone, falling to 0
LIBRARY_BYTES = 3_000_000
EOT, PAD = "<|endoftext|>", "<|padding|>"
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


def standard_library() -> str:
    """Modules one after another, a blank line between, up to about LIBRARY_BYTES."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    while sum(map(len, texts)) <= LIBRARY_BYTES and len(texts) < len(files):
        texts.append(files[len(texts)].read_text(encoding="utf-8").strip())
    return "\n\n".join(texts) + "\n"


def split_text(text: str) -> tuple[str, str, str]:
    """Training, validation and held-out text: 90 %, 5 % and 5 %, each starting after a blank line."""
    a, b = (text.index("\n\n", int(len(text) * share)) + 2 for share in (0.90, 0.95))
    return text[:a], text[a:b], text[b:]


def train_tokenizer(text: str, size: int, out: Path) -> Tokenizer:
    """A byte-level BPE in the manner of the GPT-NeoX one; its three files are written to ``out``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT, "pad_token": PAD}
    write_json(out / "special_tokens_map.json", special)
    options = {"add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "GPTNeoXTokenizer", **special, **options})
    return tokenizer


class Batches:
    """Random windows of the training tokens, some of whose merges are undone.

    Each merged token is replaced by the two it was made of with probability ``split``, and those likewise in turn.
    That is what BPE-dropout does for a small text (the same words in many spellings), but from our own seed.
    One window in eight starts a speech and has ``<|endoftext|>`` before it, so that the model can start from nothing.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, size: int, seed: int) -> None:
        self.ids = np.array(tokenizer.encode(text).ids)
        self.size, self.rng = size, np.random.default_rng(seed)
        vocab = tokenizer.get_vocab()
        self.parts = np.full((len(vocab), 2), -1)
        for left, right in reversed(json.loads(tokenizer.to_str())["model"]["merges"]):
            self.parts[vocab[left + right]] = vocab[left], vocab[right]
        newline = self.ids == tokenizer.encode("\n").ids[0]
        starts = np.flatnonzero(newline[:-1] & newline[1:]) + 2
        self.starts = starts[starts < len(self.ids) - CONTEXT - 1]

    def split(self, ids: np.ndarray, probability: float) -> np.ndarray:
        fresh = np.full(len(ids), True)
        while fresh.any():
            chosen = fresh & (self.parts[ids, 0] >= 0) & (self.rng.random(len(ids)) < probability)
            at = np.arange(len(ids)) + np.cumsum(chosen) - chosen  # where each token, or its left part, goes
            fresh = np.full(len(ids) + chosen.sum(), False)
            new = np.empty(len(fresh), dtype=ids.dtype)
            new[at] = np.where(chosen, self.parts[ids, 0], ids)
            new[at[chosen] + 1] = self.parts[ids[chosen], 1]
            fresh[at[chosen]] = fresh[at[chosen] + 1] = True
            ids = new
        return ids

    def next(self, probability: float) -> torch.Tensor:
        rows = []
        for _ in range(self.size):
            if self.rng.random() < 0.125:
                start, head = self.rng.choice(self.starts), [0]
            else:
                start, head = self.rng.integers(len(self.ids) - CONTEXT - 1), []
            window = self.split(self.ids[start : start + CONTEXT + 1], probability)
            rows.append(np.concatenate([np.array(head, dtype=window.dtype), window])[: CONTEXT + 1])
        return torch.from_numpy(np.stack(rows))


@torch.inference_mode()
def score(model: GPTNeoXForCausalLM, ids: list[int], window: int, bf16: bool = False) -> float:
    """Nats per scored token over consecutive windows: every token but the first of its window is scored."""
    model.eval()
    nats = count = 0.0
    for chunk in torch.tensor(ids).split(window * 16):
        whole = len(chunk) // window * window
        for rows in (chunk[:whole].view(-1, window), chunk[None, whole:]):
            if rows.numel() and rows.shape[1] > 1:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(rows).logits
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
                nats, count = nats + loss.item() * rows[:, 1:].numel(), count + rows[:, 1:].numel()
    model.train()
    return nats / count


def save(model: GPTNeoXForCausalLM, out: Path) -> None:
    """fp16 weights and a config.json that both older and newer transformers read."""
    tensors = {
        name.replace("lm_head.", "embed_out."): tensor.to(torch.float16).contiguous()  # the hub's name for the head
        for name, tensor in model.state_dict().items()
    }
    (out / "model.safetensors").write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    same += ("max_position_embeddings", "layer_norm_eps", "initializer_range", "use_parallel_residual")
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    config |= {key: getattr(model.config, key) for key in same}
    config |= {"attention_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0, "tie_word_embeddings": False}
    config |= {"use_cache": True, **ends}
    # The first two of these, and torch_dtype, are read by transformers 4; the others by transformers 5.
    config |= {"rotary_pct": 0.25, "rotary_emb_base": 10000, "rope_parameters": ROTARY}
    write_json(out / "config.json", config | {"torch_dtype": "float16", "dtype": "float16"})
    write_json(out / "generation_config.json", ends)


def main() -> None:
    parser = command_line(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="the text, UTF-8")
    source.add_argument("--standard-library", action="store_true", help="Python's own text instead")
    parser.add_argument("--epochs", type=float, default=32.0, help="passes over the training tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after this long, if that comes first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    # 1. The text, the tokenizer and the batches.
    text = standard_library() if args.standard_library else args.text.read_text(encoding="utf-8")
    train_text, valid_text, heldout_text = split_text(text)
    (args.out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    tokenizer = train_tokenizer(train_text, VOCABULARY, args.out)
    valid = tokenizer.encode(valid_text).ids
    batches = Batches(tokenizer, train_text, BATCH, args.seed)

    # 2. The model and its optimizer.
    config = GPTNeoXConfig(
        vocab_size=math.ceil((tokenizer.get_vocab_size() + 8) / 128) * 128,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=CONTEXT,
        rope_parameters=ROTARY,
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "eager"  # on a CPU, the fastest one that has dropout
    model = GPTNeoXForCausalLM(config).train()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == wide]} for wide in (True, False)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    steps = round(args.epochs * len(batches.ids) / (BATCH * CONTEXT))
    warmup, every = min(150, steps // 10), max(1, steps // 25)
    sizes = f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {tokenizer.get_vocab_size()}"
    print(f"{sizes} (model {config.vocab_size}), {len(batches.ids):,} training tokens, {steps} steps", flush=True)

    # 3. Steps; the checkpoint with the least validation loss is kept.
    best, running, began = math.inf, 0.0, time.monotonic()
    step, seen, progress = 0, 0, 0.0
    while progress < 1:
        lr = LEARNING_RATE * min((step + 1) / max(1, warmup), 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = batches.next(SPLIT * (1 - progress))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen, running = step + 1, seen + 1, running + loss.item()
        elapsed = time.monotonic() - began
        progress = max(step / steps, elapsed / (60 * args.minutes))
        if step % every == 0 or progress >= 1:
            valid_loss = score(model, valid, 256, bf16=True)
            if is_best := valid_loss < best:
                best = valid_loss
                save(model, args.out)
            speed, left = step * BATCH * CONTEXT / elapsed, elapsed * max(0, 1 - progress) / progress / 60
            losses = f"train {running / seen:.4f}  valid {valid_loss:.4f}{' saved' if is_best else ''}"
            print(f"step {step}/{steps}  {losses}  {speed:,.0f} tokens/s  ETA {left:.1f} min", flush=True)
            running, seen = 0.0, 0

    # 4. The saved checkpoint, on text that nothing has seen.
    model = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    ids = tokenizer.encode(heldout_text).ids
    nats = score(model, ids, 256)
    loss = (
        f"loss {nats:.4f}, perplexity {math.exp(nats):.3f}, {nats * len(ids) / len(heldout_text):.4f} nats a character"
    )
    print(f"held out: {len(ids):,} tokens, {loss}; trained {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
