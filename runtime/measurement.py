"""Measurement lines: what was timed, where, with what, as JSON lines (`*.jsonl`), one object a line.

What `shape` must give, by kind; everything else in it is kept as it is:

===================================== ==========================================================================
gemm                                  m, n, k
prefill_attention, encoder_attention  b, s, heads, kv_heads, head_dim; `kernel` names the family (fa3, eager, …)
decode_attention                      b, context, heads, kv_heads, head_dim; `kernel` as above
elementwise                           operator, and traffic_bytes, or rows and width of an operator in `VALUES`
collective                            algorithm, ranks, message_bytes (the whole buffer of one rank)
copy                                  direction (h2d, d2h, d2d), bytes
launch                                kind (eager, graph), kernels
preprocess                            part (decode, resize_normalise_patch, …) and pixels or width and height, or a
                                      request as below, for all of it
encode, adapt, prefill, decode_step   a request: model, batch, images [[width, height], …] or visual_tokens,
                                      text_tokens, output_tokens, context (keys that a decode step sees), tp, pp,
                                      dp, ep, weight_bits, activation_bits, kv_bits
===================================== ==========================================================================
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from costmodel.base import Frozen, FrozenMap
from costmodel.errors import first_line, one_line, shown

MeasuredKind = Literal[
    "gemm",
    "prefill_attention",
    "decode_attention",
    "encoder_attention",
    "elementwise",
    "collective",
    "copy",
    "launch",
    "preprocess",
    "encode",
    "adapt",
    "prefill",
    "decode_step",
    "technique",
]
KINDS: Final[tuple[str, ...]] = get_args(MeasuredKind)
SUFFIX: Final = ".jsonl"

Scalar: TypeAlias = bool | int | float | str
ShapeValue: TypeAlias = Scalar | tuple[Scalar | tuple[Scalar, ...], ...] | None
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]

HEADS: Final = ("heads", "kv_heads", "head_dim")
COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "gemm": ("m", "n", "k"),
    "prefill_attention": ("b", "s", *HEADS),
    "encoder_attention": ("b", "s", *HEADS),
    "decode_attention": ("b", "context", *HEADS),
    "collective": ("ranks", "message_bytes"),
    "copy": ("bytes",),
    "launch": ("kernels",),
}
"""Whole numbers that a shape must give."""
NAMES: Final = {"elementwise": "operator", "collective": "algorithm", "copy": "direction", "launch": "kind"}
"""The name that it must give."""
CHOICES: Final = {"copy": ("h2d", "d2h", "d2d"), "launch": ("eager", "graph")}
VALUES: Final = {"norm": 2, "rope": 2, "activation": 2, "gated_activation": 3, "add": 3, "softmax": 2, "copy": 2}
"""Values that an element-wise operator reads and writes for each that it gives."""
LARGEST: Final = 1e18
"""Larger numbers are slips."""
SIZES: Final = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes of a value by number format."""


class Measurement(Frozen):
    """One measured thing.

    Parameters
    ----------
    kind : str
        What was timed: a kernel, a copy, a launch or a stage; see `KINDS`.
    implementation : str
        Whose it is: ours, transformers, or a kernel library.
    shape : mapping
        Its size; see the module's docstring.
    precision : str
        Number format, such as bf16.
    samples_s : tuple of float
        Every timed run [s].
    peak_bytes : float or None
        Most device memory in use [bytes].
    power_w : float or None
        Mean power of the device while it ran [W].
    device, driver : str
        As the system calls them; no driver for a CPU.
    versions : mapping of str
        Of the software, by name.
    commit : str or None
        Of this repository.
    clocks : mapping of float
        What the device says of itself, in SI units and under the names of a hardware profile: `clock_hz` while it
        ran, and `core_count`, `l2_bytes`, `memory_bytes`, `tdp_w`.
    taken_at : str
        ISO 8601.
    """

    schema_version: Literal[1]
    kind: MeasuredKind
    implementation: Text
    shape: FrozenMap[ShapeValue]
    precision: Text
    samples_s: Annotated[tuple[Positive, ...], Field(min_length=1)]
    peak_bytes: NotNegative | None = None
    power_w: NotNegative | None = None
    device: Text
    driver: str | None = None
    versions: FrozenMap[str] = Field(default_factory=dict, validate_default=True)
    commit: str | None = None
    clocks: FrozenMap[float] = Field(default_factory=dict, validate_default=True)
    taken_at: str

    @field_validator("shape")
    @classmethod
    def _says_enough(cls, shape: Mapping[str, ShapeValue], info: ValidationInfo) -> Mapping[str, ShapeValue]:
        kind = info.data.get("kind")
        for key in _needed(str(kind), shape):
            if key not in shape:
                raise ValueError(f"of {kind} lacks {key!r}; see docs/measurements.md")
        for key in COUNTS.get(str(kind), ()):
            if not is_count(shape[key]):
                raise ValueError(f"of {kind} has {key}={shown(shape[key])}, which must be a whole number from 1")
        for key in ("traffic_bytes", "rows", "width", "height", "pixels", "batch"):
            if key in shape and not is_positive(shape[key]):
                raise ValueError(f"of {kind} has {key}={shown(shape[key])}, which must be a number above zero")
        if kind in CHOICES and shape[NAMES[kind]] not in CHOICES[kind]:
            name = NAMES[kind]
            raise ValueError(f"of {kind} has {name}={shown(shape[name])}; use one of {', '.join(CHOICES[kind])}")
        return shape

    @field_validator("precision")
    @classmethod
    def _has_a_width(cls, precision: str, info: ValidationInfo) -> str:
        shape = info.data.get("shape", {"traffic_bytes": None})
        if info.data.get("kind") == "elementwise" and "traffic_bytes" not in shape and precision not in SIZES:
            raise ValueError(f"has no known width, so shape must give traffic_bytes; known: {', '.join(SIZES)}")
        return precision

    @field_validator("taken_at")
    @classmethod
    def _is_a_time(cls, taken_at: str) -> str:
        try:
            datetime.fromisoformat(taken_at)
        except ValueError:
            raise ValueError("must be a time as ISO 8601 has it, such as 2026-11-25T22:41:42+00:00") from None
        return taken_at

    @property
    def median_s(self) -> float:
        """Median of the samples [s]."""
        return statistics.median(self.samples_s)

    def number(self, key: str) -> float:
        """Return a number of the shape, whole ones as int."""
        value = self.shape.get(key)
        if not is_positive(value):
            raise ValueError(f"shape of {self.kind} has {key}={shown(value)}, which must be a number above zero")
        return int(value) if float(value).is_integer() else value  # type: ignore[arg-type,return-value]

    @property
    def traffic_bytes(self) -> float:
        """Bytes that an element-wise operator reads and writes."""
        if "traffic_bytes" in self.shape:
            return self.number("traffic_bytes")
        values = VALUES[str(self.shape["operator"])] * SIZES[self.precision]
        return self.number("rows") * self.number("width") * values


def _needed(kind: str, shape: Mapping[str, ShapeValue]) -> Iterator[str]:
    """Yield the keys that a shape of this kind must have."""
    yield from COUNTS.get(kind, ())
    if kind in NAMES:
        yield NAMES[kind]
    if kind == "elementwise":
        named = shape.get("operator") in VALUES and "traffic_bytes" not in shape
        yield from ("rows", "width") if named else ("traffic_bytes",)
    if kind == "preprocess" and "part" in shape and "pixels" not in shape:
        yield from ("width", "height")


def is_positive(value: object) -> bool:
    """Return whether a value is a number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from one."""
    return is_positive(value) and float(value).is_integer()  # type: ignore[arg-type]


def read_measurements(path: Path) -> tuple[Measurement, ...]:
    """Return the lines of a file; empty ones are passed over.

    Raises
    ------
    ValueError
        If the file cannot be read, holds no line, or has bad ones: what is wrong with the first, by its number, and
        the numbers of the others.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read measurements {str(path)!r}: {first_line(error)}") from None
    found, bad = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                found.append(_read_line(line, f"{path} line {number}"))
            except ValueError as error:
                bad.append((number, error))
    if bad:
        others = ", ".join(str(number) for number, _ in bad[1:6]) + (", …" if len(bad) > 6 else "")  # noqa: PLR2004
        more = f" (and {len(bad) - 1} more bad lines: {others})" if others else ""
        raise ValueError(f"{bad[0][1]}{more}")
    if not found:
        raise ValueError(f"{path} holds no measurement line")
    return tuple(found)


def _read_line(line: str, source: str) -> Measurement:
    try:
        values: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON object: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} is no JSON object: {shown(values)}")  # noqa: TRY004 - bad input, not a slip of ours
    try:
        return Measurement.model_validate(values)
    except ValidationError as error:
        raise one_line(error, source) from None


def measurement_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of measurement lines among files and in folders, each once.

    Raises
    ------
    FileNotFoundError
        If a path leads nowhere.
    ValueError
        If a file has another suffix.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no folder or file {str(path)!r}; give measurement lines, *{SUFFIX}")
        if path.is_file() and path.suffix != SUFFIX:
            raise ValueError(f"{str(path)!r} is no file of measurement lines; it must end in {SUFFIX}")
        found |= dict.fromkeys([path] if path.is_file() else sorted(path.rglob(f"*{SUFFIX}")))
    return list(found)


def write_measurements(path: Path, measurements: Sequence[Measurement]) -> None:
    """Write measurements as lines."""
    lines = (json.dumps(line.model_dump(mode="json"), ensure_ascii=False) for line in measurements)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
