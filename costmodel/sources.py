"""Where numbers come from: a number without a source does not load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

from costmodel.base import Frozen

SourceKind = Literal["datasheet", "measured", "derived", "assumed"]


class Source(Frozen):
    """A source and the numbers that it covers.

    Parameters
    ----------
    kind : {"datasheet", "measured", "derived", "assumed"}
        How sure they are.
    title, url, note : str
        The document, where it is, and what to mind.
    covers : tuple of str
        Glob patterns over the dotted keys of the file.
    """

    kind: SourceKind
    title: str
    covers: tuple[str, ...]
    url: str = ""
    note: str = ""

    def covers_key(self, key: str) -> bool:
        """Return whether the number under this dotted key is this source's."""
        return any(fnmatchcase(key, pattern) for pattern in self.covers)


def require_sources(keys: Iterable[str], sources: Iterable[Source]) -> None:
    """Refuse numbers that no source covers.

    Raises
    ------
    ValueError
        If there are any, naming them.
    """
    given = tuple(sources)
    bare = [key for key in keys if not any(source.covers_key(key) for source in given)]
    if bare:
        raise ValueError(f"{', '.join(sorted(bare))} has no source; add a [[sources]] entry that covers it")


def by_source_kind(keys: Iterable[str], sources: Iterable[Source]) -> Mapping[SourceKind, tuple[str, ...]]:
    """Return the keys by the kind of the first source that covers each."""
    given = tuple(sources)
    groups: dict[SourceKind, list[str]] = {}
    for key in sorted(keys):
        kind = next(source.kind for source in given if source.covers_key(key))
        groups.setdefault(kind, []).append(key)
    return MappingProxyType({kind: tuple(names) for kind, names in sorted(groups.items())})
