"""Qwen2-VL: native resolution, a ViT that attends over the whole picture in every layer, pairs of video frames."""

from __future__ import annotations

from costmodel.adapters import AdapterSpec, ElementwiseStep, projector
from costmodel.base import Foreign
from costmodel.families.files import Count, ModelFiles, ModelParts, divide, parse, text_part
from costmodel.families.native import NativeResolution, PixelLimits
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import VisionEncoderSpec

MODEL_TYPES = ("qwen2_vl",)
HUB_MIN_PIXELS = 3136
HUB_MAX_PIXELS = 12845056
"""`preprocessor_config.json` of the released models; the class defaults differ. Both hold for frames too."""
CONTEXT_TOKENS = 128000  # `max_video_tokens` of the video processor's class


class Qwen2Vision(Foreign):
    """`Qwen2VLVisionConfig`."""

    depth: Count = 32
    embed_dim: Count = 1280
    hidden_size: Count = 3584
    mlp_ratio: Count = 4
    num_heads: Count = 16
    in_channels: Count = 3
    patch_size: Count = 14
    spatial_merge_size: Count = 2
    temporal_patch_size: Count = 2

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower."""
        width, heads = self.embed_dim, self.num_heads
        head_dim = divide(width, heads, "embed_dim by num_heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, qkv_bias=True, out_bias=True)
        layer = LayerSpec(width, mixer, MlpSpec(width * self.mlp_ratio, gated=False, bias=True), "layer")
        patch_width = self.in_channels * self.temporal_patch_size * self.patch_size**2
        return VisionEncoderSpec(width=width, runs=(LayerRun(self.depth, layer),), patch_width=patch_width)

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
    if vision.hidden_size != decoder.width:
        rule = f"must equal the language model's hidden_size {decoder.width}"
        raise ValueError(f"{files.source}: vision_config.hidden_size={vision.hidden_size} {rule}")
    return ModelParts(decoder, vision.encoder(), vision.adapter(), _media(files, vision))


def _media(files: ModelFiles, vision: Qwen2Vision) -> NativeResolution:
    image = parse(PixelLimits, files.image, "preprocessor_config.json")
    video = parse(PixelLimits, files.video, "video_preprocessor_config.json")
    least, most = image.limits(HUB_MIN_PIXELS, HUB_MAX_PIXELS)
    video_least, video_most = video.limits(least, most)
    return NativeResolution(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        temporal=vision.temporal_patch_size,
        min_pixels=least,
        max_pixels=most,
        video_min_pixels=video_least,
        video_max_pixels=video_most,
        fps=video.fps,
        min_frames=video.min_frames,
        max_frames=video.max_frames,
        frame_tokens=video.frame_tokens(CONTEXT_TOKENS),
    )
