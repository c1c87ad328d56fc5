"""The language models of Qwen3.5, dense and with experts: three layers of linear attention to one of full attention.

Linear attention is the gated delta rule; full attention has gates on its outputs. The layers for multi-token prediction
that the checkpoints also hold are not run by `transformers` and not counted.
"""

from __future__ import annotations

from typing import Any, ClassVar

from costmodel.errors import Unsupported, shown
from costmodel.families.files import Count, Layers, divide
from costmodel.families.text.llama import LlamaText
from costmodel.layers import FfnSpec, LayerSpec, MixerSpec, MoeSpec
from costmodel.recurrent import RecurrentSpec

KINDS = ("linear_attention", "full_attention")


class Qwen35Text(LlamaText):
    """`Qwen3_5TextConfig`."""

    vocab_size: Count = 248320
    intermediate_size: Count = 12288
    num_attention_heads: Count = 16
    num_key_value_heads: Count | None = 4
    head_dim: Count | None = 256
    max_position_embeddings: Count = 32768
    linear_conv_kernel_dim: Count = 4
    linear_key_head_dim: Count = 128
    linear_value_head_dim: Count = 128
    linear_num_key_heads: Count = 16
    linear_num_value_heads: Count = 32
    full_attention_interval: Count = 4

    def check_layer_types(self, source: str) -> None:
        """Refuse kinds of layers that are not modelled, and another number of them."""
        foreign = sorted(set(self.kinds()) - set(KINDS))
        if foreign:
            raise Unsupported(f"{source}: layer_types {shown(foreign)} are not modelled; {' and '.join(KINDS)} are")
        if len(self.kinds()) != self.num_hidden_layers:
            found = f"layer_types has {len(self.kinds())} entries"
            raise ValueError(f"{source}: {found} for {self.num_hidden_layers} layers")

    def kinds(self) -> list[str]:
        """Return the kind of every layer: full attention at the end of each interval unless the file lists them."""
        ends = [(i + 1) % self.full_attention_interval == 0 for i in range(self.num_hidden_layers)]
        return self.layer_types or [KINDS[end] for end in ends]

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        mixers: dict[str, MixerSpec] = dict(zip(KINDS, (self.recurrence(), self.attention()), strict=True))
        return [LayerSpec(self.hidden_size, mixers[kind], self.ffn(i), "rms") for i, kind in enumerate(self.kinds())]

    def recurrence(self) -> RecurrentSpec:
        """Return linear attention."""
        keys, values = self.linear_num_key_heads, self.linear_num_value_heads
        divide(values, keys, "linear_num_value_heads by linear_num_key_heads", "config")
        dims = self.linear_key_head_dim, self.linear_value_head_dim
        return RecurrentSpec(keys, values, *dims, kernel=self.linear_conv_kernel_dim)

    def projections(self, head_dim: int) -> dict[str, Any]:
        """Return which projections have biases, gates or norms."""
        biased = self.attention_bias
        return {"qkv_bias": biased, "out_bias": biased, "gated": True, "extra_parameters": 2 * head_dim}


class Qwen35MoeText(Qwen35Text):
    """`Qwen3_5MoeTextConfig`: experts in every layer, and a gated shared expert beside them."""

    models: ClassVar[frozenset[str]] = frozenset({"num_experts"})

    hidden_size: Count = 2048
    num_hidden_layers: Layers = 40
    num_key_value_heads: Count | None = 2
    num_experts: Count = 256
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 512
    shared_expert_intermediate_size: Count = 512

    def ffn(self, index: int) -> FfnSpec:
        """Return the feed-forward block of a layer."""
        del index
        return MoeSpec(
            self.num_experts,
            self.num_experts_per_tok,
            self.moe_intermediate_size,
            shared_hidden=self.shared_expert_intermediate_size,
            shared_gate=True,
        )


TEXT_CONFIGS: dict[str, type[LlamaText]] = {"qwen3_5_text": Qwen35Text, "qwen3_5_moe_text": Qwen35MoeText}
