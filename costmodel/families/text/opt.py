"""OPT: layer norms and projections with biases, an ungated feed-forward block, learned positions, a tied head."""

from __future__ import annotations

from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, Layers, divide
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec
from costmodel.models import DecoderSpec

POSITION_OFFSET = 2  # the table of positions starts with two rows that no token uses


class OptText(Foreign):
    """`OPTConfig`."""

    vocab_size: Count = 50272
    hidden_size: Count = 768
    num_hidden_layers: Layers = 12
    ffn_dim: Count = 3072
    max_position_embeddings: Count = 2048
    num_attention_heads: Count = 12
    word_embed_proj_dim: Count | None = None
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model."""
        self._check(source)
        return DecoderSpec(
            width=self.hidden_size,
            vocabulary=self.vocab_size,
            runs=(LayerRun(self.num_hidden_layers, self.layer()),),
            norm="layer",
            tied_head=self.tie_word_embeddings if tied is None else tied,
            max_positions=self.max_position_embeddings,
            extra_parameters=(self.max_position_embeddings + POSITION_OFFSET) * self.hidden_size,
        )

    def layer(self) -> LayerSpec:
        """Return one layer."""
        heads, bias = self.num_attention_heads, self.enable_bias
        head_dim = divide(self.hidden_size, heads, "hidden_size by heads", "config")
        mixer = AttentionSpec(heads, heads, head_dim, rotary=False, qkv_bias=bias, out_bias=bias)
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.ffn_dim, gated=False, bias=bias), "layer")

    def _check(self, source: str) -> None:
        """Refuse what OPT-350M and Galactica alone have."""
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            rule = f"must be hidden_size {self.hidden_size}; projections around the layers are not modelled"
            raise Unsupported(f"{source}: word_embed_proj_dim={self.word_embed_proj_dim} {rule}")
        if not self.do_layer_norm_before or not self.layer_norm_elementwise_affine:
            rule = "are not modelled; leave do_layer_norm_before and layer_norm_elementwise_affine true"
            raise Unsupported(f"{source}: norms behind the halves of a layer, or without weights, {rule}")


TEXT_CONFIGS: dict[str, type[OptText]] = {"opt": OptText}
