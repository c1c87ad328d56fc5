"""Traced models: operators that `lvlm trace` wrote down from a `transformers` implementation of an unknown family.

The file lists every matrix product and attention of the towers with its shape, and what the trace could not know. It is
priced as it stands: element-wise operators are not in it, tensor and pipeline parallelism are refused, and a picture
counts as the one that was traced, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from costmodel.adapters import AdapterSpec, LinearStep
from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, ModelFiles, ModelParts, parse
from costmodel.layers import LayerRun, LayerSpec
from costmodel.models import DecoderSpec, MediaCost, VisionEncoderSpec
from costmodel.traces import TracedAttention, TracedFfnSpec, TracedMixerSpec, TracedProduct
from costmodel.workload import Video

MODEL_TYPES = ("lvlm-trace",)


class Product(Foreign):
    """One line of products."""

    name: str
    d_in: Count
    d_out: Count
    rows_ratio: float = Field(gt=0)
    repeats: Count = 1
    experts: int = Field(default=0, ge=0)


class Attention(Foreign):
    """One line of attentions."""

    heads: Count
    qk_dim: Count
    v_dim: Count
    pairs_ratio: float = Field(default=1.0, gt=0)
    repeats: Count = 1


class Tower(Foreign):
    """A tower: rows of the hidden states, what runs on them, what it weighs."""

    width: Count
    parameters: int = Field(ge=0)
    products: list[Product]
    attentions: tuple[Attention, ...] = ()
    cached_width: int = Field(default=0, ge=0)

    def run(self) -> LayerRun:
        """Return the whole tower as one layer."""
        attentions = tuple(
            TracedAttention(a.heads, a.qk_dim, a.v_dim, a.pairs_ratio, a.repeats) for a in self.attentions
        )
        products = tuple(
            TracedProduct(p.name, p.d_in, p.d_out, p.rows_ratio, p.repeats, p.experts) for p in self.products
        )
        mixer = TracedMixerSpec(attentions, self.cached_width)
        return LayerRun(1, LayerSpec(self.width, mixer, TracedFfnSpec(products, self.parameters), "rms", n_norms=0))


class Decoder(Tower):
    """The language model."""

    vocabulary: Count
    end_parameters: int = Field(ge=0)
    max_positions: int = 0


class Vision(Tower):
    """The vision encoder on one picture."""

    rows: Count
    side_px: Count
    visual_tokens: Count
    adapter: list[Product]
    adapter_parameters: int = Field(ge=0)


class Trace(Foreign):
    """The file."""

    schema_version: Literal[1]
    decoder: Decoder
    vision: Vision | None = None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TracedPicture:
    """The picture that was traced; others are taken to cost the same."""

    rows: int
    tokens: int
    side_px: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return the traced picture."""
        del width, height, n_images
        return self.unit()

    def unit(self) -> MediaCost:
        """Return the traced picture."""
        pairs = self.rows * self.rows
        return MediaCost(self.rows, self.rows, pairs, pairs, self.tokens, 0, self.rows, self.side_px**2)

    def frames(self, video: Video) -> int:
        """Refuse: a trace knows no frames."""
        del video
        raise Unsupported("a traced model knows pictures, not videos; give frames as images")

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Refuse: a trace knows no frames."""
        del n_frames, width, height
        raise Unsupported("a traced model knows pictures, not videos; give frames as images")


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a traced model."""
    trace = parse(Trace, files.config, files.source)
    text, vision = trace.decoder, trace.vision
    decoder = DecoderSpec(
        text.width,
        text.vocabulary,
        (text.run(),),
        tied_head=True,
        max_positions=text.max_positions,
        extra_parameters=text.end_parameters - text.vocabulary * text.width - text.width,
    )
    if vision is None:
        return ModelParts(decoder, notes=trace.unknown)
    encoder = VisionEncoderSpec(vision.width, (vision.run(),), patch_width=0)
    picture = TracedPicture(vision.rows, vision.visual_tokens, vision.side_px)
    return ModelParts(decoder, encoder, _adapter(vision), picture, trace.unknown)


def _adapter(vision: Vision) -> AdapterSpec:
    per_row = vision.rows / vision.visual_tokens
    steps = tuple(
        LinearStep(p.name, p.d_in, p.d_out, bias=False, per_token=p.rows_ratio * per_row, repeats=p.repeats)
        for p in vision.adapter
    )
    counted = sum(step.parameters for step in steps)
    return AdapterSpec(steps, extra_parameters=vision.adapter_parameters - counted)
