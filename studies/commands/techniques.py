"""`lvlm techniques`: the published methods, or one of them with everything that is known of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType

from costmodel.techniques import technique_names
from costmodel.techniques.applied import load_arguments, load_identity
from costmodel.techniques.method import (
    CONFIDENCE,
    NOT_FOUND,
    SOURCE_LETTERS,
    Efficiency,
    MethodFile,
    QualityPoint,
    Use,
    load_method,
)
from costmodel.techniques.primitives import load_fields, primitive_names
from studies.options import FOR_PEOPLE, Format
from studies.output import Answer, emit
from studies.tables import MISSING, number, percent, sections, table

LIST_COLUMNS = ("id", "name", "sure", "primitives", "description")
STATED = ("where", "primitive", "parameters", "defaults", "overheads", "composes", "quality", "published")


def techniques(name: str | None = None, /, *, form: Format = FOR_PEOPLE) -> None:
    """List the published methods, or show one: its paper, defaults, cost of its own, quality and measurements.

    Parameters
    ----------
    name : str
        A method by its id or usual name, or a primitive.
    """
    if name is None:
        rows = [_row(identity) for identity in technique_names()]
        emit(Answer("techniques", {}, {"techniques": rows}, lambda: rows, lambda to: _show_list(to, rows)), form)
        return
    identity = load_identity(name)
    if not identity:
        _primitive(name, form)
        return
    file = load_method(identity)
    values = {"techniques": [{**_row(identity), **_everything(identity)}]}
    inputs = {"name": identity}
    emit(Answer("techniques", inputs, values, lambda: _csv(identity), lambda to: _show(to, identity, file)), form)


def _row(identity: str) -> dict[str, Any]:
    file = load_method(identity)
    return {
        "id": identity,
        "name": file.name,
        "stage": "+".join(file.stage),
        "category": file.category,
        "confidence": file.confidence,
        "primitives": "+".join(use.kind for use in file.primitives) or "none",
        "defaults": file.stated.defaults,
        "title": file.paper.title,
        "arxiv": file.paper.arxiv,
    }


def _everything(identity: str) -> dict[str, Any]:
    """Return the whole file of a method for programs, with its arguments."""
    file = load_method(identity)
    values = file.model_dump(mode="json", exclude={"variants", "quality", "primitives"})
    return {
        **values,
        "variants": {name: dict(values) for name, values in file.variants.items()},
        "quality": [{**point.model_dump(mode="json"), "retention": point.retention} for point in file.quality],
        "uses": [use.model_dump(mode="json") for use in file.primitives],
        "arguments": arguments(identity),
    }


def arguments(identity: str) -> list[str]:
    """Return what a method can be given; nothing where a primitive of it is not modelled."""
    if not all(use.kind in primitive_names() for use in load_method(identity).primitives):
        return []
    return list(load_arguments(identity))


def _csv(identity: str) -> list[dict[str, Any]]:
    """Return one row a published measurement and one a published score."""
    file = load_method(identity)
    return [_measured(point) for point in file.efficiency] + [_scored(point) for point in file.quality]


def _measured(point: Efficiency) -> dict[str, Any]:
    kept = None if point.baseline is None or point.value is None or not point.baseline else point.value / point.baseline
    return {
        "kind": "efficiency",
        "what": point.metric,
        "model": point.model,
        "hardware": point.hardware,
        "setting": point.setting,
        "baseline": point.baseline,
        "value": point.value,
        "unit": point.unit,
        "ratio": kept,
        "source": point.source,
    }


def _scored(point: QualityPoint) -> dict[str, Any]:
    return {
        "kind": "quality",
        "what": point.benchmark,
        "model": point.model,
        "hardware": "",
        "setting": _pairs(point.at) or ("any" if point.everywhere else "defaults"),
        "baseline": point.baseline,
        "value": point.value,
        "unit": "score",
        "ratio": point.retention,
        "source": point.source,
    }


def _primitive(kind: str, form: Format) -> None:
    fields = load_fields(kind)
    rows = [{"parameter": name, "type": annotation} for name, annotation in fields.items()]
    values = {"techniques": [{"id": kind, "name": kind, "parameters": dict(fields)}]}

    def show(to: Console) -> None:
        sections(
            to, f"{kind}: a primitive, by its own name", table(("parameter", "kind"), list(fields.items()), left=2)
        )

    emit(Answer("techniques", {"name": kind}, values, lambda: rows, show), form)


def _show_list(to: Console, rows: list[dict[str, Any]]) -> None:
    cells = [
        (
            row["id"],
            row["name"],
            row["stage"],
            row["confidence"],
            row["primitives"].replace("+", " + "),
            row["defaults"],
        )
        for row in rows
    ]
    sure = "; ".join(f"{letter} {meaning}" for letter, meaning in CONFIDENCE.items())
    usage = "Everything known of one: lvlm techniques NAME. Used as --technique NAME:key=value,…; primitives too: "
    sections(to, table(LIST_COLUMNS, cells, left=4), f"Sure: {sure}.", usage + ", ".join(primitive_names()))


def _show(to: Console, identity: str, file: MethodFile) -> None:
    sections(to, *_parts(identity, file))


def _parts(identity: str, file: MethodFile) -> Iterator[RenderableType]:
    paper = f"{file.paper.title} (arXiv {file.paper.arxiv})"
    yield f"{identity}: {file.name}. {paper}. {'+'.join(file.stage)}: {file.category}."
    yield table(("", "kind"), [(key, getattr(file.stated, key)) for key in STATED], left=2)
    if file.settings:
        yield table(
            ("published default", "value"), [(key, _text(value)) for key, value in file.settings.items()], left=2
        )
    if file.instead:
        yield f"It rewrites no request: {file.instead}."
    for use in file.primitives:
        yield _use(use)
    if file.required:
        yield f"Not published, so that it must be given: {', '.join(file.required).replace('|', ' or ')}."
    if file.variants:
        yield table(("variant", "kind"), [(name, _pairs(values)) for name, values in file.variants.items()], left=2)
    yield from _published(file)
    letters = {word for word in file.source.replace(";", " ").replace("+", " ").split() if word in SOURCE_LETTERS}
    meanings = "; ".join(f"{letter} {SOURCE_LETTERS[letter]}" for letter in sorted(letters))
    yield f"Source: {file.source}. Sure: {file.confidence}, {CONFIDENCE[file.confidence]}. {meanings}"


def _use(use: Use) -> str:
    note = f" ({use.note})" if use.note else ""
    prefix = f", arguments begin with {use.prefix}" if use.prefix else ""
    return f"{use.kind}: {_pairs(use.parameters) or 'as it is'}{prefix}{note}"


def _published(file: MethodFile) -> Iterator[RenderableType]:
    if file.efficiency:
        rows = [_measured(point) for point in file.efficiency]
        yield _table(rows, ("what", "model", "hardware", "setting"))
    if file.quality:
        yield _table([_scored(point) for point in file.quality], ("what", "model", "setting"))
    else:
        yield f"Quality, published with its baseline: {NOT_FOUND}."


def _table(rows: list[dict[str, Any]], words: tuple[str, ...]) -> RenderableType:
    cells = [
        (
            *(row[word] for word in words),
            number(row["baseline"]),
            number(row["value"]),
            row["unit"],
            MISSING if row["ratio"] is None else percent(row["ratio"]),
        )
        for row in rows
    ]
    return table((*words, "baseline", "value", "unit", "ratio"), cells, left=len(words))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(":".join(map(_text, part)) if isinstance(part, tuple) else _text(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
