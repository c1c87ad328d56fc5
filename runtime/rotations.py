"""How positions turn queries and keys (RoPE): base, scaling, and which axis of the position each frequency reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from costmodel.base import Array
from costmodel.errors import Unsupported, shown

AXES: Final = 3
"""Of a position: time, row, column. Text has the same number on all of them."""
PLAIN: Final = ("default", "mrope")
"""Types without scaling; the second is an old name for sections."""
KNOWN_KEYS: Final = frozenset(
    {"rope_type", "type", "rope_theta", "factor", "mrope_section", "mrope_interleaved", "partial_rotary_factor"}
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotary position embedding.

    Parameters
    ----------
    head_dim : int
        Width that is rotated; two halves turn together.
    theta : float
        Base of the frequencies.
    factor : float
        Positions are divided by it.
    sections : tuple of int
        Frequencies that read time, row and column; none where positions have one axis.
    interleaved : bool
        Whether the axes alternate instead of following each other.

    References
    ----------
    .. [1] J. Su et al., "RoFormer", arXiv:2104.09864.
    .. [2] P. Wang et al., "Qwen2-VL", arXiv:2409.12191, section 2.1.
    """

    head_dim: int
    theta: float
    factor: float = 1.0
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def frequencies(self) -> Array:
        """Return the angle that each pair of numbers turns by a position, in single precision as published [rad]."""
        powers = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        inverse = 1.0 / np.power(np.float32(self.theta), powers, dtype=np.float32)
        return np.asarray(inverse / np.float32(self.factor), dtype=np.float32)

    def axes(self) -> list[int]:
        """Return the axis that each frequency reads."""
        if not self.sections:
            return [0] * (self.head_dim // 2)
        if not self.interleaved:
            return [axis for axis, length in enumerate(self.sections) for _ in range(length)]
        found = [0] * (self.head_dim // 2)
        for axis in range(1, AXES):
            for index in range(axis, self.sections[axis] * AXES, AXES):
                found[index] = axis
        return found


def read_rotation(text: Mapping[str, Any], *, head_dim: int, theta: float, sections: tuple[int, ...] = ()) -> Rotation:
    """Return the rotation that a text config asks for; flat (transformers 4) and nested (5) keys are read.

    Parameters
    ----------
    text : mapping
    head_dim : int
    theta : float
        Base where the config names none.
    sections : tuple of int
        Frequencies by axis where it names none.

    Raises
    ------
    Unsupported
        If it scales in a way that is not implemented.
    ValueError
        If its sections do not fill a head.
    """
    values = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in (*PLAIN, "linear"):
        raise Unsupported(f"rope_type={shown(kind)} is not implemented in the runtime; default and linear are")
    foreign = sorted(set(values) - KNOWN_KEYS)
    if foreign or values.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported(f"rope_parameters {foreign or 'partial_rotary_factor'} are not implemented in the runtime")
    sections = tuple(int(length) for length in values.get("mrope_section") or sections)
    if sections and (len(sections) != AXES or sum(sections) * 2 != head_dim):
        raise ValueError(f"mrope_section={list(sections)} must be {AXES} numbers that sum to half of {head_dim}")
    return Rotation(
        head_dim=head_dim,
        theta=float(values.get("rope_theta") or text.get("rope_theta") or theta),
        factor=float(values["factor"]) if kind == "linear" else 1.0,
        sections=sections,
        interleaved=bool(values.get("mrope_interleaved", False)),
    )
