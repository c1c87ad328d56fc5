"""A cache in fewer bits, really packed: keys by channel, values by token, the last tokens as they are.

References
----------
.. [1] Z. Liu et al., "KIVI", ICML 2024 (arXiv:2402.02750): keys along channels, values along tokens, a residual window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from costmodel.errors import Unsupported
from costmodel.techniques.kv_quantize import FULL_BITS, KVQuantize
from runtime.attention import attend_behind
from runtime.techniques.plan import refuse

EIGHT: Final = 8
"""Bits that need no scale: numbers of four exponent and three mantissa bits (OCP 8-bit floating point, E4M3)."""
PACKED_BITS: Final = (2, 4)
WIDTHS: Final = (*PACKED_BITS, EIGHT, FULL_BITS)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Groups of numbers as codes of a few bits, several a byte, each group with scale and zero point.

    Parameters
    ----------
    codes : Tensor of uint8, shape (numbers * bits / 8,)
    scales, zeros : Tensor of float16, shape (..., groups, 1)
        A number is its code times the scale and the zero point.
    bits : int
    shape : tuple of int
        Of the grouped numbers, shape (..., groups, group).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    shape: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, bits: int) -> Packed:
        """Return numbers packed, the last axis being one group."""
        low, high = x.float().aminmax(dim=-1, keepdim=True)
        top = 2**bits - 1
        scales, zeros = ((high - low) / top).half(), low.half()
        steps = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
        codes = ((x.float() - zeros.float()) / steps).round().clamp(0, top).to(torch.uint8).flatten()
        shifts = torch.arange(0, EIGHT, bits, device=x.device, dtype=torch.uint8)
        whole = (torch.unflatten(codes, 0, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.uint8)
        return Packed(whole, scales, zeros, bits, tuple(x.shape))

    def unpacked(self) -> Tensor:
        """Return the numbers in single precision."""
        shifts = torch.arange(0, EIGHT, self.bits, device=self.codes.device, dtype=torch.uint8)
        codes = (self.codes[:, None] >> shifts) & (2**self.bits - 1)
        return torch.addcmul(self.zeros.float(), codes.reshape(self.shape).float(), self.scales.float())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""
        return self.codes, self.scales, self.zeros


Read = Callable[[], Tensor]


def by_channel(x: Tensor, group: int) -> Tensor:
    """Return keys as groups of one channel over tokens, shape (1, kv_heads, tokens / group, head_dim, group)."""
    return torch.unflatten(x, 2, (-1, group)).transpose(-1, -2)


def from_channels(x: Tensor) -> Tensor:
    """Return grouped keys as they were."""
    return x.transpose(-1, -2).flatten(2, 3)


def by_token(x: Tensor, group: int) -> Tensor:
    """Return values as groups of `group` neighbouring numbers of one token, shape (1, tokens, width / group, group)."""
    return torch.unflatten(x.transpose(1, 2).flatten(-2), -1, (-1, group))


def from_tokens(x: Tensor, kv_heads: int) -> Tensor:
    """Return grouped values as they were."""
    return torch.unflatten(x.flatten(-2), -1, (kv_heads, -1)).transpose(1, 2)


class QuantizedStore:
    """Tokens in narrow numbers, and behind them the last ones at full width.

    A group of tokens is packed as soon as the residual window is full without it; fewer tokens than a group wait.
    """

    def __init__(self, parameters: KVQuantize, k: Tensor, v: Tensor) -> None:
        self.group, self.residual = int(parameters.group), int(parameters.residual_tokens)
        self.key_bits, self.value_bits = int(parameters.key_bits), int(parameters.value_bits)
        self.kv_heads = k.shape[1]
        self.keys, self.values = k, v
        self.narrow: list[tuple[Packed | Tensor, Packed | Tensor]] = []
        self.settle()

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens at full width."""
        self.keys, self.values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)

    def drop(self, count: int) -> None:
        """Forget the last tokens, which were not packed yet."""
        if count:
            self.keys, self.values = self.keys[:, :, :-count].clone(), self.values[:, :, :-count].clone()

    @property
    def _unit(self) -> int:
        """Tokens that are packed together: numbers without a scale of their own wait for none."""
        return self.group if {self.key_bits, self.value_bits} & set(PACKED_BITS) else 1

    def settle(self) -> None:
        """Pack what the residual window leaves, in whole groups."""
        count = max(self.keys.shape[2] - self.residual, 0) // self._unit * self._unit
        if count:
            k, v = self.keys[:, :, :count], self.values[:, :, :count]
            self.narrow.append((self._keys(k), self._values(v)))
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    def _keys(self, k: Tensor) -> Packed | Tensor:
        if self.key_bits in PACKED_BITS:
            return Packed.of(by_channel(k, self.group), self.key_bits)
        return k.to(torch.float8_e4m3fn) if self.key_bits == EIGHT else k.clone()

    def _values(self, v: Tensor) -> Packed | Tensor:
        if self.value_bits in PACKED_BITS:
            return Packed.of(by_token(v, self.group), self.value_bits)
        return v.to(torch.float8_e4m3fn) if self.value_bits == EIGHT else v.clone()

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens, widened."""
        dtype = self.keys.dtype
        keys, values = [], []
        for k, v in self.narrow:
            keys.append((from_channels(k.unpacked()) if isinstance(k, Packed) else k).to(dtype))
            values.append((from_tokens(v.unpacked(), self.kv_heads) if isinstance(v, Packed) else v).to(dtype))
        return torch.cat((*keys, self.keys), 2), torch.cat((*values, self.values), 2)

    def attend(self, q: Tensor, *, scale: float | None) -> Tensor:
        """Return the attention of the last tokens; the widened copy is gone behind it."""
        return attend_behind(q, *self.read(), scale=scale)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Codes, scales and zero points, and the residual window."""
        found = [self.keys, self.values]
        for pair in self.narrow:
            for part in pair:
                found += part.tensors if isinstance(part, Packed) else (part,)
        return found


class Quantizer:
    """Makes narrow stores.

    Parameters
    ----------
    parameters : KVQuantize
    kv_width : int
        Numbers of the keys of one token.
    """

    def __init__(self, parameters: KVQuantize, kv_width: int) -> None:
        refuse(parameters, neutral={"visual_only": False, "transform": "none", "fused": True})
        for field in ("key_bits", "value_bits"):
            if getattr(parameters, field) not in WIDTHS:
                bits = ", ".join(map(str, WIDTHS))
                raise Unsupported(f"KVQuantize.{field}={getattr(parameters, field)!r} does not run; use one of {bits}")
        packs = {parameters.key_bits, parameters.value_bits} & set(PACKED_BITS)
        group = parameters.group
        if packs and (group != int(group) or not group or group % 4 or kv_width % group):
            rule = f"must be a multiple of four that divides the {kv_width} numbers of a token's keys"
            raise Unsupported(f"KVQuantize.group={group!r} {rule}; use another group")
        self.parameters = parameters

    def store(self, k: Tensor, v: Tensor) -> QuantizedStore:
        """Return the store of a prompt."""
        return QuantizedStore(self.parameters, k, v)
