"""Cohere's Command R (`cohere`) and Command R7B (`cohere2`): attention and feed-forward beside each other.

Both halves read the output of one layer norm without bias. In `cohere2` three layers of four attend inside a sliding
window and rotate queries and keys; the fourth attends to everything and does not rotate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from costmodel.families.files import Count, Layers, Window
from costmodel.families.text.llama import LlamaText
from costmodel.layers import AttentionSpec, FfnSpec, LayerSpec, MlpSpec
from costmodel.models import DecoderSpec
from costmodel.units import UNBOUNDED


class CohereText(LlamaText):
    """`CohereConfig`."""

    vocab_size: Count = 256000
    hidden_size: Count = 8192
    intermediate_size: Count = 22528
    num_hidden_layers: Layers = 40
    num_attention_heads: Count = 64
    max_position_embeddings: Count = 8192
    tie_word_embeddings: bool = True
    use_qk_norm: bool | None = False

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model."""
        return replace(super().decoder(source, tied=tied), norm="layer_no_bias")

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order: one norm for both halves."""
        ffn = self.ffn(0)
        mixers = [self.attention(window=window) for window in self.windows()]
        return [LayerSpec(self.hidden_size, mixer, ffn, "layer_no_bias", n_norms=1) for mixer in mixers]

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        del index
        return MlpSpec(self.intermediate_size, gated=True, bias=False)

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms: a gain for every number of every head, if at all."""
        heads = self.num_attention_heads + (self.num_key_value_heads or self.num_attention_heads)
        gains = heads * head_dim if self.use_qk_norm else 0
        return {**super().projections(head_dim), "extra_parameters": gains}


class Cohere2Text(CohereText):
    """`Cohere2Config`."""

    sliding_window: Window | None = 4096
    sliding_window_pattern: Count = 4

    def attention(self, *, window: float = UNBOUNDED) -> AttentionSpec:
        """Return the attention of a layer; only where there is a window are queries and keys rotated."""
        return replace(super().attention(window=window), rotary=window != UNBOUNDED)

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms; `use_qk_norm`, left over from `cohere`, is not read."""
        return LlamaText.projections(self, head_dim)

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]: unless the file says otherwise, every fourth has none."""
        window = float(self.sliding_window or UNBOUNDED)
        slides = [kind == "sliding_attention" for kind in self.layer_types or []]
        slides = slides or [bool((i + 1) % self.sliding_window_pattern) for i in range(self.num_hidden_layers)]
        return [window if slide else UNBOUNDED for slide in slides]


TEXT_CONFIGS: dict[str, type[CohereText]] = {"cohere": CohereText, "cohere2": Cohere2Text}
