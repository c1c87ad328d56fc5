"""Qwen2-VL: native resolution, a ViT that attends over the whole picture in every layer, pairs of video frames."""

from __future__ import annotations

from costmodel.adapters import AdapterSpec, ElementwiseStep, projector
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse, text_part
from costmodel.families.native import MergingTower, NativeResolution, check_width, read_rule
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import VisionEncoderSpec

MODEL_TYPES = ("qwen2_vl",)
HUB_PIXELS = (3136, 12845056)
"""`preprocessor_config.json` of the released models; the class defaults differ. Both hold for frames too."""
CONTEXT_TOKENS = 128000  # `max_video_tokens` of the video processor's class


class Qwen2Vision(MergingTower):
    """`Qwen2VLVisionConfig`."""

    depth: Layers = 32
    embed_dim: Count = 1280
    hidden_size: Count = 3584
    mlp_ratio: Count = 4
    num_heads: Count = 16

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower."""
        width, heads = self.embed_dim, self.num_heads
        head_dim = divide(width, heads, "embed_dim by num_heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, qkv_bias=True, out_bias=True)
        layer = LayerSpec(width, mixer, MlpSpec(width * self.mlp_ratio, gated=False, bias=True), "layer")
        return VisionEncoderSpec(width=width, runs=(LayerRun(self.depth, layer),), patch_width=self.patch_width)

    def adapter(self) -> AdapterSpec:
        """Return the merger: a norm over each patch, then two linear layers over the merged ones."""
        merged = self.embed_dim * self.spatial_merge_size**2
        norm = ElementwiseStep("norm", 2 * merged, parameters=norm_parameters("layer", self.embed_dim))
        return AdapterSpec(projector((merged, merged, self.hidden_size), norm=norm))


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Qwen2-VL model from its files; flat and nested layouts load."""
    vision = parse(Qwen2Vision, files.config.get("vision_config"), f"{files.source}: vision_config")
    text, tied = text_part(files.config, "qwen2_vl_text")
    decoder = read_decoder(text, files.source, tied=tied)
    check_width(vision.hidden_size, decoder, files.source, "hidden_size")
    media = read_rule(NativeResolution, files, vision, pixels=HUB_PIXELS, context_tokens=CONTEXT_TOKENS)
    return ModelParts(decoder, vision.encoder(), vision.adapter(), media)
