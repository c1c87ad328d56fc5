"""InternVL 1.5 to 3.5: square tiles chosen by aspect ratio, a thumbnail, pixel shuffle, two linear layers.

Reads the `transformers` layout (`internvl`) and that of the original repositories (`internvl_chat`). The tower is
InternViT-300M or InternViT-6B, which has RMS norms, norms over queries and keys and no biases on them; the language
model an InternLM2, Qwen2.5, Qwen3 (with experts as well) or Llama.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from costmodel.adapters import AdapterSpec, ElementwiseStep, projector
from costmodel.base import Foreign
from costmodel.families.files import Count, Json, Layers, ModelFiles, ModelParts, TileCount, divide, parse
from costmodel.families.pictures import nearest_grid, patches_along, tiles_cost
from costmodel.families.text import read_decoder
from costmodel.families.vits import used_layers
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import MediaCost, VisionEncoderSpec
from costmodel.workload import Video

MODEL_TYPES = ("internvl", "internvl_chat")
WRAPPER_TOKENS = 2  # <img> and </img>
TIED = {False: True, True: None}
"""Whether the head is tied when the file does not say: `InternVLConfig` ties, the original leaves it to the decoder."""
ORIGINAL: dict[str, Any] = {"dynamic_image_size": False, "use_thumbnail": False, "max_dynamic_patch": 6}
"""Defaults of the original `InternVLChatConfig` where they differ."""
ORIGINAL_VISION: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "norm_type": "rms_norm",
    "qk_normalization": True,
    "qkv_bias": False,
}
"""Defaults of the original `InternVisionConfig`, which describe InternViT-6B."""
DEFAULT_FRAMES = 8  # the model cards' examples; the video processor has no default


class InternVision(Foreign):
    """`InternVLVisionConfig`, and `InternVisionConfig` of the original repositories."""

    model_type: Literal["internvl_vision", "intern_vit_6b"] = "internvl_vision"
    hidden_size: Count = 1024
    num_hidden_layers: Layers = 24
    num_attention_heads: Count = 16
    intermediate_size: Count = 4096
    image_size: tuple[Count, Count] | Count = (448, 448)
    patch_size: tuple[Count, Count] | Count = (14, 14)
    num_channels: Count = 3
    attention_bias: bool = False
    use_qk_norm: bool = False
    use_mean_pooling: bool = True
    use_absolute_position_embeddings: bool = True
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"

    def side(self) -> int:
        """Return the side of a tile [pixels]."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    def patch(self) -> int:
        """Return the side of a patch [pixels]."""
        return self.patch_size if isinstance(self.patch_size, int) else self.patch_size[0]

    def layer(self) -> LayerSpec:
        """Return one layer: biased projections and a gain after each half."""
        heads = self.num_attention_heads
        head_dim = divide(self.hidden_size, heads, "hidden_size by heads", "vision_config")
        mixer = AttentionSpec(
            heads,
            heads,
            head_dim,
            causal=False,
            rotary=False,
            qkv_bias=self.attention_bias,
            out_bias=True,
            extra_parameters=2 * self.hidden_size * self.use_qk_norm,
        )
        ffn = MlpSpec(self.intermediate_size, gated=False, bias=True)
        norm: Literal["rms", "layer"] = "layer" if self.norm_type == "layer_norm" else "rms"
        return LayerSpec(self.hidden_size, mixer, ffn, norm, extra_parameters=2 * self.hidden_size)

    def encoder(self, n_used: int) -> VisionEncoderSpec:
        """Return the tower when the output of layer `n_used` is read."""
        patches = (self.side() // self.patch()) ** 2
        layer, unused = self.layer(), self.num_hidden_layers - n_used
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(LayerRun(n_used, layer),),
            unused_runs=(LayerRun(unused, layer),) if unused else (),
            patch_width=self.num_channels * self.patch() ** 2,
            patch_bias=True,
            positions=(patches + 1) * self.use_absolute_position_embeddings,
            class_token=True,
            extra_parameters=0 if self.use_mean_pooling else norm_parameters("layer", self.hidden_size),
        )


@dataclass(frozen=True, slots=True)
class Tiles:
    """Grids of square tiles; the one whose aspect ratio is nearest, and a thumbnail beside more than one tile.

    Parameters
    ----------
    side, patch : int
        Sides of a tile and of a patch [pixels].
    tokens_per_tile : int
        Visual tokens after pixel shuffle.
    min_tiles, max_tiles : int
        Limits of the grid.
    thumbnail : bool
        Whether the whole image is added as a tile.
    """

    side: int
    patch: int
    tokens_per_tile: int
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        grid = self._grid(width, height)
        return self._cost(grid + (self.thumbnail and grid > 1), WRAPPER_TOKENS)

    def frames(self, video: Video) -> int:
        """Return how many frames are taken: eight, or by rate when one is asked for."""
        if video.sample_fps:
            return max(1, int(video.total_frames / video.fps * video.sample_fps))  # more than there are is refused
        return min(DEFAULT_FRAMES, video.total_frames)

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames are: one tile each, whatever their size."""
        del width, height
        return self._cost(n_frames, WRAPPER_TOKENS * n_frames)

    def unit(self) -> MediaCost:
        """Return one tile."""
        return self._cost(1, 0)

    def _grid(self, width: int, height: int) -> int:
        """Return the number of tiles of the grid that suits this size best."""
        columns, rows = nearest_grid(width, height, side=self.side, least=self.min_tiles, most=self.max_tiles)
        return columns * rows

    def _cost(self, tiles: int, markers: int) -> MediaCost:
        return tiles_cost(
            tiles,
            side=self.side,
            patch=self.patch,
            visual_tokens=tiles * self.tokens_per_tile,
            marker_tokens=markers,
            class_token=True,
        )


class InternVl(Foreign):
    """`InternVLConfig`, and `InternVLChatConfig` of the original repositories."""

    vision_config: dict[str, Any]
    downsample_ratio: float = 0.5
    tie_word_embeddings: bool | None = None
    force_image_size: Count | None = None
    min_dynamic_patch: TileCount = 1
    max_dynamic_patch: TileCount = 12
    use_thumbnail: bool = True
    dynamic_image_size: bool = True
    vision_feature_layer: int = -1
    select_layer: int = -1


class TileLimits(Foreign):
    """The parts of `preprocessor_config.json` that set the number of tiles; `InternVLProcessor` always tiles."""

    min_patches: TileCount | None = None
    max_patches: TileCount | None = None


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of an InternVL model from its files."""
    original = files.config.get("model_type") == "internvl_chat"
    config = parse(InternVl, (ORIGINAL if original else {}) | dict(files.config), files.source)
    vision = parse(InternVision, _vision_values(config, original=original), f"{files.source}: vision_config")
    text = files.config.get("llm_config" if original else "text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"{files.source}: no {'llm_config' if original else 'text_config'}; it must hold the decoder")  # noqa: TRY004
    tied = config.tie_word_embeddings if config.tie_word_embeddings is not None else TIED[original]
    decoder = read_decoder(dict(text), f"{files.source}: text_config", tied=tied)
    shuffle = _shuffle(config, files.source)
    merged = vision.hidden_size * shuffle**2
    norm = ElementwiseStep("norm", 2 * merged, parameters=norm_parameters("layer", merged))
    adapter = AdapterSpec(projector((merged, decoder.width, decoder.width), norm=norm))
    layer, key = (
        (config.select_layer, "select_layer") if original else (config.vision_feature_layer, "vision_feature_layer")
    )
    encoder = vision.encoder(used_layers(layer, vision.num_hidden_layers, f"{files.source}: {key}"))
    return ModelParts(decoder, encoder, adapter, _media(config, files.image, vision, shuffle))


def _vision_values(config: InternVl, *, original: bool) -> dict[str, Any]:
    """Return the vision keys under the names of the `transformers` layout."""
    values = dict(config.vision_config)
    if original:
        values = ORIGINAL_VISION | values
        values |= {"attention_bias": values["qkv_bias"], "use_qk_norm": values["qk_normalization"]}
    if config.force_image_size:
        values["image_size"] = config.force_image_size
    return values


def _shuffle(config: InternVl, source: str) -> int:
    """Return the patches merged along a side by pixel shuffle."""
    shuffle = round(1 / config.downsample_ratio) if 0 < config.downsample_ratio <= 1 else 0
    if not shuffle or not math.isclose(shuffle * config.downsample_ratio, 1):
        rule = "must be 1 over a whole number, such as 0.5"
        raise ValueError(f"{source}: downsample_ratio={config.downsample_ratio} {rule}")
    return shuffle


def _media(config: InternVl, image: Json, vision: InternVision, shuffle: int) -> Tiles:
    limits = parse(TileLimits, image, "preprocessor_config.json")
    most = limits.max_patches or config.max_dynamic_patch
    least = limits.min_patches or config.min_dynamic_patch
    if least > most:
        raise ValueError(f"processor file: the fewest tiles {least} exceed the most {most}")
    patches = patches_along(vision.side(), vision.patch(), "vision_config")
    per_side = divide(patches, shuffle, "patches along a side by pixel shuffle", "vision_config")
    return Tiles(
        side=vision.side(),
        patch=vision.patch(),
        tokens_per_tile=per_side**2,
        min_tiles=least if config.dynamic_image_size else 1,
        max_tiles=most if config.dynamic_image_size else 1,
        thumbnail=config.use_thumbnail,
    )
