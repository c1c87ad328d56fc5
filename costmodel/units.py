"""Constants of measure; everything inside the packages is in SI base units."""

from __future__ import annotations

from typing import Final

BITS_PER_BYTE: Final = 8
SECONDS_PER_HOUR: Final = 3600.0
JOULES_PER_KWH: Final = 3.6e6
UNBOUNDED: Final = 1e18
"""A token count that no request reaches: the window or chunk of something that has none (finite, so 0 * it is 0)."""
PIXEL_BYTES: Final = 4
"""One value of a processed picture: `transformers` processors give 32-bit floats [bytes]."""
CHANNELS: Final = 3
"""Values of a pixel."""
TINY = 1e-300
"""Divisor in place of zero, where what is divided is zero too."""
