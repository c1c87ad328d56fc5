"""What can go wrong.

::

    Exception
    ├── LookupError        a name nobody knows; the message lists the known ones
    ├── ValueError         a value that breaks a rule; the message says which and what to do
    │   └── Unsupported    a valid thing that this package does not model (yet)
    └── DoesNotFit         a model, batch or cache larger than the memory it is put in
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

MOST_SHOWN = 80
"""Characters of a wrong value that a message repeats."""


class Unsupported(ValueError):
    """A valid input whose cost is not modelled; never a silent zero."""


class DoesNotFit(Exception):
    """Something needs more memory than there is.

    Parameters
    ----------
    what : str
        What does not fit.
    required_bytes, available_bytes : float
        Needed and usable memory [bytes].
    """

    def __init__(self, what: str, *, required_bytes: float, available_bytes: float) -> None:
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        need, have = required_bytes / 1e9, available_bytes / 1e9
        super().__init__(
            f"{what} needs {need:.1f} GB and {have:.1f} GB are usable; use more GPUs, fewer bits or a smaller batch"
        )


def unknown(what: str, name: object, known: Iterable[str]) -> LookupError:
    """Return the error for a name that nobody knows, with the nearest known ones."""
    import difflib  # needed for errors alone

    names = sorted(known)
    near = difflib.get_close_matches(str(name)[:MOST_SHOWN].lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return LookupError(f"unknown {what} {shown(name)}{hint} known: {', '.join(names) or 'none'}")


def shown(value: object) -> str:
    """Return a wrong value as a message repeats it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def first_line(error: BaseException) -> str:
    """Return what somebody else's error says, cut to the start of its first line, or its kind when it says nothing."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][: 2 * MOST_SHOWN]


def one_line(error: ValidationError, source: str) -> ValueError:
    """Return a pydantic error as one line that names the file, the key and the rule."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    given = first.get("input")
    shown = " " if where else ""
    if where and not isinstance(given, dict | list):
        shown = f"={str(given)[:40]!r} "
    rule = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return ValueError(f"{source}: {where}{shown}{rule[:1].lower()}{rule[1:]}{more}")
