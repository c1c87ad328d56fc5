"""Idefics2: a SigLIP tower at nearly native resolution, a gated projection, a perceiver that leaves 64 tokens an image.

By default an image is given as its four quarters and whole, which makes five of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from costmodel.adapters import AdapterSpec, AttentionStep, ElementwiseStep, LinearStep, Step
from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly
from costmodel.families.text import read_decoder
from costmodel.families.vits import SiglipVision
from costmodel.models import MediaCost

MODEL_TYPES = ("idefics2",)
MLP_RATIO = 4  # hidden width of a perceiver layer over its own (Idefics2PerceiverLayer)
LAYER_NORMS = 3  # of a perceiver layer: over latents, over context, behind attention
SHORTEST, LONGEST = 378, 980  # sides of a resized picture (Idefics2ImageProcessor.size) [pixels]


CLASS_DEFAULTS: dict[str, Any] = {}
"""A part that a file leaves out."""


class Idefics2Vision(SiglipVision):
    """`Idefics2VisionConfig`: SigLIP without its pooling head."""

    model_type: Any = "idefics2_vision"  # not read by `transformers` either
    patch_size: Count = 32
    vision_use_head: bool = False


class Perceiver(Foreign):
    """`Idefics2PerceiverConfig`; its hidden size is that of the language model whatever the file says."""

    resampler_n_latents: Count = 64
    resampler_depth: Layers = 3
    resampler_n_heads: Count = 16
    resampler_head_dim: Count = 96
    num_key_value_heads: Count = 4

    def steps(self, width: int) -> tuple[Step, ...]:
        """Return the steps of all layers: latents attend over the projected patches and over themselves."""
        n, depth, heads = self.resampler_n_latents, self.resampler_depth, self.resampler_n_heads
        divide(heads, self.num_key_value_heads, "resampler_n_heads by num_key_value_heads", "perceiver_config")
        q_width, kv_width = heads * self.resampler_head_dim, self.num_key_value_heads * self.resampler_head_dim
        hidden, norms = MLP_RATIO * width, LAYER_NORMS * depth * width
        return (
            ElementwiseStep("norms", 2 * width, parameters=norms, per_token=2.0, per_patch=1.0, repeats=depth),
            LinearStep("query", width, q_width, bias=False, repeats=depth),
            LinearStep("keys", width, 2 * kv_width, bias=False, per_patch=1.0, repeats=depth),
            AttentionStep("attention", heads, self.resampler_head_dim, n, n, repeats=depth),
            LinearStep("out", q_width, width, bias=False, repeats=depth),
            LinearStep("up", width, 2 * hidden, bias=False, repeats=depth),
            ElementwiseStep("activation", 3 * hidden, repeats=depth),
            LinearStep("down", hidden, width, bias=False, repeats=depth),
            ElementwiseStep("last_norm", 2 * width, parameters=width),
        )


class Idefics2(Foreign):
    """`Idefics2Config`."""

    vision_config: dict[str, Any] = CLASS_DEFAULTS
    perceiver_config: dict[str, Any] = CLASS_DEFAULTS
    text_config: dict[str, Any] = CLASS_DEFAULTS
    tie_word_embeddings: bool = False


class Sides(Foreign):
    """The parts of `preprocessor_config.json` that set sizes; the released file splits images, the class does not."""

    size: dict[str, Any] = Field(default_factory=dict)
    do_image_splitting: bool = True


@dataclass(frozen=True, slots=True)
class Quarters(StillsOnly):
    """A picture within limits of its sides, or its four quarters and itself, each within them.

    Parameters
    ----------
    patch : int
        Side of a patch [pixels].
    tokens : int
        Visual tokens a picture.
    shortest, longest : int
        Limits of a resized picture's sides [pixels].
    splits : bool
        Whether quarters are added.
    """

    family: ClassVar[str] = "Idefics2"
    patch: int
    tokens: int
    shortest: int
    longest: int
    splits: bool

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model; `transformers` pads its parts to one size."""
        del n_images
        sizes = [self._resized(*size) for size in self._parts(width, height)]
        widest, highest = max(w for w, _ in sizes), max(h for _, h in sizes)
        padded = self._cost([(widest, highest)] * len(sizes))
        cost = self._cost(sizes)
        return cost if padded == cost else replace(cost, executed=padded)

    def unit(self) -> MediaCost:
        """Return one picture of the largest size."""
        return replace(self._cost([(self.longest, self.longest)]), marker_tokens=0)

    def _parts(self, width: int, height: int) -> list[tuple[int, int]]:
        if not self.splits:
            return [(width, height)]
        if min(width, height) < 2:  # noqa: PLR2004 - a half of one pixel is none
            raise ValueError(f"image {width}x{height} must be 2 pixels wide and high to be split; enlarge it first")
        halves = [(w, h) for w in (width // 2, width - width // 2) for h in (height // 2, height - height // 2)]
        return [*halves, (width, height)]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of a part after resizing: the longer side cut first, then both sides raised.

        References
        ----------
        .. [1] `get_resize_output_image_size` of the Idefics2 image processor, transformers 5.23.
        """
        ratio = width / height
        if width >= height and width > self.longest:
            width, height = self.longest, int(self.longest / ratio)
        elif height > width and height > self.longest:
            width, height = int(self.longest * ratio), self.longest
        return max(width, self.shortest), max(height, self.shortest)

    def _cost(self, sizes: list[tuple[int, int]]) -> MediaCost:
        patches = [(width // self.patch) * (height // self.patch) for width, height in sizes]
        pairs = sum(n * n for n in patches)
        return MediaCost(
            patches=sum(patches),
            rows=sum(patches),
            pairs=pairs,
            window_pairs=pairs,
            visual_tokens=len(sizes) * self.tokens,
            marker_tokens=len(sizes) + 1,  # <fake_token_around_image> before each part and behind the last one
            largest_rows=sum(patches),
            resized_pixels=sum(width * height for width, height in sizes),
        )


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of an Idefics2 model from its files."""
    config = parse(Idefics2, files.config, files.source)
    vision = parse(Idefics2Vision, config.vision_config, f"{files.source}: vision_config")
    perceiver = parse(Perceiver, config.perceiver_config, f"{files.source}: perceiver_config")
    text = {"model_type": "mistral", **config.text_config}
    decoder = read_decoder(text, f"{files.source}: text_config", tied=config.tie_word_embeddings)
    hidden = decoder.runs[0].layer.ffn.hidden
    adapter = AdapterSpec(
        (*_projection(vision.hidden_size, hidden, decoder.width), *perceiver.steps(decoder.width)),
        extra_parameters=perceiver.resampler_n_latents * decoder.width,
    )
    return ModelParts(decoder, vision.encoder(), adapter, _media(files, vision, perceiver))


def _projection(width: int, hidden: int, text_width: int) -> tuple[Step, ...]:
    """Return the gated block that every patch goes through."""
    return (
        LinearStep("project_up", width, 2 * hidden, bias=False, per_token=0.0, per_patch=1.0),
        ElementwiseStep("project_activation", 3 * hidden, per_token=0.0, per_patch=1.0),
        LinearStep("project_down", hidden, text_width, bias=False, per_token=0.0, per_patch=1.0),
    )


def _media(files: ModelFiles, vision: Idefics2Vision, perceiver: Perceiver) -> Quarters:
    sides = parse(Sides, files.image, "preprocessor_config.json")
    shortest, longest = sides.size.get("shortest_edge", SHORTEST), sides.size.get("longest_edge", LONGEST)
    if not (isinstance(shortest, int) and isinstance(longest, int) and vision.patch_size <= shortest <= longest):
        rule = f"must hold a shortest_edge from a patch's {vision.patch_size} pixels and a longest_edge from that on"
        raise ValueError(f"preprocessor_config.json: size={sides.size} {rule}")
    return Quarters(
        patch=vision.patch_size,
        tokens=perceiver.resampler_n_latents,
        shortest=shortest,
        longest=longest,
        splits=sides.do_image_splitting,
    )
