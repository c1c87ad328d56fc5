"""`lvlm engines`: the serving engines, or one of them with the source of every number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from costmodel import engine_names, load_engine
from costmodel.engine import EngineProfile
from costmodel.units import UNBOUNDED
from studies.numbers import as_rows, numbers_table, source_lines, sourced
from studies.options import FOR_PEOPLE, Format
from studies.output import Answer, emit
from studies.tables import GB, number, sections, table

DEFAULTS = (
    "pricing",
    "prefill_chunk_tokens",
    "encoder_chunk_tokens",
    "kv_block_tokens",
    "memory_fraction",
    "reserve_bytes",
    "step_host_s",
    "request_host_s",
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
        emit(Answer("engines", {}, {"engines": rows}, lambda: rows, lambda to: _show_list(to, found)), form)
        return
    engine = load_engine(name)
    numbers = sourced(_numbers(engine), engine.sources)
    values = {"engines": [{**_row(engine), "numbers": as_rows(numbers)}]}

    def show(to: Console) -> None:
        head = f"{engine.name}: {engine.title}. {engine.description}"
        sections(to, head, numbers_table(numbers), "\n".join(source_lines(numbers)))

    emit(Answer("engines", {"name": name}, values, lambda: as_rows(numbers), show), form)


def _row(engine: EngineProfile) -> dict[str, Any]:
    head = {"name": engine.name, "title": engine.title, "description": engine.description}
    return {**head, **{key: _finite(getattr(engine, key)) for key in DEFAULTS}}


def _finite(value: object) -> object:
    """Return None for a chunk that has no limit."""
    return None if value == UNBOUNDED else value


def _numbers(engine: EngineProfile) -> Iterator[tuple[str, float]]:
    for key in engine.numbers():
        head, _, rest = key.partition(".")
        value = getattr(engine, head)
        if head == "efficiency":
            kind, _, field = rest.partition(".")
            value = getattr(engine.efficiency[kind], field)
        elif rest:
            value = getattr(value, rest)
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
