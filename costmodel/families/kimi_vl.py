"""Kimi-VL: MoonViT at native resolution, patches merged 2x2, two linear layers, a DeepSeek-V3 decoder.

A picture keeps its size unless it has more patches than the limit; then both sides shrink by one factor. Its right and
lower edges are padded to whole merged patches, so it may exceed the limit a little. All patches of a picture attend to
each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from costmodel.adapters import AdapterSpec, ElementwiseStep, projector
from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import MediaCost, VisionEncoderSpec

MODEL_TYPES = ("kimi_vl",)
CHANNELS = 3
WRAPPER_TOKENS = 4  # <|media_start|> image <|media_content|> … <|media_end|>, the chat template of the repository
MOST_PATCHES_A_SIDE = 512  # the processor refuses pictures from here on: rotary positions end
HUB_PATCH_LIMIT = 4096  # `in_token_limit` of the processor's class and of Kimi-VL-A3B-Instruct


class MoonVit(Foreign):
    """The vision part of the original `config.json`."""

    model_type: Literal["moonvit"] = "moonvit"
    patch_size: Count = 14
    init_pos_emb_height: Count = 64
    init_pos_emb_width: Count = 64
    num_attention_heads: Count = 16
    num_hidden_layers: Layers = 27
    hidden_size: Count = 1152
    intermediate_size: Count = 4304
    merge_kernel_size: tuple[Count, Count] = (2, 2)

    @property
    def merge(self) -> int:
        """Patches merged along a side."""
        return self.merge_kernel_size[0]

    def layer(self) -> LayerSpec:
        """Return one layer of the tower."""
        heads = self.num_attention_heads
        head_dim = divide(self.hidden_size, heads, "hidden_size by heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, qkv_bias=True, out_bias=True)
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.intermediate_size, gated=False, bias=True), "layer")

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower."""
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(LayerRun(self.num_hidden_layers, self.layer()),),
            patch_width=CHANNELS * self.patch_size**2,
            patch_bias=True,
            positions=self.init_pos_emb_height * self.init_pos_emb_width,
            extra_parameters=norm_parameters("layer", self.hidden_size),
        )

    def adapter(self, width: int) -> AdapterSpec:
        """Return the projector: a norm over each patch, then two linear layers over the merged ones."""
        merged = self.hidden_size * self.merge**2
        norm = ElementwiseStep("norm", 2 * merged, parameters=norm_parameters("layer", self.hidden_size))
        return AdapterSpec(projector((merged, merged, width), norm=norm))


class KimiVl(Foreign):
    """The original `config.json`."""

    vision_config: dict[str, Any]
    text_config: dict[str, Any]


class Processor(Foreign):
    """The parts of `preprocessor_config.json` that set sizes."""

    in_token_limit: Count = HUB_PATCH_LIMIT
    pad_input: Literal[True] = True


@dataclass(frozen=True, slots=True)
class PaddedNative(StillsOnly):
    """A picture at its own size, shrunk to a limit of patches and padded to whole merged ones.

    Parameters
    ----------
    patch : int
        Side of a patch [pixels].
    merge : int
        Patches merged along a side.
    most_patches : int
        Patches beyond which a picture shrinks.
    """

    family: ClassVar[str] = "Kimi-VL's processor"
    patch: int
    merge: int
    most_patches: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model.

        Raises
        ------
        ValueError
            If a side has more patches than the tower has positions for.
        """
        del n_images
        patches = (width // self.patch) * (height // self.patch)
        scale = math.sqrt(self.most_patches / patches) if patches > self.most_patches else 1.0
        columns, rows = self._patches(width, scale), self._patches(height, scale)
        if max(columns, rows) >= MOST_PATCHES_A_SIDE:
            rule = f"needs {max(columns, rows)} patches along a side and Kimi-VL takes fewer than {MOST_PATCHES_A_SIDE}"
            raise ValueError(f"image {width}x{height} {rule}; cut it into shorter pieces")
        return self._cost(columns * rows)

    def unit(self) -> MediaCost:
        """Return one merged patch."""
        per_token = self.merge**2
        return MediaCost(per_token, per_token, 0, 0, 1, 0, per_token, per_token * self.patch**2)

    def _patches(self, length: int, scale: float) -> int:
        """Return the patches along a side after shrinking and padding."""
        side = self.patch * self.merge
        return math.ceil(int(length * scale) / side) * self.merge

    def _cost(self, patches: int) -> MediaCost:
        return MediaCost(
            patches=patches,
            rows=patches,
            pairs=patches**2,
            window_pairs=patches**2,
            visual_tokens=patches // self.merge**2,
            marker_tokens=WRAPPER_TOKENS,
            largest_rows=patches,
            resized_pixels=patches * self.patch**2,
        )


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Kimi-VL model from its files."""
    config = parse(KimiVl, files.config, files.source)
    vision = parse(MoonVit, config.vision_config, f"{files.source}: vision_config")
    if len(set(vision.merge_kernel_size)) > 1:
        rule = "must be the same along both sides"
        raise Unsupported(f"{files.source}: vision_config.merge_kernel_size={vision.merge_kernel_size} {rule}")
    tied = files.config.get("tie_word_embeddings") or config.text_config.get("tie_word_embeddings", False)
    text = {"model_type": "deepseek_v3", **config.text_config}
    decoder = read_decoder(text, f"{files.source}: text_config", tied=bool(tied))
    limits = parse(Processor, files.image, "preprocessor_config.json")
    media = PaddedNative(vision.patch_size, vision.merge, limits.in_token_limit)
    return ModelParts(decoder, vision.encoder(), vision.adapter(decoder.width), media)
