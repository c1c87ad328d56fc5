"""Phi-3 and Phi-4: Llama without any biases, its projections fused, all layers sliding where a window is given."""

from __future__ import annotations

from typing import Any

from costmodel.families.files import Count, Window
from costmodel.families.text.llama import LlamaText
from costmodel.layers import FfnSpec, MlpSpec
from costmodel.units import UNBOUNDED


class Phi3Text(LlamaText):
    """`Phi3Config`."""

    vocab_size: Count = 32064
    hidden_size: Count = 3072
    intermediate_size: Count = 8192
    max_position_embeddings: Count = 4096
    sliding_window: Window | None = None

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms: none, whatever `attention_bias` says."""
        del head_dim
        return {}

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        del index
        return MlpSpec(self.intermediate_size, gated=True, bias=False)

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]."""
        return [float(self.sliding_window or UNBOUNDED)] * self.num_hidden_layers


TEXT_CONFIGS: dict[str, type[Phi3Text]] = {"phi3": Phi3Text}
