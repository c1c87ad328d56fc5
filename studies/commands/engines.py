"""`lvlm engines`: the serving engines, or one of them with the source of every number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from costmodel import engine_names, load_engine
from costmodel.engine import LAUNCHED_STAGES, EngineProfile
from costmodel.operators import Kind
from costmodel.units import UNBOUNDED
from studies.numbers import as_rows, numbers_table, source_lines, sourced
from studies.options import FOR_PEOPLE, Format
from studies.output import Answer, emit
from studies.tables import GB, MS, number, sections, table

NANO = 1e9
DEFAULTS = (
    "pricing",
    "prefill_chunk_tokens",
    "encoder_chunk_tokens",
    "kv_block_tokens",
    "memory_fraction",
    "reserve_bytes",
    "step_host_s",
    "request_host_s",
    "sequence_host_s",
    "concatenates_cache",
    "repeats_heads",
    "fuses_elementwise",
    "first_token_in_prefill",
    "counts_full_square",
    "executes_everything",
)


def engines(name: str | None = None, /, *, form: Format = FOR_PEOPLE) -> None:
    """List the serving engines, or show one with the source of every number.

    Parameters
    ----------
    name : str
        An engine.
    """
    if name is None:
        found = [load_engine(known) for known in engine_names()]
        rows = [_row(engine) for engine in found]
        values = {"engines": [{**row, **_details(engine)} for row, engine in zip(rows, found, strict=True)]}
        emit(Answer("engines", {}, values, lambda: rows, lambda to: _show_list(to, found)), form)
        return
    engine = load_engine(name)
    numbers = sourced(_numbers(engine), engine.sources)
    values = {"engines": [{**_row(engine), **_details(engine), "numbers": as_rows(numbers)}]}

    def show(to: Console) -> None:
        head = f"{engine.name}: {engine.title}. {engine.description}"
        parts = (_runs_table(engine), _kernels_table(engine)) if engine.pricing == "operators" else ()
        sections(to, head, *parts, numbers_table(numbers), "\n".join(source_lines(numbers)))

    emit(Answer("engines", {"name": name}, values, lambda: as_rows(numbers), show), form)


def _row(engine: EngineProfile) -> dict[str, Any]:
    head = {"name": engine.name, "title": engine.title, "description": engine.description}
    return {**head, **{key: _finite(getattr(engine, key)) for key in DEFAULTS}}


def _details(engine: EngineProfile) -> dict[str, Any]:
    """Return what is no single value: host time and launches by stage, kernels by kind, preprocessing."""
    return {
        "launches": {stage: "eager" if engine.layer_host_s.get(stage) else "graph" for stage in LAUNCHED_STAGES},
        "layer_host_s": dict(engine.layer_host_s),
        "kernels": {kind: list(libraries) for kind, libraries in engine.kernels.items()},
        "preprocessing": engine.preprocessing.model_dump(),
    }


def _runs_table(engine: EngineProfile) -> Table:
    """Return how it runs, in words: what the flags and host times mean."""
    rows = [(stage, _launches(engine.layer_host_s.get(stage))) for stage in LAUNCHED_STAGES]
    appends = "written anew in every step" if engine.concatenates_cache else "appended to in place"
    heads = "copied for every query head" if engine.repeats_heads else "read once for the heads that share them"
    waits = "; none of it hides behind the host" if engine.cache_adds_to_host else ""
    rows.append(("cache", f"{appends}; keys and values {heads}{waits}"))
    pieces = "one kernel each" if engine.fuses_elementwise else "several kernels each"
    rows.append(("norms, activations, rotations", pieces))
    rates = engine.preprocessing.decode_s_per_pixel
    codecs = ", ".join(f"{codec} {number(rate * NANO)}" for codec, rate in rates.items())
    cost = engine.preprocessing
    decoding = f"ns a pixel: {codecs}, video {number(cost.frame_s_per_pixel * NANO)}" if rates else "decoding is free"
    pictures = f"{decoding}, resizing {number(cost.resize_s_per_pixel * NANO)}; workers: {cost.workers}"
    return table(("what", "description"), [*rows, ("pictures on the CPU", pictures)], left=2)


def _launches(layer_s: float | None) -> str:
    return f"launched eagerly, {number(layer_s * MS)} ms a layer at least" if layer_s else "replayed as graphs"


def _kernels_table(engine: EngineProfile) -> Table:
    rows = [(kind.label, ", ".join(engine.kernels.get(kind.label, ())) or "flat efficiency") for kind in Kind]
    return table(("kind of operator", "libraries whose curves are used, the preferred first"), rows, left=2)


def _finite(value: object) -> object:
    """Return None for a chunk that has no limit."""
    return None if value == UNBOUNDED else value


def _numbers(engine: EngineProfile) -> Iterator[tuple[str, float]]:
    for key in engine.numbers():
        head, _, rest = key.partition(".")
        value = getattr(engine, head)
        for part in rest.split(".") if rest else ():
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        yield key, float(value)


def _show_list(to: Console, found: list[EngineProfile]) -> None:
    rows = [
        (
            engine.name,
            "unbounded" if engine.prefill_chunk_tokens == UNBOUNDED else f"{engine.prefill_chunk_tokens:,.0f}",
            f"{engine.memory_fraction:.0%}",
            number(engine.reserve_bytes * GB),
            f"{engine.title}. {engine.description}",
        )
        for engine in found
    ]
    legend = "Used when --engine is not given: fused. Every number and its source: lvlm engines NAME"
    sections(to, table(("name", "prefill chunk", "memory used", "reserve GB", "description"), rows), legend)
