"""A batch as attention.py reads it. Knows no kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from ...cache import Batch
from ...units import PAGE


class BatchTable:
    """One int32 tensor on the device, cut into tables: sequences, pages, tokens, blocks of queries."""

    def __init__(self, batch: Batch, device: torch.device, block_m: int) -> None:
        """block_m: most tokens of a sequence that one program takes."""
        counts = [last - first for first, last in zip(batch.offsets, batch.offsets[1:], strict=False)]
        self.single = all(count <= 1 for count in counts)
        self.max_pages = max([1, *(-(-(s + n) // PAGE) for s, n in zip(batch.starts, counts, strict=True) if n)])
        sequences = torch.tensor([*zip(batch.starts, batch.offsets, counts, strict=False)], dtype=torch.int32)
        pages = torch.zeros(len(counts), self.max_pages, dtype=torch.int32)
        for row, block_table in zip(pages, batch.block_tables, strict=True):
            used = block_table.pages[: self.max_pages]
            row[: len(used)] = torch.tensor(used, dtype=torch.int32)
        tokens = torch.stack((batch.positions, batch.pages, batch.slots), 1).int()
        starts = [(i, m) for i, count in enumerate(counts) for m in range(0, count, block_m)]
        blocks = torch.tensor(starts, dtype=torch.int32)
        # Each table begins at a multiple of 16 bytes: Triton compiles another kernel where the alignment differs.
        parts = [functional.pad(t.flatten(), (0, -t.numel() % 4)) for t in (sequences, pages, tokens, blocks)]
        on_device = torch.cat(parts).to(device, non_blocking=True)
        self.sequences, self.pages, self.tokens, self.blocks = on_device.split([len(p) for p in parts])
        self.count, self.block_count, self.block_m = len(counts), len(starts), block_m
        self.splits = self.max_pages
