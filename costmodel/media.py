"""Pictures as totals: what the images and videos of a request add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import Unsupported
from costmodel.models import MediaCost, MediaRule, ModelSpec
from costmodel.workload import CODECS, Video, Workload

SUMMED: Final = (
    "patches",
    "rows",
    "pairs",
    "window_pairs",
    "visual_tokens",
    "marker_tokens",
    "resized_pixels",
    "cross_tokens",
    "block_pairs",
)
"""Fields of an item that add up."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaTotals:
    """Totals over the images and videos of one request.

    The names are those of `MediaCost`, `item_rows` its `rows`; beside them stand:

    Parameters
    ----------
    coded_pixels : tuple of float or ndarray
        Pixels of image files by codec, in the order of `CODECS`.
    frames : float or ndarray
        Frames of all videos that the model is given.
    video : MediaTotals or None
        The part of the totals that is videos, where there are images beside them.
    adapter_keep, adapter_patch_keep : float or ndarray
        Shares of the tokens, and of the patches, that techniques leave to the adapter.
    """

    items: Quantity = 0.0
    patches: Quantity = 0.0
    rows: Quantity = 0.0
    pairs: Quantity = 0.0
    window_pairs: Quantity = 0.0
    visual_tokens: Quantity = 0.0
    marker_tokens: Quantity = 0.0
    largest_rows: Quantity = 0.0
    resized_pixels: Quantity = 0.0
    frame_pixels: Quantity = 0.0
    cross_tokens: Quantity = 0.0
    block_pairs: Quantity = 0.0
    adapter_tokens: Quantity = 0.0
    item_rows: tuple[float, ...] = ()
    coded_pixels: tuple[Quantity, ...] = (0.0,) * len(CODECS)
    frames: Quantity = 0.0
    video: MediaTotals | None = None
    adapter_keep: Quantity = 1.0
    adapter_patch_keep: Quantity = 1.0

    @property
    def pictures(self) -> Quantity:
        """Images, and frames of videos."""
        if self.video is not None:
            return self.items - self.video.items + self.frames
        return self.frames if isinstance(self.frames, np.ndarray) or self.frames else self.items

    def scaled(self, **factors: Quantity) -> MediaTotals:
        """Return the totals with some of them multiplied, those of videos with the rest."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}  # quicker than replace
        for name, by in factors.items():
            values[name] = values[name] * by
        if self.video is not None:
            values["video"] = self.video.scaled(**factors)
        return MediaTotals(**values)


_FIELDS = tuple(field.name for field in fields(MediaTotals))


def media_totals(model: ModelSpec, workload: Workload, *, executed: bool = False) -> MediaTotals:
    """Return the totals of a workload's pictures.

    Parameters
    ----------
    executed : bool
        Whether to count what `transformers` runs (padding included) where that is more than an engine needs.

    Raises
    ------
    Unsupported
        If there are pictures and the model has no vision part.
    """
    if not workload.has_media:
        return MediaTotals()
    if model.media is None:
        raise Unsupported(f"{model.name} has no vision part; give it text alone, or a vision-language model")
    if workload.visual_tokens is not None:
        return _totals_of_tokens(model.media, workload.visual_tokens)
    costs = media_costs(model.media, workload)
    if executed:
        costs = [cost.executed or cost for cost in costs]
    everything = replace(_summed(costs), coded_pixels=tuple(map(float, workload.coded_pixels)))
    if not workload.videos:
        return everything
    counts = [n_frames(model.media, video) for video in workload.videos]
    pixels = sum(v.width * v.height * count for v, count in zip(workload.videos, counts, strict=True))
    filmed: dict[str, Any] = {"frames": float(sum(counts)), "frame_pixels": float(pixels)}
    if not workload.images:
        return replace(everything, **filmed)
    videos = replace(_summed(costs[len(workload.images) :]), **filmed)
    return replace(everything, video=videos, **filmed)


def _summed(costs: Sequence[MediaCost]) -> MediaTotals:
    """Return the totals of several images or videos, but for the pixels of their files."""
    totals: dict[str, Any] = {name: float(sum(getattr(cost, name) for cost in costs)) for name in SUMMED}
    return MediaTotals(
        items=float(len(costs)),
        largest_rows=float(max(cost.largest_rows for cost in costs)),
        adapter_tokens=float(
            sum(cost.visual_tokens if cost.adapter_tokens is None else cost.adapter_tokens for cost in costs)
        ),
        item_rows=tuple(float(cost.rows) for cost in costs),
        **totals,
    )


def n_frames(rule: MediaRule, video: Video) -> int:
    """Return how many frames of a video the model is given."""
    frames = rule.frames(video) if video.frames is None else video.frames
    if frames > video.total_frames:
        asked = f"Video.frames={frames}" if video.frames else f"Video.sample_fps={video.sample_fps} takes {frames} and"
        raise ValueError(f"{asked} exceeds the {video.total_frames} frames of the clip; use fewer")
    return frames


def media_costs(rule: MediaRule, workload: Workload) -> Sequence[MediaCost]:
    """Return what each image and video of a workload is to the model, in order."""
    n_images = len(workload.images)
    images = [rule.image(image.width, image.height, n_images=n_images) for image in workload.images]
    return images + [rule.video(n_frames(rule, v), v.width, v.height) for v in workload.videos]


def _totals_of_tokens(rule: MediaRule, visual_tokens: Quantity) -> MediaTotals:
    """Return the totals of one picture, a JPEG, made of this many tokens.

    A family that attends over a whole picture pays for the square of its rows; one that tiles pays a tile at a time.
    Where pictures reach cross-attention alone, the tokens are those that it sees.
    """
    unit = rule.unit()
    units = visual_tokens / (unit.visual_tokens or unit.cross_tokens)
    rows = units * unit.rows
    return MediaTotals(
        items=np.minimum(visual_tokens, 1.0),
        patches=units * unit.patches,
        rows=rows,
        pairs=units * unit.pairs if unit.pairs else rows * rows,
        window_pairs=units * unit.window_pairs,
        visual_tokens=visual_tokens if unit.visual_tokens else 0.0 * units,
        marker_tokens=0.0 * units,
        largest_rows=rows,
        cross_tokens=units * unit.cross_tokens,
        block_pairs=units * unit.block_pairs,
        adapter_tokens=visual_tokens if unit.adapter_tokens is None else units * unit.adapter_tokens,
        resized_pixels=units * unit.resized_pixels,
        coded_pixels=tuple(units * unit.resized_pixels if codec == "jpeg" else 0.0 for codec in CODECS),
        frame_pixels=0.0 * units,
    )
