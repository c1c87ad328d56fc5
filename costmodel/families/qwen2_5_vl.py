"""Qwen2.5-VL: native resolution, a ViT that attends inside windows in most layers, pairs of video frames.

The window of a layer is `window_size` pixels, so 8x8 patches; the layers of `fullatt_block_indexes` attend over a
whole image, or over one frame pair of a video. Windows at the right and lower edge are smaller.
"""

from __future__ import annotations

from costmodel.adapters import AdapterSpec, ElementwiseStep, projector
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse, text_part
from costmodel.families.native import MergingTower, NativeResolution, check_width, read_rule
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerSpec, MlpSpec, runs_of
from costmodel.models import VisionEncoderSpec

MODEL_TYPES = ("qwen2_5_vl",)
CONTEXT_TOKENS = 128000  # `max_video_tokens` of the video processor's class


class Qwen25Vision(MergingTower):
    """`Qwen2_5_VLVisionConfig`."""

    depth: Layers = 32
    hidden_size: Count = 3584
    intermediate_size: Count = 3420
    num_heads: Count = 16
    window_size: Count = 112
    out_hidden_size: Count = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def merged_width(self) -> int:
        """Width of the patches that one visual token merges."""
        return self.hidden_size * self.spatial_merge_size**2

    def layer(self, *, full: bool) -> LayerSpec:
        """Return one layer, with attention over the whole item or inside windows."""
        head_dim = divide(self.hidden_size, self.num_heads, "hidden_size by num_heads", "vision_config")
        mixer = AttentionSpec(
            self.num_heads,
            self.num_heads,
            head_dim,
            causal=False,
            grouping="sequence" if full else "window",
            qkv_bias=True,
            out_bias=True,
        )
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.intermediate_size, gated=True, bias=True), "rms")

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower: its layers in order, equal neighbours as one run."""
        runs = runs_of([self.layer(full=index in self.fullatt_block_indexes) for index in range(self.depth)])
        return VisionEncoderSpec(width=self.hidden_size, runs=runs, patch_width=self.patch_width)

    def adapter(self) -> AdapterSpec:
        """Return the merger: a norm over each patch, then two linear layers over the merged ones."""
        widths = (self.merged_width, self.merged_width, self.out_hidden_size)
        norm = ElementwiseStep("norm", 2 * self.merged_width, parameters=self.hidden_size)
        return AdapterSpec(projector(widths, norm=norm))


HUB_PIXELS = (3136, 12845056)
"""`preprocessor_config.json` of the released Qwen2.5-VL models; the class defaults differ."""


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Qwen2.5-VL model from its files; flat and nested layouts load."""
    vision = parse(Qwen25Vision, files.config.get("vision_config"), f"{files.source}: vision_config")
    text, tied = text_part(files.config, "qwen2_5_vl_text")
    decoder = read_decoder(text, files.source, tied=tied)
    check_width(vision.out_hidden_size, decoder, files.source)
    window = max(1, vision.window_size // (vision.patch_size * vision.spatial_merge_size))
    media = read_rule(NativeResolution, files, vision, pixels=HUB_PIXELS, context_tokens=CONTEXT_TOKENS, window=window)
    return ModelParts(decoder, vision.encoder(), vision.adapter(), media)
