"""Gemma 2 and 3: four norms a layer, a tied head, and layers that see a sliding window between those that see all."""

from __future__ import annotations

from typing import Any

from costmodel.errors import Unsupported
from costmodel.families.files import Count, Layers, Window
from costmodel.families.text.llama import LlamaText
from costmodel.layers import LayerSpec
from costmodel.models import DecoderSpec
from costmodel.units import UNBOUNDED

N_NORMS = 4  # before and behind attention and the feed-forward block


class Gemma2Text(LlamaText):
    """`Gemma2Config`: every second layer slides, the first one does."""

    vocab_size: Count = 256000
    hidden_size: Count = 2304
    intermediate_size: Count = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Count = 8
    num_key_value_heads: Count | None = 4
    head_dim: Count | None = 256
    max_position_embeddings: Count = 8192
    tie_word_embeddings: bool = True
    sliding_window: Window | None = 4096
    use_bidirectional_attention: bool | None = None
    hidden_act: Any = "gelu_pytorch_tanh"  # the key is `hidden_activation`; published files hold either or both

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model."""
        if self.use_bidirectional_attention:
            raise Unsupported(
                f"{source}: use_bidirectional_attention is not modelled; remove the key for a causal model"
            )
        return super().decoder(source, tied=tied)

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        mixers = [self.attention(window=window) for window in self.windows()]
        return [LayerSpec(self.hidden_size, m, self.ffn(i), "rms", n_norms=N_NORMS) for i, m in enumerate(mixers)]

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]; a query counts as one of its keys."""
        window = float(self.sliding_window or UNBOUNDED)
        slides = [kind == "sliding_attention" for kind in self.layer_types or []]
        slides = slides or [bool((i + 1) % self.pattern()) for i in range(self.num_hidden_layers)]
        return [window if slide else UNBOUNDED for slide in slides]

    def pattern(self) -> int:
        """Return after how many layers one sees all."""
        return 2


class Gemma3Text(Gemma2Text):
    """`Gemma3TextConfig`: five of six layers slide, and there are norms over every query and key head."""

    vocab_size: Count = 262208
    max_position_embeddings: Count = 131072
    sliding_window_pattern: Count = 6

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        return {**super().projections(head_dim), "extra_parameters": 2 * head_dim}

    def pattern(self) -> int:
        """Return after how many layers one sees all."""
        return self.sliding_window_pattern


TEXT_CONFIGS: dict[str, type[Gemma2Text]] = {"gemma2": Gemma2Text, "gemma3_text": Gemma3Text}
