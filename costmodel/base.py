"""Frozen base classes and the array type that every formula accepts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer

Array: TypeAlias = NDArray[np.float64]
Quantity: TypeAlias = float | Array
"""A number or an array of numbers: every formula takes either, so a sweep is a call with an array."""

Value = TypeVar("Value")


class Frozen(BaseModel):
    """A value read from our own files or a user's TOML: immutable, and no key is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a changed copy, which works out again what was cached."""
        copied = super().model_copy(update=update, deep=deep)
        for name in set(vars(copied)) - set(type(copied).model_fields):
            del vars(copied)[name]
        return copied


class Foreign(BaseModel):
    """A value read from somebody else's file: immutable; keys we do not use are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), defer_build=True)


def _freeze(mapping: Mapping[str, Value]) -> Mapping[str, Value]:
    return MappingProxyType(dict(mapping))


FrozenMap: TypeAlias = Annotated[Mapping[str, Value], AfterValidator(_freeze), PlainSerializer(dict)]
"""A mapping that cannot be changed after validation."""
