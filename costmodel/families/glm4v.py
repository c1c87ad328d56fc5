"""GLM-4.1V and GLM-4.5V: native resolution, a ViT with rotary and learned positions, a convolution that merges patches.

The limits of a picture are on frames x area, and an image counts as two frames. Every two frames of a video stand
between markers of their own, with the second they were taken at behind; the video has markers around it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from costmodel.adapters import AdapterSpec, ElementwiseStep, LinearStep
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse, text_part
from costmodel.families.native import WRAPPER_TOKENS, MergingTower, NativeResolution, check_width, fit_clip, read_rule
from costmodel.families.pictures import patches_along
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import VisionEncoderSpec
from costmodel.workload import Video

MODEL_TYPES = ("glm4v", "glm4v_moe")
TEXT_TYPES = {"glm4v": "glm4v_text", "glm4v_moe": "glm4v_moe_text"}
"""The `model_type` of a text config that names none."""
HUB_PIXELS = (12544, 9633792)
"""`preprocessor_config.json` of the released models; two frames share them. The class's largest area differs."""
CLIP_PIXELS = (12544, 28 * 28 * 2 * 30000)
"""Of the video processor's class, for all frames together."""
MAX_SECONDS = 300  # `max_duration` of its class: longer clips get no more frames
TIME_TOKENS = 1  # the second behind each frame pair; the tokenizer keeps up to three digits together


class Glm4vVision(MergingTower):
    """`Glm4vVisionConfig`."""

    depth: Layers = 24
    hidden_size: Count = 1536
    attention_bias: bool = False
    num_heads: Count = 12
    image_size: Count = 336
    out_hidden_size: Count = 4096
    intermediate_size: Count = 13696

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower: its feed-forward blocks are as wide as what leaves it."""
        width, heads = self.hidden_size, self.num_heads
        head_dim = divide(width, heads, "hidden_size by num_heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, qkv_bias=self.attention_bias)
        layer = LayerSpec(width, mixer, MlpSpec(self.out_hidden_size, gated=True, bias=False), "rms")
        return VisionEncoderSpec(
            width=width,
            runs=(LayerRun(self.depth, layer),),
            patch_width=self.patch_width,
            patch_bias=True,
            positions=patches_along(self.image_size, self.patch_size, "vision_config") ** 2,
            extra_parameters=2 * norm_parameters("rms", width),
        )

    def adapter(self) -> AdapterSpec:
        """Return the convolution that merges patches, a linear layer, and a gated feed-forward block."""
        width, hidden = self.out_hidden_size, self.intermediate_size
        merged = self.hidden_size * self.spatial_merge_size**2
        return AdapterSpec(
            (
                LinearStep("downsample", merged, width),
                LinearStep("proj", width, width, bias=False),
                ElementwiseStep("norm", 4 * width, parameters=norm_parameters("layer", width)),
                LinearStep("gate_up", width, 2 * hidden, bias=False, split="columns"),
                ElementwiseStep("activation", 3 * hidden),
                LinearStep("down", hidden, width, bias=False, split="rows"),
            )
        )


@dataclass(frozen=True, slots=True)
class SharedLimits(NativeResolution):
    """The rule of GLM-V: limits on frames x area, for images too."""

    def image_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of an image [merged patches]."""
        return self._fit(self.temporal, width, height, self.min_pixels, self.max_pixels)

    def video_grid(self, n_frames: int, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of each frame of a video [merged patches]."""
        return self._fit(n_frames, width, height, self.video_min_pixels, self.video_max_pixels)

    def _fit(self, n_frames: int, width: int, height: int, least: int, most: int) -> tuple[int, int]:
        return fit_clip(n_frames, width, height, side=self.unit_side, temporal=self.temporal, least=least, most=most)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: by rate, evenly spread where the clip is long, and an even number."""
        total, seconds = video.total_frames, video.total_frames / video.fps
        rate = video.sample_fps or self.fps
        most = int(MAX_SECONDS * rate)
        if seconds <= MAX_SECONDS:
            wanted = range(max(1, math.floor(seconds * rate)))
            taken = {min(total - 1, math.ceil(i * video.fps / rate)) for i in wanted}
        elif most >= total:
            taken = set(range(total))
        else:
            taken = {min(total - 1, math.ceil(t * video.fps)) for t in np.linspace(0.0, seconds, most).tolist()}
        return len(taken) + len(taken) % 2

    def video_markers(self, slices: int) -> int:
        """Return the markers around the video and around every frame pair, and the pairs' seconds."""
        return WRAPPER_TOKENS + slices * (WRAPPER_TOKENS + TIME_TOKENS)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a GLM-4.1V or GLM-4.5V model from its files."""
    vision = parse(Glm4vVision, files.config.get("vision_config"), f"{files.source}: vision_config")
    text, tied = text_part(files.config, TEXT_TYPES[files.config["model_type"]])
    decoder = read_decoder(text, f"{files.source}: text_config", tied=tied)
    check_width(vision.out_hidden_size, decoder, files.source)
    media = read_rule(SharedLimits, files, vision, pixels=HUB_PIXELS, clip_pixels=CLIP_PIXELS)
    return ModelParts(decoder, vision.encoder(), vision.adapter(), media)
