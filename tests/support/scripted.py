"""A model whose logits a test gives, on a clock of its own, over a real page pool; knows nothing of who steps it."""

import itertools
from types import SimpleNamespace

import torch

from neox_lite.cache import Batch, PagePool


class ScriptedModel:
    """Its logits after a token are logits(number of tokens so far, token).

    A pass takes cost(tokens) seconds of its clock `now`, and raises what fails(number of the pass) gives. passes: how many
    tokens of each sequence every pass took.
    """

    def __init__(self, logits, cost=lambda tokens: 0.0, fails=lambda number: None, limit=None, vocabulary=50):
        self.logits, self.cost, self.fails, self.now, self.passes = logits, cost, fails, 0.0, []
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=10**6)
        self.source = SimpleNamespace(folder=None)
        self.pool = PagePool(1, 1, torch.float32, [torch.device("cpu")], 0, limit)

    def new_pool(self, pages=0, limit=None):
        return self.pool

    def step(self, pool, block_tables, tokens, every=False):
        starts = [s.length for s in block_tables]
        batch = Batch.reserve(pool, block_tables, [len(t) for t in tokens])
        self.passes.append([len(t) for t in tokens])
        if (error := self.fails(len(self.passes))) is not None:
            raise error
        batch.commit()
        self.now += self.cost(sum(map(len, tokens)))
        out = []
        for start, new in zip(starts, tokens, strict=True):
            places = range(len(new)) if every else [len(new) - 1]
            out += [self.logits(start + i + 1, new[i]) for i in places]
        return torch.stack(out)


def certain(token, vocabulary=50):
    """Logits of a model that is sure of a token."""
    logits = torch.zeros(vocabulary)
    logits[token] = 9.0
    return logits


def failing(number):
    """A logits processor that runs out of memory in its call of this number."""
    calls = itertools.count(1)

    def process(ids, logits):
        if next(calls) == number:
            raise MemoryError
        return logits

    return process
