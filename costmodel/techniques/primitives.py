"""The kinds of rewrite: one class a file of this folder, found by the name of the file."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from costmodel.errors import Unsupported

NUMERIC: Final = frozenset({"Array", "None", "Quantity", "bool", "float", "int"})
"""Words of annotations that no text fits."""
PACKAGE: Final = __name__.rpartition(".")[0]


def primitive_names() -> tuple[str, ...]:
    """Return the names of the primitives: those of the files with a class of their name."""
    return load_kinds()


@functools.cache
def load_kinds() -> tuple[str, ...]:
    """Return the names of the primitives, found once."""
    path = importlib.import_module(PACKAGE).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path) if _class_in(module.name) is not None))


@functools.cache
def load_primitive(kind: str) -> type[Any]:
    """Return the class of a primitive, such as `TokenReduce` for `token_reduce`.

    Raises
    ------
    Unsupported
        If no file has this name, or a class of it.
    """
    path = importlib.import_module(PACKAGE).__path__
    found = _class_in(kind) if kind in {module.name for module in pkgutil.iter_modules(path)} else None
    if found is None:
        known = ", ".join(primitive_names()) or "none"
        raise Unsupported(f"primitive={kind!r} is not modelled; known: {known}")
    return found


def _class_in(kind: str) -> type[Any] | None:
    """Return the class of a file that is named as the file is, but for case and underscores; None without one."""
    wanted = kind.replace("_", "")
    module = importlib.import_module(f"{PACKAGE}.{kind}")
    owned = (
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    )
    return next((cls for cls in owned if cls.__name__.lower() == wanted), None)


@functools.cache
def load_fields(kind: str) -> Mapping[str, str]:
    """Return the fields of a primitive with their annotations, its name left out."""
    return {
        field.name: str(field.type) for field in fields(load_primitive(kind)) if field.init and field.name != "name"
    }


@functools.cache
def load_is_named(kind: str) -> bool:
    """Return whether a primitive can be given the name of a method."""
    return any(field.name == "name" and field.init for field in fields(load_primitive(kind)))


def converted(value: Any, annotation: str, label: str) -> Any:  # noqa: ANN401 - what a file or a command line holds
    """Return a value as a field wants it: lists as tuples, `8:0.5/16:0.25` as pairs, whole numbers as such.

    Raises
    ------
    ValueError
        If text is given for something that is no text.
    """
    if isinstance(value, list | tuple):
        return tuple(converted(part, annotation, label) for part in value)
    if isinstance(value, str):
        return _from_text(value, annotation, label)
    if isinstance(value, float) and value.is_integer() and "int" in annotation and "float" not in annotation:
        return int(value)
    return value


def _from_text(text: str, annotation: str, label: str) -> Any:  # noqa: ANN401
    if "bool" in annotation and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none" and "None" in annotation:
        return None
    if "tuple" in annotation or "Sequence" in annotation:
        return _numbers(text, label)
    if set(re.findall(r"\w+", annotation)) <= NUMERIC:
        raise ValueError(f"{label}={text!r} must be a number; give it as one")
    return text


def _numbers(text: str, label: str) -> tuple[Any, ...]:
    """Return `8:0.5/16:0.25` as ((8, 0.5), (16, 0.25)), and `0.2/0.1` as (0.2, 0.1)."""
    try:
        rows = [[float(part) for part in row.split(":")] for row in text.split("/")]
    except ValueError:
        raise ValueError(f"{label}={text!r} must read 8:0.5/16:0.25, or 0.2/0.1") from None
    return tuple(row[0] if len(row) == 1 else (_whole(row[0]), *row[1:]) for row in rows)


def _whole(number: float) -> float:
    """Return a layer as a whole number, if it is one."""
    return int(number) if number.is_integer() else number
