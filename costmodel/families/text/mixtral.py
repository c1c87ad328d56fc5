"""Mixtral: Mistral whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from typing import Any, ClassVar

from costmodel.families.files import Count, Window
from costmodel.families.text.llama import LlamaText
from costmodel.layers import FfnSpec, MoeSpec
from costmodel.units import UNBOUNDED


class MixtralText(LlamaText):
    """`MixtralConfig`."""

    models: ClassVar[frozenset[str]] = frozenset({"num_local_experts", "num_experts"})

    intermediate_size: Count = 14336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: Window | None = None
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms: none."""
        del head_dim
        return {}

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        del index
        return MoeSpec(self.num_local_experts, self.num_experts_per_tok, self.intermediate_size)

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]."""
        return [float(self.sliding_window or UNBOUNDED)] * self.num_hidden_layers


TEXT_CONFIGS: dict[str, type[MixtralText]] = {"mixtral": MixtralText}
