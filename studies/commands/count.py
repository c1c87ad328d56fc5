"""`lvlm count`: parameters by component, FLOPs by stage and KV bytes."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from costmodel.conventions import Convention
from costmodel.counts import Counts
from costmodel.counts import count as count_work
from studies.options import FOR_PEOPLE, TEXT_PROMPT, Format, Prompt
from studies.output import Answer, emit
from studies.request import Request, pictures
from studies.tables import GB, MISSING, TERA, gigabytes, number, percent, sections, table


def count(
    model: str,
    /,
    *,
    prompt: Prompt = TEXT_PROMPT,
    convention: Convention = "kernel",
    form: Format = FOR_PEOPLE,
) -> None:
    """Count parameters, FLOPs by stage and KV bytes of a request.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one, or a hub id.
    convention : str
        How FLOPs are counted: kernel is what an engine needs, torch what transformers executes; the others are
        published formulas for prefill, which count a multiply-add once.
    """
    request = Request.of(model, prompt)
    counts = count_work(request.model, request.workload, convention=convention)
    inputs = {**request.inputs(), "convention": convention}
    emit(Answer("count", inputs, counts.as_dict(), lambda: _rows(counts), lambda to: _show(to, request, counts)), form)


def _rows(counts: Counts) -> list[dict[str, Any]]:
    """Return one row a component and one a stage."""
    components = [
        {"row": "component", "name": name, "parameters": value, "flops": None}
        for name, value in counts.parameters.items()
    ]
    stages = [
        {"row": "stage", "name": name, "parameters": None, "flops": value} for name, value in counts.flops.items()
    ]
    return components + stages


def _show(to: Console, request: Request, counts: Counts) -> None:
    tokens, total = counts.tokens, counts.parameters["total"]
    head = (
        f"{request.model.name}, {pictures(request)}: {tokens['visual']:,} visual + {tokens['markers']:,} marker"
        f" + {tokens['text']:,} text = {tokens['prompt']:,} prompt tokens"
    )
    components = [(name, number(n * GB, 4), percent(n / total), f"{n:,}") for name, n in counts.parameters.items()]
    stages = [(name, MISSING if f is None else number(f * TERA, 4)) for name, f in counts.flops.items()]
    legend = (
        f"Convention {counts.convention}; the head at the last position only; decode_step is the first step.\n"
        f"Weights {gigabytes(counts.weight_bytes)} GB at 16 bits; keys and values"
        f" {counts.kv_bytes_per_token:,.0f} bytes a token, {gigabytes(counts.kv_bytes)} GB at this prompt."
    )
    tables = table(("component", "billions", "share", "parameters"), components), table(("stage", "TFLOP"), stages)
    sections(to, head, *tables, legend)
