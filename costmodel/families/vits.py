"""Vision towers that several families share: CLIP and SigLIP."""

from __future__ import annotations

from typing import Literal

from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, divide
from costmodel.families.pictures import patches_along
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import VisionEncoderSpec


class PlainVision(Foreign):
    """What the configs of both towers have in common: layers of one kind on squares of one size."""

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    num_channels: Count = 3
    image_size: Count = 224
    patch_size: Count

    def layer(self) -> LayerSpec:
        """Return one layer of the tower."""
        head_dim = divide(self.hidden_size, self.num_attention_heads, "hidden_size by heads", "vision_config")
        heads = self.num_attention_heads
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, rotary=False, qkv_bias=True, out_bias=True)
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.intermediate_size, gated=False, bias=True), "layer")

    def patches(self) -> int:
        """Return the patches of a square of the tower's own size."""
        return patches_along(self.image_size, self.patch_size, "vision_config") ** 2


class ClipVision(PlainVision):
    """`CLIPVisionConfig`."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    patch_size: Count = 32

    def encoder(self, n_used: int) -> VisionEncoderSpec:
        """Return the tower when the output of layer `n_used` is read."""
        layer = self.layer()
        unused = self.num_hidden_layers - n_used
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(LayerRun(n_used, layer),),
            unused_runs=(LayerRun(unused, layer),) if unused else (),
            patch_width=self.num_channels * self.patch_size**2,
            positions=self.patches() + 1,
            class_token=True,
            extra_parameters=2 * norm_parameters("layer", self.hidden_size),
        )


class SiglipVision(PlainVision):
    """`SiglipVisionConfig`: no class token, a biased patch embedding, an attention-pooling head that no family runs."""

    model_type: Literal["siglip_vision_model"] = "siglip_vision_model"
    patch_size: Count = 16
    vision_use_head: bool = True

    def encoder(self, n_used: int | None = None) -> VisionEncoderSpec:
        """Return the tower when the output of layer `n_used` is read (all layers: None)."""
        layer = self.layer()
        used = self.num_hidden_layers if n_used is None else n_used
        unused = self.num_hidden_layers - used
        head = self._head_parameters() if self.vision_use_head else 0
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(LayerRun(used, layer),),
            unused_runs=(LayerRun(unused, layer),) if unused else (),
            patch_width=self.num_channels * self.patch_size**2,
            patch_bias=True,
            positions=self.patches(),
            extra_parameters=norm_parameters("layer", self.hidden_size) + head,
        )

    def _head_parameters(self) -> int:
        """Return the parameters of the pooling head: a probe, one attention, a norm and a feed-forward block."""
        width, hidden = self.hidden_size, self.intermediate_size
        return width + 4 * width * (width + 1) + 2 * width + 2 * width * hidden + hidden + width


def used_layers(index: int, n_layers: int, source: str) -> int:
    """Return how many layers run before the hidden state of this index, of which the first is the embedding.

    Parameters
    ----------
    index : int
        As `transformers` counts hidden states: -1 is the last layer, -2 the one before.
    source : str
        Key to name in a message.
    """
    used = index if index >= 0 else n_layers + 1 + index
    if not 1 <= used <= n_layers:
        raise ValueError(f"{source}={index} must name one of {n_layers} layers")
    return used
