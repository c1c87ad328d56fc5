"""DeepSeek-V2 and V3: latent attention, fine-grained experts beside shared ones, dense layers first.

DeepSeek-VL2-tiny has plain attention in its place (`use_mla` false). The correction bias of V3's router is a buffer and
no parameter; the layers for multi-token prediction are behind the last one and not run.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from costmodel.families.files import Count, Layers, divide
from costmodel.families.text.llama import LlamaText
from costmodel.layers import AttentionSpec, FfnSpec, LatentAttentionSpec, LayerSpec, MixerSpec, MlpSpec, MoeSpec
from costmodel.models import DecoderSpec

MayBeZero = Annotated[int, Field(ge=0, le=10**7, strict=True)]


class DeepseekV2Text(LlamaText):
    """`DeepseekV2Config`, and the class of the same name in the DeepSeek repositories (`use_mla`, `moe_layer_freq`)."""

    models: ClassVar[frozenset[str]] = frozenset({"n_routed_experts", "kv_lora_rank"})

    vocab_size: Count = 102400
    head_dim: Count | None = 64  # the rotated width of latent attention; nothing here depends on it
    use_mla: bool = True
    kv_lora_rank: Count | None = 512
    q_lora_rank: Count | None = 1536
    qk_nope_head_dim: MayBeZero = 128
    qk_rope_head_dim: MayBeZero = 64
    v_head_dim: MayBeZero = 128
    n_routed_experts: Count | None = 64
    n_shared_experts: MayBeZero | None = 2
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count = 1407
    first_k_dense_replace: MayBeZero = 0
    moe_layer_freq: Count = 1

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model."""
        self._check(source)
        return super().decoder(source, tied=tied)

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        mixer = self.mixer()
        return [LayerSpec(self.hidden_size, mixer, self.ffn(i), "rms") for i in range(self.num_hidden_layers)]

    def mixer(self) -> MixerSpec:
        """Return the attention of a layer."""
        if not self.is_latent:
            return self._plain_attention()
        rank = self.kv_lora_rank or 0
        biases = (self.q_lora_rank or 0) + rank + self.qk_rope_head_dim + self.hidden_size
        return LatentAttentionSpec(
            heads=self.num_attention_heads,
            q_rank=self.q_lora_rank or 0,
            kv_rank=rank,
            nope_dim=self.qk_nope_head_dim,
            rope_dim=self.qk_rope_head_dim,
            value_dim=self.v_head_dim,
            extra_parameters=biases * self.attention_bias,
        )

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer: dense in the first ones and between those with experts."""
        if not self.has_experts or index < self.first_k_dense_replace or index % self.moe_layer_freq:
            return MlpSpec(self.intermediate_size, gated=True, bias=self.mlp_bias)
        shared = (self.n_shared_experts or 0) * self.moe_intermediate_size
        biases = (2 * shared + self.hidden_size) * self.mlp_bias if shared else 0
        return MoeSpec(
            experts=self.n_routed_experts or 0,
            top_k=self.num_experts_per_tok or 0,
            hidden=self.moe_intermediate_size,
            shared_hidden=shared,
            extra_parameters=biases,
        )

    @property
    def is_latent(self) -> bool:
        """Whether attention is latent."""
        return self.use_mla and self.kv_lora_rank is not None

    @property
    def has_experts(self) -> bool:
        """Whether any layer may have experts."""
        return self.n_routed_experts is not None

    def _plain_attention(self) -> AttentionSpec:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        head_dim = divide(self.hidden_size, heads, "hidden_size by heads", "config")
        divide(heads, kv_heads, "num_attention_heads by num_key_value_heads", "config")
        return AttentionSpec(heads, kv_heads, head_dim, qkv_bias=self.attention_bias, out_bias=self.attention_bias)

    def _check(self, source: str) -> None:
        """Refuse what no such model can have."""
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if self.is_latent and not getattr(self, name):
                raise ValueError(f"{source}: {name}=0 must be positive with latent attention; or set use_mla to false")
        if not self.has_experts or self.first_k_dense_replace >= self.num_hidden_layers:
            return
        experts, top_k = self.n_routed_experts or 0, self.num_experts_per_tok
        if top_k is None or top_k > experts:
            rule = f"must be a number up to n_routed_experts={experts}"
            raise ValueError(f"{source}: num_experts_per_tok={top_k} {rule}")


class DeepseekV3Text(DeepseekV2Text):
    """`DeepseekV3Config`, which Moonlight and Kimi-VL use too."""

    vocab_size: Count = 129280
    hidden_size: Count = 7168
    intermediate_size: Count = 18432
    moe_intermediate_size: Count = 2048
    num_hidden_layers: Layers = 61
    num_attention_heads: Count = 128
    num_key_value_heads: Count | None = 128
    n_shared_experts: MayBeZero | None = 1
    n_routed_experts: Count | None = 256
    num_experts_per_tok: Count | None = 8
    first_k_dense_replace: MayBeZero = 3
    max_position_embeddings: Count = 4096


TEXT_CONFIGS: dict[str, type[DeepseekV2Text]] = {"deepseek_v2": DeepseekV2Text, "deepseek_v3": DeepseekV3Text}
