"""Results on stdout: for people as text, for programs as JSON or CSV."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

    from studies.options import Format

SCHEMA_VERSION: Final = 1
"""Of the JSON output; it changes when a key changes its meaning or goes away."""
PIPED_WIDTH: Final = 100
"""Columns of text that no terminal shows."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a command found.

    Parameters
    ----------
    command : str
        The command.
    inputs : mapping
        What was asked, resolved.
    values : mapping
        The keys of the JSON interface.
    rows : callable
        Returns the rows of the CSV, all with the same keys.
    show : callable
        Prints the answer for people.
    """

    command: str
    inputs: Mapping[str, Any]
    values: Mapping[str, Any]
    rows: Callable[[], Sequence[Mapping[str, Any]]]
    show: Callable[[Console], None]


def emit(answer: Answer, wanted: Format) -> None:
    """Print an answer in the format that is wanted."""
    if wanted.json:
        _print_json(answer)
    elif wanted.csv:
        _print_csv(answer.rows())
    else:
        terminal = console()
        with terminal.capture() as captured:  # Rich would stop the process at a closed pipe
            answer.show(terminal)
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _print_json(answer: Answer) -> None:
    import json

    head = {"schema_version": SCHEMA_VERSION, "command": answer.command, "version": version(), "inputs": answer.inputs}
    print(json.dumps({**head, **answer.values}, indent=2, allow_nan=False))


def _print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    import csv

    if not rows:
        return
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def console() -> Console:
    """Return where text for people goes: as wide as the terminal, plain where there is none."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def note(message: str) -> None:
    """Print a remark on stderr."""
    print(f"lvlm: {message}", file=sys.stderr)


def version() -> str:
    """Return the version of the installed distribution."""
    from importlib import metadata

    try:
        return metadata.version("lvlm-sim")
    except metadata.PackageNotFoundError:
        return "0+not-installed"


def flush() -> None:
    """Write out what stdout holds; where nobody reads, let it go without a word.

    Raises
    ------
    OSError
        If it cannot be written for another reason, such as a full disk; what is left of it is let go too.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, sys.stdout.fileno())
        os.close(silent)
        if not isinstance(error, BrokenPipeError):
            raise


def prepare_streams() -> None:
    """Make sure that there are streams, and that characters which a terminal lacks do not stop a command."""
    if sys.stdout is None:  # closed by the shell: lvlm … >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
