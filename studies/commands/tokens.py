"""`lvlm tokens`: the patches and tokens that pictures become."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from costmodel.counts import count
from costmodel.media import media_costs, n_frames
from studies.options import FOR_PEOPLE, TEXT_PROMPT, Format, Prompt
from studies.output import Answer, emit
from studies.request import Request
from studies.tables import sections, table

KEYS = ("patches", "visual", "markers", "cross", "text", "prompt")


def tokens(model: str, /, *, prompt: Prompt = TEXT_PROMPT, form: Format = FOR_PEOPLE) -> None:
    """Count the patches and tokens that pictures become.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one, or a hub id.
    """
    request = Request.of(model, prompt)
    totals = count(request.model, request.workload).tokens
    rows = [*_items(request), {"item": "total", "size": "", "frames": None, **totals}]

    def show(to: Console) -> None:
        cells = [[_cell(row[key]) for key in ("item", "size", "frames", *KEYS)] for row in rows]
        legend = (
            "visual: embeddings out of the adapter; markers: wrapper, row and tile tokens around them;"
            " cross: seen by cross-attention only; prompt = visual + markers + text."
        )
        head = f"{request.model.name}: {totals['prompt']:,} prompt tokens"
        sections(to, head, table(("item", "size", "frames", *KEYS), cells, left=2), legend)

    emit(Answer("tokens", request.inputs(), totals, lambda: rows, show), form)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _items(request: Request) -> list[dict[str, Any]]:
    """Return one row an image or video, in the order in which they were given."""
    workload, rule = request.workload, request.model.media
    if rule is None:
        return []
    names: list[tuple[str, int, int, int | None]] = [
        ("image", image.width, image.height, None) for image in workload.images
    ]
    names += [("video", video.width, video.height, n_frames(rule, video)) for video in workload.videos]
    rows = []
    for index, ((kind, width, height, frames), cost) in enumerate(
        zip(names, media_costs(rule, workload), strict=True), start=1
    ):
        counts = {"patches": cost.patches, "visual": cost.visual_tokens, "markers": cost.marker_tokens}
        counts["cross"] = cost.cross_tokens
        shape = {"item": f"{kind} {index}", "size": f"{width}x{height}", "frames": frames}
        rows.append({**shape, **{key: counts.get(key) for key in KEYS}})
    return rows
