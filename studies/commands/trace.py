"""`lvlm trace`: the operators of a model family that is not modelled, from its `transformers` implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from costmodel import load_model
from studies.options import FOR_PEOPLE, OUTPUT, Format
from studies.output import Answer, emit, note
from studies.tables import table

COLUMNS = ("tower", "product", "inputs", "outputs", "rows a row", "experts", "times")


def trace(
    config: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), group=OUTPUT)],
    form: Format = FOR_PEOPLE,
) -> None:
    """List the operators of a model from its transformers implementation, into a file that predict accepts.

    Needs the extra `runtime` and transformers; no weights, no GPU.

    Parameters
    ----------
    config : Path
        A config.json, or a folder that holds one.
    output : Path
        Write the operators into this file: .json.
    """
    path = config / "config.json" if config.is_dir() else config
    values = _read(path)
    if output.suffix != ".json" or output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"cannot write {str(output)!r}; name a .json file in a folder that exists")
    found = _trace(values, path)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    parameters = load_model(str(output)).parameters()
    note(f"wrote {output}; price it with: lvlm predict {output} HARDWARE")
    answer = {"output": str(output), "parameters": parameters, "unknown": found["unknown"]}
    emit(Answer("trace", {"config": str(path)}, answer, lambda: _rows(found), lambda to: _show(to, found)), form)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(path)!r}; give a config.json, or a folder that holds one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds {type(values).__name__}, not an object with keys")  # noqa: TRY004
    return values


def _trace(values: dict[str, Any], path: Path) -> dict[str, Any]:
    from runtime import trace as tracing

    try:
        return tracing.trace(values, source=str(path))
    except ModuleNotFoundError as error:
        install = "pip install 'lvlm-sim[runtime]' transformers"
        raise ModuleNotFoundError(f"lvlm trace needs {error.name}: {install}") from None


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    towers = {"decoder": found["decoder"]["products"]}
    if "vision" in found:
        towers |= {"vision": found["vision"]["products"], "adapter": found["vision"]["adapter"]}
    return [{"tower": tower, **product} for tower, products in towers.items() for product in products]


def _show(to: Console, found: dict[str, Any]) -> None:
    keys = ("tower", "name", "d_in", "d_out", "rows_ratio", "experts", "repeats")
    rows = [
        tuple(f"{row[key]:,}" if key not in ("tower", "name") else row[key] for key in keys) for row in _rows(found)
    ]
    to.print(table(COLUMNS, rows))
    for line in found["unknown"]:
        to.print(f"unknown: {line}")
