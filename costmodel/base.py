"""Frozen base classes and the array type that every formula accepts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Self, TypeAlias, TypeVar

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

    def __copy__(self) -> Self:
        """Return a copy without what cached properties found: `model_copy` may give it other fields."""
        copied = super().__copy__()
        for name in set(copied.__dict__) - set(type(self).model_fields):
            del copied.__dict__[name]
        return copied


class Foreign(BaseModel):
    """A value read from somebody else's file: immutable; keys we do not use are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), defer_build=True)


def _freeze(mapping: Mapping[str, Value]) -> Mapping[str, Value]:
    return MappingProxyType(dict(mapping))


FrozenMap: TypeAlias = Annotated[Mapping[str, Value], AfterValidator(_freeze), PlainSerializer(dict)]
"""A mapping that cannot be changed after validation."""
