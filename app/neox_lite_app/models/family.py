"""The checkpoints of the GPT-NeoX architecture that people run: their shapes in one table. Knows no file."""

from __future__ import annotations

from typing import NamedTuple

from neox_lite import GPTNeoXConfig


class Member(NamedTuple):
    """A checkpoint. rotary: share of each head that is rotated; the inner size is four times the hidden one.

    license: as its model card names it; what the card says counts.
    """

    id: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    context: int = 2048
    rotary: float = 0.25
    parallel: bool = True
    tied: bool = False
    license: str = "apache-2.0"

    @property
    def name(self) -> str:
        return self.id.rpartition("/")[2]

    def config(self) -> GPTNeoXConfig:
        return GPTNeoXConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
            rotary_pct=self.rotary,
            use_parallel_residual=self.parallel,
            tie_word_embeddings=self.tied,
        )


FAMILY = (
    Member("EleutherAI/pythia-70m", 6, 512, 8, 50304),
    Member("EleutherAI/pythia-160m", 12, 768, 12, 50304),
    Member("EleutherAI/pythia-410m", 24, 1024, 16, 50304),
    Member("EleutherAI/pythia-1b", 16, 2048, 8, 50304),
    Member("EleutherAI/pythia-1.4b", 24, 2048, 16, 50304),
    Member("EleutherAI/pythia-2.8b", 32, 2560, 32, 50304),
    Member("EleutherAI/pythia-6.9b", 32, 4096, 32, 50432),
    Member("EleutherAI/pythia-12b", 36, 5120, 40, 50688),
    Member("databricks/dolly-v2-3b", 32, 2560, 32, 50280, license="mit"),
    Member("databricks/dolly-v2-7b", 32, 4096, 32, 50280, license="mit"),
    Member("databricks/dolly-v2-12b", 36, 5120, 40, 50280, license="mit"),
    Member("OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5", 36, 5120, 40, 50288),
    Member("togethercomputer/RedPajama-INCITE-Base-3B-v1", 32, 2560, 32, 50432, rotary=1.0, parallel=False),
    Member("togethercomputer/RedPajama-INCITE-7B-Base", 32, 4096, 32, 50432, rotary=1.0, parallel=False),
    Member("stabilityai/stablelm-base-alpha-3b", 16, 4096, 32, 50688, context=4096, license="cc-by-sa-4.0"),
    Member("stabilityai/stablelm-base-alpha-7b", 16, 6144, 48, 50432, context=4096, license="cc-by-sa-4.0"),
    Member("EleutherAI/polyglot-ko-1.3b", 24, 2048, 16, 30080, rotary=0.5),
    Member("EleutherAI/polyglot-ko-12.8b", 40, 5120, 40, 30080, rotary=0.5),
    Member("line-corporation/japanese-large-lm-3.6b", 30, 3072, 32, 51200, rotary=1.0, parallel=False, tied=True),
    Member("rinna/japanese-gpt-neox-3.6b", 36, 2816, 22, 32000, rotary=1.0, parallel=False, license="mit"),
    Member("cyberagent/open-calm-7b", 32, 4096, 32, 52224, rotary=1.0, parallel=False, license="cc-by-sa-4.0"),
    Member("EleutherAI/gpt-neox-20b", 44, 6144, 64, 50432),
    Member("togethercomputer/GPT-NeoXT-Chat-Base-20B", 44, 6144, 64, 50432),
)
