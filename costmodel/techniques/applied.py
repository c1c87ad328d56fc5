"""A published method with its arguments: the primitives that it sets, ready to rewrite a query."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from costmodel.errors import Unsupported, unknown
from costmodel.query import Query
from costmodel.techniques.method import MethodFile, load_ids_by_name, load_method, load_method_texts, plain
from costmodel.techniques.primitives import (
    converted,
    load_fields,
    load_is_named,
    load_primitive,
    primitive_names,
)
from costmodel.techniques.protocol import ATTENTION_MAPS, AttentionMap, Primitive

VARIANT: Final = "variant"
"""The argument that names a published setting of a method's file."""


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """A published method with its arguments.

    Parameters
    ----------
    identity : str
        File of the method.
    file : MethodFile
        What is known of it.
    parts : tuple of Primitive
        The rewrites, in the order of the file.
    arguments : mapping
        What was asked for beyond the defaults; a variant as the arguments that it stands for.
    """

    identity: str
    file: MethodFile
    parts: tuple[Primitive, ...]
    arguments: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its id."""
        return self.identity

    @property
    def slot(self) -> str:
        """The place of its first rewrite; `compose` looks at all."""
        return self.parts[0].slot

    @property
    def stages(self) -> str:
        """The state that its first rewrite edits."""
        return self.parts[0].stages

    @property
    def needs_attention_map(self) -> AttentionMap:
        """The most that one of its rewrites must see."""
        return max((part.needs_attention_map for part in self.parts), key=ATTENTION_MAPS.index)

    @property
    def needs(self) -> frozenset[str]:
        """What it needs from the model or the request."""
        return frozenset(self.file.needs).union(*(part.needs for part in self.parts))

    @property
    def traits(self) -> frozenset[str]:
        """What decides whom it goes together with."""
        return frozenset(self.file.traits)

    def apply(self, query: Query) -> Query:
        """Return the query after its rewrites, in the order of its file."""
        for part in self.parts:
            query = part.apply(query)
        return query


def build(name: str, parameters: Mapping[str, Any]) -> Published | Primitive:
    """Return a method of the catalogue, or a primitive by its own name, with arguments.

    Raises
    ------
    LookupError
        If the name, a variant or a parameter is unknown.
    ValueError
        If a value that nobody published is not given.
    Unsupported
        If the method rewrites no query, or a primitive of it is not modelled.
    """
    identity = load_identity(name)
    if not identity:
        return _primitive(name, parameters)
    if not parameters and not load_method(identity).required:
        return load_default(identity)
    wanted = dict(parameters)
    if VARIANT in wanted:
        wanted = {**_variant(identity, wanted.pop(VARIANT)), **wanted}
    file = _rewriting(identity)
    changes = _by_part(identity, wanted)
    _require(identity, wanted)
    positions = range(len(file.primitives))
    parts = tuple(_changed(identity, i, changes[i]) if i in changes else load_part(identity, i) for i in positions)
    return Published(identity, file, parts, wanted)


@functools.cache
def load_identity(name: str) -> str:
    """Return the id of a method by one of its names; "" for the name of a primitive.

    Raises
    ------
    LookupError
        If nobody knows it.
    """
    if name in load_method_texts():
        return name
    if name in primitive_names():
        return ""
    found = load_ids_by_name().get(plain(name))
    if found is None:
        raise unknown("technique", name, load_method_texts())
    return found


@functools.cache
def load_default(identity: str) -> Published:
    """Return a method with the arguments of its file."""
    file = _rewriting(identity)
    return Published(identity, file, tuple(load_part(identity, i) for i in range(len(file.primitives))), {})


@functools.cache
def load_part(identity: str, position: int) -> Primitive:
    """Return one rewrite of a method with the arguments of its file."""
    return _made(load_method(identity).primitives[position].kind, load_values(identity, position))


@functools.cache
def load_values(identity: str, position: int) -> Mapping[str, Any]:
    """Return the fields that a method's file sets of one of its primitives, as the class wants them."""
    use = load_method(identity).primitives[position]
    return _converted(identity, use.kind, use.parameters)


def _rewriting(identity: str) -> MethodFile:
    file = load_method(identity)
    if not file.primitives:
        raise Unsupported(f"technique {identity!r} rewrites no request; {file.instead}")
    return file


@functools.cache
def load_arguments(identity: str) -> Mapping[str, tuple[int, str]]:
    """Return the arguments of a method: the primitive (by position) and the field that each sets."""
    found: dict[str, tuple[int, str]] = {}
    for position, use in enumerate(load_method(identity).primitives):
        for field in load_fields(use.kind):
            found.setdefault(use.prefix + field, (position, field))
    return found


def _require(identity: str, given: Collection[str]) -> None:
    """Refuse to go on without what nobody published."""
    for wanted in load_method(identity).required:
        names = wanted.split("|")
        if not any(name in given for name in names):
            example = f"{identity}:{names[0]}=…"
            raise ValueError(
                f"technique {identity!r}: {' or '.join(names)} was not published; give it, as in {example}"
            )


def _by_part(identity: str, wanted: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    known = load_arguments(identity)
    changes: dict[int, dict[str, Any]] = {}
    for argument, value in wanted.items():
        if argument not in known:
            raise unknown(f"parameter of technique {identity}", argument, (*known, VARIANT))
        position, field = known[argument]
        changes.setdefault(position, {})[field] = value
    return changes


def _variant(identity: str, variant: object) -> Mapping[str, Any]:
    name = f"{variant:g}" if isinstance(variant, float) else str(variant)
    variants = load_method(identity).variants
    if name not in variants:
        raise unknown(f"variant of technique {identity}", name, variants)
    return variants[name]


def _changed(identity: str, position: int, values: Mapping[str, Any]) -> Primitive:
    kind = load_method(identity).primitives[position].kind
    return _made(kind, {**load_values(identity, position), **_converted(identity, kind, values)})


def _primitive(kind: str, parameters: Mapping[str, Any]) -> Primitive:
    known = load_fields(kind)
    for argument in parameters:
        if argument not in known:
            raise unknown(f"parameter of technique {kind}", argument, known)
    return _made(kind, _converted(kind, kind, parameters))


def _converted(name: str, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    types = load_fields(kind)
    for field in values:
        if field not in types:
            raise unknown(f"field of primitive {kind} (in technique {name})", field, types)
    named = {"name": name} if load_is_named(kind) else {}
    return {**named, **{field: converted(value, types[field], f"{name}.{field}") for field, value in values.items()}}


def _made(kind: str, values: Mapping[str, Any]) -> Primitive:
    return cast("Primitive", load_primitive(kind)(**values))
