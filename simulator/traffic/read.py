"""Traces of others, replayed: which module of this package reads a file is found by asking each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

import simulator.traffic as package
from simulator.request import Requests

NOT_FORMATS: Final = frozenset({"arrivals", "fields", "presets", "read", "sessions", "shapes"})
HEAD_BYTES: Final = 4096
"""What a reader sees of a file to say whether it is its own."""


def formats() -> Sequence[ModuleType]:
    """Return the readers: modules with `ABOUT`, `matches(head)` and `load(path, n, *, options)`."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in NOT_FORMATS)
    return [importlib.import_module(f"simulator.traffic.{name}") for name in names]


def format_names() -> list[str]:
    """Return the names of the trace formats."""
    return [module.__name__.rpartition(".")[2] for module in formats()]


def format_of(path: str | Path) -> ModuleType:
    """Return the module that reads a file or folder.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If no reader knows it.
    """
    head = _head(Path(path))
    for module in formats():
        if module.matches(head):
            return module
    known = "; ".join(module.ABOUT for module in formats())
    raise ValueError(f"trace={str(path)!r} is in no known format; known: {known}")


def _head(path: Path) -> str:
    """Return how a file begins, or the names in a folder, one a line."""
    try:
        if path.is_dir():
            return "\n".join(sorted(inside.name for inside in path.iterdir()))
        with path.open("rb") as file:
            return file.read(HEAD_BYTES).decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        raise FileNotFoundError(f"no trace {str(path)!r}; give a file, or a workload: see lvlm workloads") from None


def with_options(text: str) -> tuple[str, dict[str, str]]:
    """Return the path and the options of `PATH:key=value,…`; a path that exists as it stands has none."""
    path, colon, rest = text.rpartition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if Path(text).exists() or not colon or not all(key.strip() and equals for key, equals, _ in pairs):
        return text, {}
    return path, {key.strip(): value.strip() for key, _, value in pairs}


def read(
    path: str | Path,
    *,
    rate: float | None = None,
    n: int | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
) -> Requests:
    """Return the requests of a trace; what its reader left out is in their `notes`.

    Parameters
    ----------
    path : str or Path
        The file, or the folder where a format is one.
    rate : float, optional
        Mean requests a second to which the times are stretched; where requests are drawn, what their sources are scaled
        to.
    n : int, optional
        Requests that are kept, from the first.
    seed : int
        Where requests are drawn, equal seeds give equal requests.
    options : mapping of str to str, optional
        Of the format: the keywords of its `load`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If no reader knows it, a value in it is missing or wrong, or an option is not one of its format.
    """
    if rate is not None and not 0 < rate < np.inf:
        raise ValueError(f"rate={rate!r} must be a positive number of requests a second")
    if n is not None and n < 1:
        raise ValueError(f"requests={n} must be at least 1")
    module = format_of(path)
    ours: dict[str, Any] = {"seed": seed, "rate": rate}
    taken = [item.name for item in inspect.signature(module.load).parameters.values() if item.kind is item.KEYWORD_ONLY]
    given = {key: value for key, value in ours.items() if key in taken}
    for key, value in (options or {}).items():
        if key in ours or key not in taken:
            known = ", ".join(name for name in taken if name not in ours) or "none"
            raise ValueError(f"{key}={value} is no option of {module.ABOUT}; known: {known}")
        given[key] = value
    found: Requests = module.load(path, n, **given)
    return found if rate is None or "rate" in taken else _at_rate(found, rate)


def _at_rate(requests: Requests, rate: float) -> Requests:
    """Return the requests with their times stretched to a rate; what follows an answer keeps its delay."""
    free = requests.after < 0
    first = requests.arrival_s[free]
    span = float(first[-1] - first[0]) if len(first) > 1 else 0.0
    if not span:
        raise ValueError("rate cannot stretch a trace whose requests all come at once; leave it out")
    scale = (len(first) - 1) / span * (len(requests) / len(first)) / rate
    return replace(requests, arrival_s=np.where(free, (requests.arrival_s - first[0]) * scale, requests.arrival_s))
