"""The language models of GLM-4.1V (dense, outputs normalised too) and of GLM-4.5V (experts behind a dense layer)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from costmodel.families.files import Count, Layers
from costmodel.families.text.llama import LlamaText
from costmodel.layers import FfnSpec, LayerSpec, MlpSpec, MoeSpec

N_NORMS = 4  # before and behind attention and feed-forward


class Glm4vText(LlamaText):
    """`Glm4vTextConfig`: queries, keys and values have biases whatever `attention_bias` says."""

    vocab_size: Count = 151552
    intermediate_size: Count = 13696
    num_hidden_layers: Layers = 40
    num_key_value_heads: Count | None = 2
    max_position_embeddings: Count = 32768
    head_dim: None = None  # its class always divides the width by the heads

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        del head_dim
        return {"qkv_bias": True}

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        return [replace(layer, n_norms=N_NORMS) for layer in LlamaText.layers(self)]


class Glm4vMoeText(LlamaText):
    """`Glm4vMoeTextConfig`: the first `first_k_dense_replace` layers are dense."""

    models: ClassVar[frozenset[str]] = frozenset({"n_routed_experts", "num_local_experts", "num_experts"})

    vocab_size: Count = 151424
    intermediate_size: Count = 10944
    num_hidden_layers: Layers = 46
    num_attention_heads: Count = 96
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 65536
    attention_bias: bool = True
    moe_intermediate_size: Count = 1408
    num_experts_per_tok: Count = 8
    n_shared_experts: Count = 1
    n_routed_experts: Count = 128
    first_k_dense_replace: int = Field(default=1, ge=0)

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases or norms."""
        del head_dim
        return {"qkv_bias": self.attention_bias}

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        if index < self.first_k_dense_replace:
            return MlpSpec(self.intermediate_size, gated=True, bias=False)
        shared = self.moe_intermediate_size * self.n_shared_experts
        return MoeSpec(self.n_routed_experts, self.num_experts_per_tok, self.moe_intermediate_size, shared)


TEXT_CONFIGS: dict[str, type[LlamaText]] = {"glm4v_text": Glm4vText, "glm4v_moe_text": Glm4vMoeText}
