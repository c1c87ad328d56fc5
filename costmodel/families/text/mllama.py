"""The decoder of Llama 3.2 Vision: a Llama with layers of cross-attention between its own."""

from __future__ import annotations

from dataclasses import replace

from costmodel.families.files import Count, Layers
from costmodel.families.text.llama import LlamaText
from costmodel.layers import AttentionSpec, CrossAttentionSpec, LayerSpec
from costmodel.models import DecoderSpec

SPECIAL_ROWS = 8  # embedding rows beyond the vocabulary; the head has none of them (MllamaTextModel)
GATES = 2  # one a cross-attention layer behind attention, one behind the feed-forward block


class MllamaText(LlamaText):
    """`MllamaTextConfig`."""

    vocab_size: Count = 128256
    intermediate_size: Count = 14336
    num_hidden_layers: Layers = 40
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    cross_attention_layers: tuple[int, ...] | None = (3, 8, 13, 18, 23, 28, 33, 38)

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model; its head is never tied, whatever the file says."""
        del tied
        spec = super().decoder(source, tied=False)
        return replace(spec, extra_parameters=SPECIAL_ROWS * self.hidden_size)

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        crossed = self.cross_attention_layers
        indexes = frozenset(MllamaText.model_fields["cross_attention_layers"].default if crossed is None else crossed)
        own = self.attention()
        layers = [LayerSpec(self.hidden_size, own, self.ffn(i), "rms") for i in range(self.num_hidden_layers)]
        cross = replace(layers[0], mixer=_cross(own), extra_parameters=GATES)
        return [cross if i in indexes else layer for i, layer in enumerate(layers)]


def _cross(own: AttentionSpec) -> CrossAttentionSpec:
    """Return cross-attention of the same heads, with a norm over every query and key head."""
    return CrossAttentionSpec(own.heads, own.kv_heads, own.head_dim, extra_parameters=2 * own.head_dim)


TEXT_CONFIGS: dict[str, type[MllamaText]] = {"mllama_text_model": MllamaText}
