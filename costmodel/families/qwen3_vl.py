"""Qwen3-VL, dense and with experts: native resolution, a ViT with learned positions, DeepStack mergers.

Besides the last layer, the outputs of `deepstack_visual_indexes` are merged too, by mergers of their own, and added to
the visual tokens behind the first layers of the language model: no further tokens and no further cache. The mergers
count as the adapter, and so do the additions, which are bytes and no FLOPs.

Every two frames of a video are preceded by their time as text ("<0.3 seconds>") and stand between markers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from costmodel.adapters import AdapterSpec, ElementwiseStep, Step, projector
from costmodel.families.files import Count, Json, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.native import (
    LEAST_SHARE,
    WRAPPER_TOKENS,
    MergingTower,
    NativeResolution,
    check_width,
    fit_clip,
    read_rule,
)
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import DecoderSpec, VisionEncoderSpec
from costmodel.workload import Video

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
TEXT_TYPES = {"qwen3_vl": "qwen3_vl_text", "qwen3_vl_moe": "qwen3_vl_moe_text"}
"""The `model_type` of a text config that names none."""
HUB_PIXELS = (65536, 16777216)
HUB_CLIP_PIXELS = (4096, 25165824)
"""`preprocessor_config.json` and `video_preprocessor_config.json` of the released models: an image, a whole clip."""
FRAME_TOKENS = 768  # `max_video_tokens` of the video processor's class
TIME_TOKENS = 5  # "<", ".", a digit behind the point, " seconds" and ">"; the tokenizer splits numbers into digits
FIRST_TIME = 0.5  # frames before the middle of a pair


class Qwen3Vision(MergingTower):
    """`Qwen3VLVisionConfig`."""

    depth: Layers = 27
    hidden_size: Count = 1152
    intermediate_size: Count = 4304
    num_heads: Count = 16
    patch_size: Count = 16
    out_hidden_size: Count = 3584
    num_position_embeddings: Count = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)

    @property
    def merged_width(self) -> int:
        """Width of the patches that one visual token merges."""
        return self.hidden_size * self.spatial_merge_size**2

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower."""
        width, heads = self.hidden_size, self.num_heads
        head_dim = divide(width, heads, "hidden_size by num_heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, qkv_bias=True, out_bias=True)
        layer = LayerSpec(width, mixer, MlpSpec(self.intermediate_size, gated=False, bias=True), "layer")
        return VisionEncoderSpec(
            width=width,
            runs=(LayerRun(self.depth, layer),),
            patch_width=self.patch_width,
            patch_bias=True,
            positions=self.num_position_embeddings,
        )

    def adapter(self, n_deep: int) -> AdapterSpec:
        """Return the merger, and so many more whose norm runs over the merged patches."""
        widths = (self.merged_width, self.merged_width, self.out_hidden_size)
        norm = ElementwiseStep("norm", 2 * self.merged_width, parameters=norm_parameters("layer", self.hidden_size))
        steps = projector(widths, norm=norm)
        if n_deep:
            deep_norm = n_deep * norm_parameters("layer", self.merged_width)
            norm = ElementwiseStep("deepstack_norm", 2 * self.merged_width, parameters=deep_norm)
            deep: tuple[Step, ...] = projector(widths, norm=norm, prefix="deepstack_")
            deep += (ElementwiseStep("deepstack_add", 3 * self.out_hidden_size),)
            steps += tuple(replace(step, repeats=n_deep) for step in deep)
        return AdapterSpec(steps, outputs=1 + n_deep)


@dataclass(frozen=True, slots=True)
class ClipResolution(NativeResolution):
    """The rule of Qwen3-VL: as Qwen2-VL's for an image, but the limits of a video are those of all frames together."""

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: by rate, within limits, no more than there are."""
        total = video.total_frames
        wanted = int(total / video.fps * (video.sample_fps or self.fps))
        return min(max(wanted, self.min_frames), self.max_frames, total)

    def video_grid(self, n_frames: int, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of each frame of a video [merged patches]."""
        side, least, most = self.unit_side, self.video_min_pixels, self.video_max_pixels
        if self.frame_tokens:
            each = max(min(self.frame_tokens * side**2, most // n_frames), int(least * LEAST_SHARE))
            most = each * n_frames
        return fit_clip(n_frames, width, height, side=side, temporal=self.temporal, least=least, most=most)

    def video_markers(self, slices: int) -> int:
        """Return markers and times of all frame pairs, as they are when frames are taken at the usual rate."""
        seconds = (int((i * self.temporal + FIRST_TIME) / self.fps) for i in range(slices))
        return slices * (WRAPPER_TOKENS + TIME_TOKENS) + sum(len(str(second)) for second in seconds)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Qwen3-VL model from its files."""
    vision = parse(Qwen3Vision, files.config.get("vision_config"), f"{files.source}: vision_config")
    decoder = read_text(files, TEXT_TYPES)
    check_width(vision.out_hidden_size, decoder, files.source)
    n_deep = len(vision.deepstack_visual_indexes)
    outside = [index for index in vision.deepstack_visual_indexes if not 0 <= index < vision.depth]
    if outside or n_deep > decoder.n_layers:
        rule = f"must name layers of the {vision.depth} of the encoder, no more than the language model has"
        raise ValueError(f"{files.source}: vision_config.deepstack_visual_indexes {rule}")
    return ModelParts(decoder, vision.encoder(), vision.adapter(n_deep), read_media(files, vision))


def read_text(files: ModelFiles, text_types: Json) -> DecoderSpec:
    """Return the language model; whether its head is tied, only the outer level of the file says."""
    text = files.config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{files.source}: no text_config; it must hold the decoder")  # noqa: TRY004
    tied = bool(files.config.get("tie_word_embeddings", False))
    text = {"model_type": text_types[files.config["model_type"]], **text}
    return read_decoder(text, f"{files.source}: text_config", tied=tied)


def read_media(files: ModelFiles, vision: Qwen3Vision) -> ClipResolution:
    """Return the rule for pictures, with the limits of the processor files where there are any."""
    return read_rule(
        ClipResolution, files, vision, pixels=HUB_PIXELS, clip_pixels=HUB_CLIP_PIXELS, context_tokens=FRAME_TOKENS
    )
