"""A model over several tiers: the same numbers wherever its parts are, on a simulated accelerator that punishes every race."""

import itertools

import pytest
import torch

from neox_lite import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_lite.errors import ArgumentError, CheckpointError
from neox_lite.kernels import reference
from neox_lite.loading import place
from neox_lite.offload import ring
from neox_lite.offload.ring import Image, Ring
from neox_lite.offload.run import Placement
from simulated import OutOfMemory, Race, Simulated

LAYERS = 6
PAGES = 12
TIERS = {
    "gpu": "g" * LAYERS,
    "cpu": "c" * LAYERS,
    "disk": "d" * LAYERS,
    "cpu then gpu": "ccccgg",
    "disk then cpu": "ddcccc",
    "disk then gpu": "dddggg",
    "all three": "ddccgg",
    "gpu first": "ggcccc",
    "in turns": "gcdgcd",
}
NAMES = {"g": "gpu", "c": "cpu", "d": "disk"}


def placement(letters, embedding="cpu", head=None, stream_from=4):
    tiers = tuple(NAMES[letter] for letter in letters)
    head = head or ("gpu" if "gpu" in tiers else "cpu")
    return Placement(tiers, embedding, head, stream_from if "gpu" in {*tiers, embedding, head} else None)


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "sequential"])
def folder(request, tmp_path_factory):
    """A float32 checkpoint whose layers differ."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        vocab_size=96,
        max_position_embeddings=512,
        use_parallel_residual=request.param,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("model")
    GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


def load(folder, kv="fp16"):
    model = GPTNeoXForCausalLM.from_pretrained(folder, kv=kv)
    model.ops = reference
    return model


def placed(folder, where, kv="fp16", **options):
    """The model over tiers, and the device it is on."""
    model, device = GPTNeoXForCausalLM.from_pretrained(folder, kv=kv), Simulated(**options)
    place(model, where, device)
    new_pool = model.new_pool

    def pool_of_tiers(pages=0, limit=None):
        pool = new_pool(PAGES)
        for tensors in (pool.storage, pool.scales):
            for tier, tensor in zip(where.layers, tensors, strict=False):
                if tier == "gpu":
                    device.adopt(tensor)
        return pool

    model.new_pool = pool_of_tiers
    model.runner.ops["cpu"] = reference
    return model, device


def passes(model, seed=0):
    """Logits of a prompt, of single tokens and longer pieces, of several sequences, after a rewind and a fork."""
    draw, pool = torch.Generator().manual_seed(seed), model.new_pool(PAGES)

    def some(count):
        return torch.randint(96, (count,), generator=draw).tolist()

    a, b = pool.new(), pool.new()
    yield model.step(pool, [a], [some(150)])
    yield model.step(pool, [a], [some(1)])
    yield model.step(pool, [b], [some(3)])
    yield model.step(pool, [a, b], [some(1), some(1)])
    yield model.step(pool, [b, a], [some(130), some(2)])
    pool.truncate(a, 100)
    yield model.step(pool, [a], [some(5)])
    c = pool.fork(a)
    yield model.step(pool, [c, a], [some(7), some(1)])
    yield model.step(pool, [c], [some(1)])
    yield model.step(pool, [a, b, c], [some(1), some(30), some(2)])


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("letters", TIERS.values(), ids=TIERS)
def test_logits_do_not_depend_on_where_the_parts_are(folder, letters, kv, eager):
    expected = list(passes(load(folder, kv)))
    model, _ = placed(folder, placement(letters), kv, eager=eager)
    for found, wanted in zip(passes(model), expected, strict=True):
        assert torch.equal(found, wanted)


class Careless(Simulated):
    """Forgets to wait, in one of the ways there are."""

    def __init__(self, forgets, **options):
        super().__init__(**options)
        self._forgets = forgets

    def follow(self, queue, mark):
        if self._forgets != queue:
            super().follow(queue, mark)

    def wait(self, mark):
        if self._forgets != "host":
            super().wait(mark)


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("forgets", ["compute", "copy", "host"])
def test_every_wait_is_needed(folder, monkeypatch, forgets, eager):
    monkeypatch.setattr("test_offload.Simulated", lambda **options: Careless(forgets, **options))
    model, _ = placed(folder, placement("ccccgg"), eager=eager)
    with pytest.raises(Race):
        list(passes(model))
