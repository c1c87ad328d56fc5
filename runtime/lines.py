"""Measurement lines as samples that curves are fitted to and compared with: kernels alone, grouped by curve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from costmodel.efficiency.fitted import ON_CPU
from costmodel.kernels import SINGLE, SINGLE_BITS
from runtime.measurement import COUNTS, Measurement
from runtime.recipes import BITS
from runtime.tables import Samples, kernel

HALF_BITS: Final = 16
ATTENTIONS: Final = ("prefill_attention", "encoder_attention", "decode_attention")
CURVED: Final = ("gemm", *ATTENTIONS, "elementwise", "collective")
"""Kinds of lines that have a curve."""


class CurveName(NamedTuple):
    """Which curve a line belongs to: kind, variant and kernel library."""

    kind: str
    variant: str
    library: str

    @property
    def text(self) -> str:
        """As tables show it, such as `vllm gemm.bf16`."""
        return f"{self.library} {self.kind}.{self.variant}"


def curve_name(line: Measurement) -> CurveName | None:
    """Return the curve that a line belongs to; None where its kind, its precision or an emptied cache has none.

    Products are told apart by precision, attention by family of kernel (`kernel` in the shape, as tables name them;
    a fused one without a name is `flash`) and decode also by whether heads share keys, the rest by what they do.
    """
    if line.kind not in CURVED or line.shape.get("cold"):
        return None
    if line.kind == "gemm":
        variant = f"{line.precision}{'' if line.driver else ON_CPU}"  # a CPU has no driver
        return CurveName(line.kind, variant, line.implementation) if line.precision in BITS else None
    if line.kind in ATTENTIONS:
        family = _family(str(line.shape.get("kernel") or ""))
        bits = BITS.get(line.precision)
        if bits not in (HALF_BITS, SINGLE_BITS):
            return None
        if line.kind == "decode_attention":
            shares = "mha" if line.number("heads") == line.number("kv_heads") else "gqa"
            family = f"{shares}.{family}"
        return CurveName(line.kind, f"{SINGLE if bits == SINGLE_BITS else ''}{family}", line.implementation)
    name = "operator" if line.kind == "elementwise" else "algorithm"
    return CurveName(line.kind, str(line.shape[name]), line.implementation)


def _family(named: str) -> str:
    known = kernel(named)
    return known if known != "flash" or not named or "flash" in named else named


def grouped(lines: Sequence[Measurement]) -> dict[CurveName, list[int]]:
    """Return the positions of the lines of every curve."""
    groups: dict[CurveName, list[int]] = {}
    for position, line in enumerate(lines):
        name = curve_name(line)
        if name is not None:
            groups.setdefault(name, []).append(position)
    return groups


def samples_of(name: CurveName, lines: Sequence[Measurement], files: Sequence[Path] = ()) -> Samples:
    """Return lines of one curve as samples: the median time of each.

    Parameters
    ----------
    name : CurveName
        Theirs.
    lines : sequence of Measurement
    files : sequence of Path
        Where they are from.
    """
    versions = {line.versions[name.library] for line in lines if name.library in line.versions}
    return Samples(
        kind=name.kind,
        variant=name.variant,
        library=name.library,
        version=", ".join(sorted(versions)),
        files=tuple(file.name for file in files),
        work=_columns(name.kind, lines),
        measured_s=np.array([line.median_s for line in lines]),
        origins=tuple(files),
    )


def _columns(kind: str, lines: Sequence[Measurement]) -> Mapping[str, NDArray[Any]]:
    if kind == "elementwise":
        traffic = np.array([line.traffic_bytes for line in lines], dtype=float)
        widths = [line.number("width") if "width" in line.shape else line.traffic_bytes for line in lines]
        operators = np.array([line.shape["operator"] for line in lines])
        return {"operator": operators, "width": np.array(widths, dtype=np.int64), "traffic_bytes": traffic}
    columns = {key: np.array([line.number(key) for line in lines], dtype=np.int64) for key in COUNTS[kind]}
    if kind == "gemm":
        columns["turns"] = np.array([line.number("turns") if "turns" in line.shape else 1 for line in lines])
    if kind == "collective":
        columns["algorithm"] = np.array([line.shape["algorithm"] for line in lines])
    return columns


def kernel_samples(lines: Sequence[Measurement], files: Sequence[Path] = ()) -> list[Samples]:
    """Return the samples of every curve that lines belong to."""
    return [samples_of(name, [lines[i] for i in rows], files) for name, rows in grouped(lines).items()]


def one_device(lines: Iterable[Measurement]) -> str:
    """Return the device that lines were taken on.

    Raises
    ------
    ValueError
        If there are several.
    """
    devices = sorted({line.device for line in lines})
    if len(devices) > 1:
        raise ValueError(f"the lines are of the devices {', '.join(map(repr, devices))}; give those of one")
    return devices[0]


def without_curve(lines: Iterable[Measurement]) -> list[str]:
    """Return what lines belong to no curve and why, one text a kind."""
    counts: dict[str, int] = {}
    for line in lines:
        if curve_name(line) is None:
            name = f"{line.kind}.{line.precision}" if line.kind in CURVED else line.kind
            counts[name] = counts.get(name, 0) + 1
    return [f"{name} ({_rows(rows)}: no curve)" for name, rows in counts.items()]


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"
