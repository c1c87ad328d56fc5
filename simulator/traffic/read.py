"""Traces of others, replayed: which module of this package reads a file is found by asking each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np

import simulator.traffic as package
from simulator.request import Requests

NOT_FORMATS: Final = frozenset({"arrivals", "presets", "read", "sessions", "shapes"})
HEAD_BYTES: Final = 4096
"""What a reader sees of a file to say whether it is its own."""


def formats() -> Sequence[ModuleType]:
    """Return the readers: modules with `ABOUT`, `matches(head)` and `load(path)`."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in NOT_FORMATS)
    return [importlib.import_module(f"simulator.traffic.{name}") for name in names]


def format_names() -> list[str]:
    """Return the names of the trace formats."""
    return [module.__name__.rpartition(".")[2] for module in formats()]


def read(path: str | Path, *, rate: float | None = None, n: int | None = None) -> Requests:
    """Return the requests of a trace.

    Parameters
    ----------
    path : str or Path
        The file.
    rate : float, optional
        Mean requests a second to which the times are stretched.
    n : int, optional
        Requests that are kept, from the first.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If no reader knows it.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise FileNotFoundError(f"no trace {str(path)!r}; give a file, or a workload: see lvlm workloads") from None
    except IsADirectoryError:
        raise ValueError(f"trace={str(path)!r} is a folder; give a file in it") from None
    for module in formats():
        if module.matches(head):
            found: Requests = module.load(path, n)
            return found if rate is None else _at_rate(found, rate)
    known = "; ".join(module.ABOUT for module in formats())
    raise ValueError(f"trace={str(path)!r} is in no known format; known: {known}")


def _at_rate(requests: Requests, rate: float) -> Requests:
    """Return the requests with their times stretched to a rate."""
    span = float(requests.arrival_s[-1] - requests.arrival_s[0]) if len(requests) > 1 else 0.0
    if rate <= 0 or not np.isfinite(rate):
        raise ValueError(f"rate={rate!r} must be a positive number of requests a second")
    if not span:
        raise ValueError("rate cannot stretch a trace whose requests all come at once; leave it out")
    scale = (len(requests) - 1) / span / rate
    return replace(requests, arrival_s=(requests.arrival_s - requests.arrival_s[0]) * scale)
