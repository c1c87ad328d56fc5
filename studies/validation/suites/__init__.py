"""The suites of `lvlm validate`, one file each, found by themselves: a module with `evaluate(data) -> Suite`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from costmodel.errors import unknown
from studies.validation.rows import Suite


def suite_names() -> list[str]:
    """Return the names of the suites: those of the files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def run_suites(names: Sequence[str] = (), data: Path | None = None) -> list[Suite]:
    """Return what suites find.

    Parameters
    ----------
    names : sequence of str
        Suites; all of them when none is named.
    data : Path, optional
        A folder of raw tables, for the suites that can use one.

    Raises
    ------
    LookupError
        If a suite is unknown.
    """
    known = suite_names()
    for name in names:
        if name not in known:
            raise unknown("suite", name, known)
    chosen = names or known
    modules = [importlib.import_module(f"{__name__}.{name}") for name in chosen]
    return [module.evaluate(data) for module in modules]
