"""Log-likelihoods of the ends of texts. What texts begin with in common is computed once. Knows ids alone: no task, no words.

Texts become a prefix tree; a node is computed after its parent, in cache pages that it forks from it. A pass takes
nodes from as many texts as there is room for, in the order of the tree: the answers of one question go through the model
beside the next questions, without padding, and what a text holds is freed soon. The vocabulary head sees scored rows alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from neox_lite import GPTNeoXForCausalLM
from neox_lite.cache import BlockTable, PagePool
from neox_lite.errors import ArgumentError

from .quality import Head, append

PASS_TOKENS = 512  # of a pass
HEAD_LOGITS = 1 << 23  # held at a time: 32 MB
BLOCK_TOKENS = 1 << 14  # to compute of a block
MIN_SAVED = 16  # tokens: less is computed again, beside all that follows it, without waiting for it


class Text(NamedTuple):
    """Ids, of which the last `scored` are scored, each given all before it; at least one is not."""

    ids: list[int]
    scored: int


class Score(NamedTuple):
    """The sum of natural log-probabilities of a text's scored ids, and whether each of them is the likeliest."""

    log_likelihood: float
    is_greedy: bool


Progress = Callable[[int], object]  # texts scored so far


@dataclass(eq=False)
class Node:
    """ids[start:end] of some texts, after `parent`. scored: (position, text) where the next id of a text is scored."""

    ids: list[int]
    start: int
    end: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)  # that end here
    scored: list[tuple[int, int]] = field(default_factory=list)
    block_table: BlockTable | None = None
    pending_children: int = 0  # that have no block table yet
    number: int = 0  # in the order of the tree


def score(
    model: GPTNeoXForCausalLM, texts: Sequence[Text], progress: Progress | None = None
) -> tuple[list[Score], int]:
    """A score for each text, and how many tokens went through the layers.

    Raises ArgumentError for a text without a scored id or without one before it, longer than the model's positions and
    one, or with an id that the model does not have.
    """
    for text in texts:
        _check(model, text)
    return _Scoring(model, texts, progress).run()


def _check(model: GPTNeoXForCausalLM, text: Text) -> None:
    limit, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not 1 <= text.scored < len(text.ids):
        raise ArgumentError(
            f"a text of {len(text.ids)} tokens has {text.scored} to score, expected 1 or more, but not all"
        )
    if len(text.ids) > limit + 1:
        raise ArgumentError(
            f"a text has {len(text.ids)} tokens, expected at most {limit + 1}: the last is scored, not read"
        )
    if not 0 <= min(text.ids) <= max(text.ids) < vocabulary:
        raise ArgumentError(f"the tokenizer gives id {max(text.ids)}, but the model has {vocabulary} ids")


def blocks(texts: Sequence[Text]) -> list[list[int]]:
    """Indices of texts that begin alike, in blocks of some BLOCK_TOKENS to compute.

    Where a text shares its passes with those of its block alone, its score is the same to the last bit whenever it is computed.
    """
    found: list[list[int]] = []
    before: list[int] = []
    room = 0
    for index in sorted(range(len(texts)), key=lambda i: texts[i].ids):
        ids = texts[index].ids
        if room <= 0:
            found.append([])
            room = BLOCK_TOKENS
        found[-1].append(index)
        room -= len(ids) - _common(before, ids)
        before = ids
    return found


def prefix_tree(texts: Sequence[Text]) -> list[Node]:
    """The nodes of all texts but their last ids, each after its parent; what saves less than MIN_SAVED is not shared."""
    root = Node([], 0, 0, None)
    path, before = [root], root.ids
    for index in sorted(range(len(texts)), key=lambda i: texts[i].ids[:-1]):
        ids = texts[index].ids[:-1]
        common, last = _common(before, ids), None
        while path[-1].end > common:
            last = path.pop()
        if last is not None and path[-1].end < common:
            path.append(_split(last, common))
        if len(ids) > common:
            path.append(Node(ids, common, len(ids), path[-1]))
            path[-2].children.append(path[-1])
        path[-1].texts.append(index)
        before = ids
    found: list[Node] = []
    waiting = root.children[::-1]
    while waiting:
        node = waiting.pop()
        users = len(node.children) + bool(node.texts)
        is_shared = (node.end - node.start) * (users - 1) >= MIN_SAVED
        for child in () if is_shared else node.children:
            child.start, child.parent = node.start, node.parent
        waiting += node.children[::-1]
        if is_shared or node.texts:
            node.number = len(found)
            found.append(node)
        node.children = []
    for node in found:
        if node.parent is root:
            node.parent = None
        elif node.parent is not None:
            node.parent.children.append(node)
            node.parent.pending_children += 1
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _split(node: Node, at: int) -> Node:
    """Split a node at a position; returns the first half, the parent of the second."""
    assert node.parent is not None
    first = Node(node.ids, node.start, at, node.parent, [node])
    node.parent.children[-1] = first  # it was the last: texts are sorted
    node.start, node.parent = at, first
    return first


class _Scoring:
    """Passes over the nodes of a tree."""

    def __init__(self, model: GPTNeoXForCausalLM, texts: Sequence[Text], progress: Progress | None) -> None:
        self.model, self.texts, self.progress = model, texts, progress
        self.pool: PagePool = model.new_pool(limit=model.cache_pages)
        self.sums, self.greedy = [0.0] * len(texts), [True] * len(texts)
        self.left = [text.scored for text in texts]
        self.computed = self.known = 0
        self.ready: list[tuple[int, Node]] = []  # a heap: those that nothing is computed before
        for node in prefix_tree(texts):
            self._mark_scored(node)
            if node.parent is None:
                self.ready.append((node.number, node))

    def run(self) -> tuple[list[Score], int]:
        while self.ready:
            self._run(self._select())
            if self.progress is not None:
                self.progress(self.known)
        return [Score(total, greedy) for total, greedy in zip(self.sums, self.greedy, strict=True)], self.computed

    def _mark_scored(self, node: Node) -> None:
        """Note where texts that end here are scored, in this node and those before it."""
        for index in node.texts:
            position, first = node.end - 1, node.end - self.texts[index].scored
            ancestor: Node | None = node
            while ancestor is not None and position >= first:
                while position >= max(first, ancestor.start):
                    ancestor.scored.append((position, index))
                    position -= 1
                ancestor = ancestor.parent

    def _select(self) -> dict[Node, int]:
        """The nodes of the next pass, and how many ids of each."""
        batch: dict[Node, int] = {}
        room, pages = PASS_TOKENS, self.pool.room
        while self.ready and room:
            node = self.ready[0][1]
            block_table = self._begin(node)
            count = min(room, node.end - block_table.length)
            pages -= self.pool.pages_needed(block_table, count)
            if pages < 0 and batch:
                break
            if pages < 0:
                self._start_over()
                block_table = self._begin(node)
                count = min(room, node.end)
                pages = self.pool.room - self.pool.pages_needed(block_table, count)
            heapq.heappop(self.ready)
            batch[node] = count
            room -= count
        return batch

    def _start_over(self) -> None:
        """Free all pages: what is still to be computed will be from its texts' first id, one text after the other."""
        for _, node in self.ready:
            if node.block_table is not None:
                self.pool.free(node.block_table)
            elif node.parent is not None:
                node.parent.pending_children -= 1
                if not node.parent.pending_children and node.parent.block_table is not None:
                    self.pool.free(node.parent.block_table)
            node.block_table = node.parent = None

    def _begin(self, node: Node) -> BlockTable:
        """A node's block table: the parent's, if nothing else is to follow that, or a fork of it."""
        parent = node.parent
        if node.block_table is None and parent is None:
            node.block_table = self.pool.new()
        elif node.block_table is None:
            assert parent is not None and parent.block_table is not None
            parent.pending_children -= 1
            if parent.pending_children:
                node.block_table = self.pool.fork(parent.block_table)
            else:
                node.block_table, parent.block_table = parent.block_table, None
        assert node.block_table is not None
        return node.block_table

    def _run(self, batch: dict[Node, int]) -> None:
        block_tables = [self._begin(node) for node in batch]
        starts, counts = [block_table.length for block_table in block_tables], list(batch.values())
        ids = [node.ids[start : start + count] for (node, count), start in zip(batch.items(), starts, strict=True)]
        x = append(self.model, self.pool, block_tables, counts, torch.tensor([i for one in ids for i in one]))
        self.computed += len(x)
        self._score(x, list(batch), starts, counts)
        for node, block_table in zip(batch, block_tables, strict=True):
            if block_table.length < node.end:
                heapq.heappush(self.ready, (node.number, node))
                continue
            for child in node.children:
                heapq.heappush(self.ready, (child.number, child))
            if not node.children:
                self.pool.free(block_table)

    @torch.no_grad()
    def _score(self, x: Tensor, nodes: list[Node], starts: list[int], counts: list[int]) -> None:
        """Add up what a pass, x (tokens, hidden), says of its texts."""
        rows: dict[int, list[tuple[int, int]]] = {}  # row of x -> (position, text)
        first = 0
        for node, start, count in zip(nodes, starts, counts, strict=True):
            for position, text in node.scored:
                if start <= position < start + count:
                    rows.setdefault(first + position - start, []).append((position, text))
            node.scored = [one for one in node.scored if one[0] >= start + count]
            first += count
        head, step = Head.of(self.model), max(1, HEAD_LOGITS // self.model.config.vocab_size)
        every = sorted(rows)
        for at in range(0, len(every), step):
            chosen = every[at : at + step]
            logits = head.logits(x, torch.tensor(chosen))
            where = [(i, text, self.texts[text].ids[p + 1]) for i, row in enumerate(chosen) for p, text in rows[row]]
            own = torch.tensor([i for i, _, _ in where], device=logits.device)
            targets = torch.tensor([target for _, _, target in where], device=logits.device)
            found = logits[own, targets] - logits.logsumexp(-1)[own]
            likeliest = logits.argmax(-1)[own] == targets
            for (_, text, _), value, greedy in zip(where, found.tolist(), likeliest.tolist(), strict=True):
                self._add(text, value, greedy)

    def _add(self, text: int, value: float, greedy: bool) -> None:
        self.sums[text] += value
        self.greedy[text] &= greedy
        self.left[text] -= 1
        self.known += not self.left[text]
