"""Rows that come and go at random: asynchronous steps give the tokens of synchronous ones. The model is made up.

Its logits depend on every token that the cache holds of a sequence, read through the tables as a kernel would, as late as the
device may; so a page, a length, a staging buffer or an id of another row's shows. tests/test_graphs.py is about kernels.
"""

import math
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from support.often import times
from support.simulated_graphs import SimulatedGraphs

from neox_lite.cache import Batch, PagePool, PrefixCache
from neox_lite.errors import NeoxLiteError
from neox_lite.generation.options import Options
from neox_lite.generation.request import Sequence
from neox_lite.generation.sampling import Sampling, sample_token
from neox_lite.generation.scheduler import Scheduler
from neox_lite.kernels.triton import attention, embed_and_sample, steps
from neox_lite.units import PAGE

VOCABULARY, POSITIONS = 67, 3 * PAGE
PADDING_IDS = torch.tensor([3, 50])


class Device(SimulatedGraphs):
    """Replays a captured step as Python, for there are no launches to compare."""

    def capture(self, step):
        self.captures += 1
        self.run()
        step()

        def replay():
            self.replays += 1
            self._give(step)

        return replay


class ToyRunner:
    """A ModelRunner on a device whose one layer keeps ids as keys."""

    def __init__(self, device, graph):
        self.device, self.graph, self.launched = device, graph, 0
        self.passes = steps.GraphRunner(self._eager, self._run, device, torch.device("cpu"), VOCABULARY, POSITIONS)
        self.frozen = {}  # where the pool lay when a step was captured

    @property
    def graph_reason(self):
        return None if self.graph else "it is off"

    def new_pool(self, pages=0, limit=None):
        return PagePool(1, 1, torch.float64, [torch.device("cpu")], pages, limit)

    def step(self, pool, block_tables, tokens):
        batch = Batch.reserve(pool, block_tables, [len(ids) for ids in tokens])
        ids = torch.tensor([i for ids in tokens for i in ids])
        found = self.passes.run(ids, pool, batch) if self.graph else self._eager(ids, pool, batch)
        batch.commit()
        return found

    def _eager(self, ids, pool, batch):
        self.device.run()
        pool.storage[0][batch.pages, 0, 0, batch.slots, 0] = ids.double()
        held = []
        for i, table in enumerate(batch.block_tables):
            end = batch.starts[i] + batch.offsets[i + 1] - batch.offsets[i]
            held.append(pool.storage[0][table.pages, 0, 0, :, 0].flatten()[:end].tolist())
        return torch.stack([self._logits(ids) for ids in held])

    def launch(self, pool, block_tables, ids, choices, excluded=None, previous=None):
        batch = Batch.reserve(pool, block_tables, [1] * len(ids))
        pending = self.passes.launch(pool, batch, ids, choices, excluded, previous) if self.graph else None
        if pending is not None:
            batch.commit()
            self.launched += 1
        return pending

    def _logits(self, held):
        seed = hash(tuple(held)) % (1 << 31)
        found = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
        found[:: 2 + seed % 5] = -math.inf
        # Some end a row by an error.
        found[seed % VOCABULARY] = 9.0 if seed % 4 else math.inf if seed % 64 == 0 else 0.5
        return found

    def _run(self, pool, inputs):
        """The step as kernels do it: from tables alone."""
        memory = inputs.sequences, inputs.tokens, inputs.pages, inputs.sampling, inputs.sampled, inputs.excluded
        storage = self.frozen.setdefault(inputs, pool.storage[0])
        self.device.addresses |= {t.untyped_storage().data_ptr() for t in (*memory, inputs.logits, storage)}
        rows = [row for row in range(inputs.count) if inputs.sequences[row, attention.COUNT.value]]
        given = inputs.ids.tolist()
        ids = {row: given[row] if given[row] >= 0 else max(0, int(inputs.sampled[-1 - given[row]])) for row in rows}
        for row in rows:
            page, slot = (int(inputs.tokens[row, c.value]) for c in (attention.PAGE_OF, attention.SLOT))
            storage[page, 0, 0, slot, 0] = float(ids[row])
        for row in rows:
            start = int(inputs.sequences[row, attention.START.value])
            assert start < inputs.splits * PAGE
            pages = inputs.pages[row, : start // PAGE + 1].long()
            inputs.logits[row] = self._logits(storage[pages, 0, 0, :, 0].flatten()[: start + 1].tolist())
            inputs.sampled[row] = self._draw(inputs, row, start + 1)

    def _draw(self, inputs, row, position):
        columns = embed_and_sample.SEED, embed_and_sample.STREAM, embed_and_sample.TOP_K
        seed, stream, top_k = (int(inputs.sampling[row, column.value]) for column in columns)
        numbers = inputs.sampling[row].view(torch.float64)[embed_and_sample.TEMPERATURE.value :]
        temperature, rest, least = numbers[:3].tolist()
        sampling = Sampling(temperature > 0, temperature, top_k, 1 - rest, math.exp(least), seed=seed % (1 << 64))
        logits = torch.where(inputs.excluded.bool(), -math.inf, inputs.logits[row])
        try:
            return sample_token(logits, torch.empty(position), stream, sampling, [])
        except NeoxLiteError:
            return -1


def rows_at_random(rng):
    """When each row comes, what it is, and after how many tokens it is called off, if it is."""
    found = []
    for stream in range(rng.choice([2, 4, 9, 70])):
        given = {}
        if rng.random() < 0.7:
            given = {
                "do_sample": True, "seed": rng.choice([0, 2**63, 2**64 - 1, rng.randrange(2**64)]),
                "temperature": rng.choice([1e-3, 0.7, 1.0, 5.0]), "top_k": rng.choice([0, 0, 1, 2, 20, 67, 1000]),
                "top_p": rng.choice([1.0, 1.0, 0.5, 0.9]), "min_p": rng.choice([0.0, 0.0, 0.25, 1.0]),
            }  # fmt: skip
        given |= {"repetition_penalty": 1.3} if rng.random() < 0.1 else {}
        given |= {"eos_token_id": rng.sample(range(VOCABULARY), 12)} if rng.random() < 0.3 else {}
        prompt = rng.choices(range(VOCABULARY), k=rng.choice([1, 2, 20, 126, 127, 128, 250]))
        if found and rng.random() < 0.3:
            prompt = list(rng.choice(found)[1].prompt)
        limit = min(rng.randint(0, 20), POSITIONS - len(prompt))
        row = Sequence(prompt, limit, stream, None, Options.parse(given), rng.choice([None, PADDING_IDS]))
        found.append((rng.randint(0, 12), row, rng.choice([None, None, rng.randint(0, 8)])))
    return found


def run(model, seed):
    """What came of the rows of a seed."""
    rng = random.Random(seed)
    schedulers = []
    for _ in range(rng.choice([1, 1, 2])):  # two calls may share a model
        pool = model.new_pool(rng.choice([0, 1, 3]), rng.choice([None, 3, 7]))
        schedulers.append(Scheduler(model, PrefixCache(pool, rng.choice([0, 2]))))
    arrivals = [(schedulers[i % len(schedulers)], *one) for i, one in enumerate(rows_at_random(rng))]
    passes = 0
    while passes <= 12 or any(scheduler.busy for scheduler in schedulers):
        for scheduler, when, row, _ in arrivals:
            if when == passes:
                scheduler.add(row)
        for scheduler in schedulers:
            for _ in scheduler.step():
                for own, _, row, cancelled in arrivals:
                    if own is scheduler and row.arrival and cancelled is not None and len(row.tokens) >= cancelled:
                        scheduler.cancel(row)
        passes += 1
        assert passes < 3000
    for scheduler in schedulers:  # ended rows gave their pages back
        assert scheduler._pool.pages - scheduler._pool.free_pages == scheduler._prefixes.pages
    return [(row.tokens, row.finish_reason, str(row.error)) for _, _, row, _ in arrivals]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("seed", range(times(20)))
def test_asynchronous_steps_give_the_tokens_of_synchronous_ones(seed, late):
    found = []
    for graph in (True, False):
        with Device(late=late) as device:
            model = ToyRunner(device, graph)
            found.append(run(model, seed))
            assert graph or not model.launched
    for (tokens, reason, error), (expected, other_reason, other_error) in zip(*found, strict=True):
        if "cancelled" in (reason, other_reason):  # the moment differs, the tokens until then do not
            count = min(len(tokens), len(expected))
            assert tokens[:count] == expected[:count]
        else:
            assert reason != "error" or "no id can be chosen" in error
            assert (tokens, reason, error) == (expected, other_reason, other_error)
