"""Qwen's mixtures of experts (Qwen2-MoE, Qwen3-MoE), and the language models of Qwen3-VL, dense and with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from costmodel.families.files import Count, Layers, Window
from costmodel.families.text.llama import LlamaText
from costmodel.layers import FfnSpec, MlpSpec, MoeSpec
from costmodel.units import UNBOUNDED


class Qwen3VlText(LlamaText):
    """`Qwen3VLTextConfig`: no biases, a norm over every query and key head, no sliding window."""

    vocab_size: Count = 151936
    intermediate_size: Count = 22016
    num_key_value_heads: Count | None = 32
    head_dim: Count | None = 128
    max_position_embeddings: Count = 128000

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "extra_parameters": 2 * head_dim}


class Qwen3MoeText(LlamaText):
    """`Qwen3MoeConfig`: experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""

    models: ClassVar[frozenset[str]] = frozenset({"num_experts", "num_local_experts"})

    vocab_size: Count = 151936
    hidden_size: Count = 2048
    intermediate_size: Count = 6144
    num_hidden_layers: Layers = 24
    num_key_value_heads: Count | None = 4
    max_position_embeddings: Count = 32768
    use_sliding_window: bool = False
    sliding_window: Window | None = 4096
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None
    num_experts: Count = 128
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 768

    @model_validator(mode="before")
    @classmethod
    def _take_the_name_of_transformers_5(cls, values: object) -> object:
        """Read `num_local_experts`, the name under which transformers 5 saves `num_experts`."""
        if isinstance(values, Mapping) and "num_experts" not in values and "num_local_experts" in values:
            return {**values, "num_experts": values["num_local_experts"]}
        return values

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "extra_parameters": 2 * head_dim}

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]: all layers slide or none does."""
        window = float(self.sliding_window) if self.use_sliding_window and self.sliding_window else UNBOUNDED
        return [window] * self.num_hidden_layers

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        if index in (self.mlp_only_layers or ()) or (index + 1) % self.decoder_sparse_step:
            return MlpSpec(self.intermediate_size, gated=True, bias=False)
        return self.mixture()

    def mixture(self) -> MoeSpec:
        """Return the experts of a layer."""
        return MoeSpec(self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size)


class Qwen3VlMoeText(Qwen3MoeText):
    """`Qwen3VLMoeTextConfig`: no sliding window."""

    intermediate_size: Count = 5632
    num_attention_heads: Count = 16
    num_key_value_heads: Count | None = 16
    max_position_embeddings: Count = 128000
    sliding_window: Window | None = None
    tie_word_embeddings: bool = True
    num_experts: Count = 60
    num_experts_per_tok: Count = 4
    moe_intermediate_size: Count = 1408

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]."""
        return [UNBOUNDED] * self.num_hidden_layers


class Qwen2MoeText(Qwen3MoeText):
    """`Qwen2MoeConfig`: biases on queries, keys and values, and a gated shared expert beside the routed ones."""

    intermediate_size: Count = 5632
    num_attention_heads: Count = 16
    num_key_value_heads: Count | None = 16
    max_window_layers: int = 28
    qkv_bias: bool = True
    num_experts: Count = 60
    num_experts_per_tok: Count = 4
    moe_intermediate_size: Count = 1408
    shared_expert_intermediate_size: Count = 5632

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        del head_dim
        return {"qkv_bias": self.qkv_bias}

    def windows(self) -> list[float]:
        """Return the window of every layer [tokens]: of those below `max_window_layers` every other one slides."""
        window = float(self.sliding_window) if self.use_sliding_window and self.sliding_window else UNBOUNDED
        slides = [kind == "sliding_attention" for kind in self.layer_types or []]
        slides = slides or [i % 2 == 0 and i < self.max_window_layers for i in range(self.num_hidden_layers)]
        return [window if slide else UNBOUNDED for slide in slides]

    def mixture(self) -> MoeSpec:
        """Return the experts of a layer."""
        return MoeSpec(
            self.num_experts,
            self.num_experts_per_tok,
            self.moe_intermediate_size,
            shared_hidden=self.shared_expert_intermediate_size,
            shared_gate=True,
        )


TEXT_CONFIGS: dict[str, type[LlamaText]] = {
    "qwen3_vl_text": Qwen3VlText,
    "qwen3_moe": Qwen3MoeText,
    "qwen3_vl_moe_text": Qwen3VlMoeText,
    "qwen2_moe": Qwen2MoeText,
}
