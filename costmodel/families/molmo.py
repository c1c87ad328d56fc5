"""Molmo: overlapping square crops and the whole picture, CLIP, attention pooling 2x2, a decoder of its own file layout.

The vision side is not in the config file: the repository's code fixes it. Two layers of CLIP are read side by side, the
later one being the last but one, so an engine need not run the last; the repository's code does. Every crop is pooled
whole, and the tokens in its margins, which neighbours see better, are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from costmodel.adapters import AdapterSpec, AttentionStep, ElementwiseStep, LinearStep
from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly, tiles_cost
from costmodel.families.vits import ClipVision
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import DecoderSpec, MediaCost, VisionEncoderSpec

MODEL_TYPES = ("molmo",)
# modeling_molmo.py of the repository (also vLLM's molmo.py): tower, the layers that are read, pooling, extra vocabulary
CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
CLIP_SIDE = 336  # for which it has positions; for another size the code would interpolate them
CLIP_LAYERS = 23
READ_LAYERS = (-2, -9)  # of the outputs of the 23 layers
POOL = 2
POOL_HEADS, POOL_HEAD_DIM = 16, 64
PADDING_VECTORS = 2  # one for patches that are all padding, one for those in part
ADDITIONAL_VOCABULARY = 128
FRAME_TOKENS = 2  # <im_start> … <im_end> around the whole picture, and around the crops


class Molmo(Foreign):
    """The original `config.json`: sizes of the decoder alone."""

    vocab_size: Count = 50304
    embedding_size: Count | None = 50304
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    max_position_embeddings: Count = 2048
    qkv_bias: bool = False
    weight_tying: bool = False
    attention_layer_norm: bool = False
    layer_norm_type: Literal["rms"] = "rms"

    def gate_width(self, source: str) -> int:
        """Return the hidden width of the feed-forward block; the file gives gate and up together."""
        return divide(self.intermediate_size, 2, "intermediate_size by gate and up", source)

    def decoder(self, source: str) -> DecoderSpec:
        """Return the language model."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        head_dim = divide(self.hidden_size, heads, "hidden_size by heads", source)
        divide(heads, kv_heads, "num_attention_heads by num_key_value_heads", source)
        norms = (heads + kv_heads) * head_dim * self.attention_layer_norm
        mixer = AttentionSpec(heads, kv_heads, head_dim, qkv_bias=self.qkv_bias, extra_parameters=norms)
        layer = LayerSpec(self.hidden_size, mixer, MlpSpec(self.gate_width(source), gated=True, bias=False), "rms")
        return DecoderSpec(
            width=self.hidden_size,
            vocabulary=self.embedding_size or self.vocab_size,
            runs=(LayerRun(self.num_hidden_layers, layer),),
            tied_head=self.weight_tying,
            max_positions=self.max_position_embeddings,
            extra_parameters=ADDITIONAL_VOCABULARY * self.hidden_size,
        )

    def adapter(self, source: str) -> AdapterSpec:
        """Return pooling, whose query is the mean of four patches, and a gated block into the decoder's width."""
        width, pooled, hidden = CLIP_LARGE["hidden_size"], POOL_HEADS * POOL_HEAD_DIM, self.gate_width(source)
        both = width * len(READ_LAYERS)
        padding = PADDING_VECTORS * both
        steps = (
            ElementwiseStep("padding", 2 * both, parameters=padding, per_token=0.0, per_patch=1.0),
            ElementwiseStep("mean", (POOL**2 + 1) * both),
            LinearStep("query", both, pooled),
            LinearStep("key", both, pooled, per_token=0.0, per_patch=1.0),
            LinearStep("value", both, pooled, per_token=0.0, per_patch=1.0),
            AttentionStep("pooling", POOL_HEADS, POOL_HEAD_DIM, pairs_per_token=float(POOL**2)),
            LinearStep("pooling_out", pooled, width),
            LinearStep("gate_up", width, 2 * hidden, bias=False, split="columns"),
            ElementwiseStep("activation", 3 * hidden),
            LinearStep("down", hidden, self.hidden_size, bias=False, split="rows"),
        )
        return AdapterSpec(steps)


class Processor(Foreign):
    """The parts of `preprocessor_config.json` that set crops; class defaults, which the released models keep."""

    max_crops: Count = 12
    overlap_margins: tuple[Count, Count] = (4, 4)
    base_image_input_size: tuple[Count, Count] = (336, 336)
    image_patch_size: Count = CLIP_LARGE["patch_size"]


@dataclass(frozen=True, slots=True)
class OverlappingCrops(StillsOnly):
    """The whole picture as one square, and a grid of squares that overlap.

    Parameters
    ----------
    side, patch : int
        Sides of a crop and of a patch [pixels].
    margin : int
        Patches of a crop that its neighbours see better, both margins of a side together.
    most_crops : int
        Limit of the grid.
    """

    family: ClassVar[str] = "Molmo"
    side: int
    patch: int
    margin: int
    most_crops: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        rows, columns = self.grid(width, height)
        step, margin = self._window // POOL, self.margin // POOL
        high, wide = rows * step + margin, columns * step + margin
        whole = self._pooled
        return self._cost(1 + rows * columns, whole**2 + high * wide, markers=2 * FRAME_TOKENS + whole + high)

    def unit(self) -> MediaCost:
        """Return one whole crop."""
        return self._cost(1, self._pooled**2)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return rows and columns of the crops: the least enlargement that loses nothing, else the least shrinking.

        Sizes are those inside the margins. Of a picture no larger than the margins both comparisons are negative or
        infinite, as in the processor, and the smallest grid wins. The processor computes in 32 bits.
        """
        grids = [(r, c) for r in range(1, self.most_crops + 1) for c in range(1, self.most_crops // r + 1)]
        grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
        inside = np.array([height, width], np.float32) - np.float32(self.margin * self.patch)
        windows = np.array(grids, np.float32) * np.float32(self._window * self.patch)
        with np.errstate(divide="ignore"):
            scale = (windows / inside).min(axis=1)
        if (scale < 1).all():
            return grids[int(scale.argmax())]
        return grids[int(np.where(scale < 1, np.inf, scale).argmin())]

    @property
    def _window(self) -> int:
        """Patches along a side of a crop that are its own."""
        return self.side // self.patch - self.margin

    @property
    def _pooled(self) -> int:
        """Tokens along a side of a crop."""
        return self.side // self.patch // POOL

    def _cost(self, crops: int, tokens: int, *, markers: int = 0) -> MediaCost:
        return tiles_cost(
            crops,
            side=self.side,
            patch=self.patch,
            visual_tokens=tokens,
            marker_tokens=markers,
            class_token=True,
            adapter_tokens=crops * self._pooled**2,
        )


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Molmo model from its files."""
    if files.config.get("moe_num_experts"):
        raise Unsupported(f"{files.source}: moe_num_experts: MolmoE is not modelled; the dense Molmo models are")
    config = parse(Molmo, files.config, files.source)
    limits = parse(Processor, files.image, "preprocessor_config.json")
    media = _media(limits)
    return ModelParts(config.decoder(files.source), _encoder(), config.adapter(files.source), media)


def _media(limits: Processor) -> OverlappingCrops:
    (height, width), (left, right), patch = (
        limits.base_image_input_size,
        limits.overlap_margins,
        limits.image_patch_size,
    )
    window = height // patch - left - right
    if height != width or height % (patch * POOL) or left % POOL or right % POOL or window <= 0 or window % POOL:
        rule = f"must be squares of whole pairs of {patch}-pixel patches with even margins that leave some inside"
        raise Unsupported(f"preprocessor_config.json: base_image_input_size and overlap_margins {rule}")
    return OverlappingCrops(height, patch, left + right, limits.max_crops)


def _encoder() -> VisionEncoderSpec:
    """Return CLIP as far as it is read; it has a norm before the layers and none behind."""
    clip = ClipVision.model_validate({**CLIP_LARGE, "num_hidden_layers": CLIP_LAYERS, "image_size": CLIP_SIDE})
    used = CLIP_LAYERS + 1 + max(READ_LAYERS)
    layer = clip.layer()
    return VisionEncoderSpec(
        width=clip.hidden_size,
        runs=(LayerRun(used, layer),),
        unused_runs=(LayerRun(CLIP_LAYERS - used, layer),),
        patch_width=clip.num_channels * clip.patch_size**2,
        positions=(CLIP_SIDE // clip.patch_size) ** 2 + 1,
        class_token=True,
        extra_parameters=norm_parameters("layer", clip.hidden_size),
    )
