"""Llama and what is built like it: Mistral, Qwen2, Qwen3, InternLM2.

Missing keys take the value that the `transformers` 5.23 class of the same `model_type` gives them, which is what the
published files rely on; a test compares every default with that class.
"""

from __future__ import annotations

from typing import Any, Literal

from costmodel.base import Foreign
from costmodel.errors import Unsupported, shown
from costmodel.families.files import Count, Layers, Window, divide
from costmodel.layers import AttentionSpec, FfnSpec, LayerSpec, MlpSpec, runs_of
from costmodel.models import DecoderSpec
from costmodel.units import UNBOUNDED


class LlamaText(Foreign):
    """`LlamaConfig`."""

    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    layer_types: list[str] | None = None

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model."""
        self.check_layer_types(source)
        return DecoderSpec(
            width=self.hidden_size,
            vocabulary=self.vocab_size,
            runs=runs_of(self.layers()),
            tied_head=self.tie_word_embeddings if tied is None else tied,
            max_positions=self.max_position_embeddings,
        )

    def check_layer_types(self, source: str) -> None:
        """Refuse kinds of layers that are not modelled, and another number of them."""
        kinds = self.layer_types or []
        foreign = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if foreign:
            raise Unsupported(
                f"{source}: layer_types {shown(foreign)} are not modelled; full_attention and sliding_attention are"
            )
        if kinds and len(kinds) != self.num_hidden_layers:
            raise ValueError(f"{source}: layer_types has {len(kinds)} entries for {self.num_hidden_layers} layers")

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        mixers = [self.attention(window=window) for window in self.windows()]
        return [LayerSpec(self.hidden_size, mixer, self.ffn(i), "rms") for i, mixer in enumerate(mixers)]

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        del index
        return MlpSpec(self.intermediate_size, gated=True, bias=self.mlp_bias)

    def attention(self, *, window: float = UNBOUNDED) -> AttentionSpec:
        """Return the attention of a layer."""
        head_dim = self.head_dim or divide(self.hidden_size, self.num_attention_heads, "hidden_size by heads", "config")
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        divide(self.num_attention_heads, kv_heads, "num_attention_heads by num_key_value_heads", "config")
        return AttentionSpec(self.num_attention_heads, kv_heads, head_dim, window=window, **self.projections(head_dim))

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        del head_dim
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias}

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]."""
        return [UNBOUNDED] * self.num_hidden_layers


class MistralText(LlamaText):
    """`MistralConfig`: a sliding window in all layers unless it is null."""

    intermediate_size: Count = 14336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: Window | None = 4096

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]."""
        return [float(self.sliding_window or UNBOUNDED)] * self.num_hidden_layers


class Qwen2Text(LlamaText):
    """`Qwen2Config`: biases on queries, keys and values; later layers may slide."""

    vocab_size: Count = 151936
    intermediate_size: Count = 22016
    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32768
    use_sliding_window: bool = False
    sliding_window: Window | None = 4096
    max_window_layers: int = 28

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        del head_dim
        return {"qkv_bias": True}

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]: full below `max_window_layers`."""
        window = float(self.sliding_window) if self.use_sliding_window and self.sliding_window else UNBOUNDED
        slides = [kind == "sliding_attention" for kind in self.layer_types or []]
        slides = slides or [i >= self.max_window_layers for i in range(self.num_hidden_layers)]
        return [window if slide else UNBOUNDED for slide in slides]


class Qwen25VlText(Qwen2Text):
    """`Qwen2_5_VLTextConfig`, alone or flat in the top level of the file; `Qwen2VLTextConfig` is the same."""

    vocab_size: Count = 152064
    hidden_size: Count = 8192
    intermediate_size: Count = 29568
    num_hidden_layers: Layers = 80
    num_attention_heads: Count = 64
    num_key_value_heads: Count | None = 8
    max_window_layers: int = 80


class Qwen3Text(Qwen2Text):
    """`Qwen3Config`: no biases, a norm over every query and key head."""

    head_dim: Count | None = 128

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "extra_parameters": 2 * head_dim}


class InternLm2Text(LlamaText):
    """`InternLM2Config` of the InternVL repositories: Llama with fused projections."""

    vocab_size: Count = 103168
    num_key_value_heads: Count | None = None
    bias: bool = True

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        del head_dim
        return {"qkv_bias": self.bias, "out_bias": self.bias}


TEXT_CONFIGS: dict[str, type[LlamaText]] = {
    "llama": LlamaText,
    "mistral": MistralText,
    "qwen2": Qwen2Text,
    "qwen2_vl": Qwen25VlText,
    "qwen2_vl_text": Qwen25VlText,
    "qwen2_5_vl": Qwen25VlText,
    "qwen2_5_vl_text": Qwen25VlText,
    "qwen3": Qwen3Text,
    "internlm2": InternLm2Text,
}
