"""Engines: what the software adds to the hardware, as data."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from costmodel.base import Array, Frozen, FrozenMap, Quantity
from costmodel.blocks import Execution
from costmodel.errors import Unsupported, one_line, unknown
from costmodel.operators import Kind
from costmodel.packaged import packaged_texts
from costmodel.sources import Source, SourceKind, by_source_kind, require_sources
from costmodel.units import UNBOUNDED
from costmodel.workload import CODECS

LAUNCHED_STAGES: Final = ("encode", "prefill", "decode")
CODED: Final = tuple(codec for codec in CODECS if codec not in ("raw", "other"))
"""Codecs that an engine may state the decoding time of."""
DERIVED: Final = ("provenance", "execution", "by_kind", "spread", "_ideal")
"""Cached properties of a profile."""
Share = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


class KindEfficiency(Frozen):
    """How operators of one kind use a device.

    Parameters
    ----------
    compute_fraction, bandwidth_fraction : float
        Reached share of the matrix rate, and of the memory (or link) bandwidth.
    start_cycles : float
        Clock cycles that a kernel takes beyond its work.
    low, high : float or None
        Band of measured over predicted time, as shares of the prediction: 0.6 is 60 % slower.
    """

    compute_fraction: Share = 1.0
    bandwidth_fraction: Share = 1.0
    start_cycles: NotNegative = 0.0
    low: Annotated[float, Field(le=0, gt=-1)] | None = None
    high: NotNegative | None = None


class Preprocessing(Frozen):
    """What one CPU core needs for the pictures of a request, and how many cores work on them.

    Parameters
    ----------
    decode_s_per_pixel : mapping
        By codec (jpeg, png, webp), decoding an image file [s/pixel]; none where files come for nothing.
    frame_s_per_pixel : float
        Decoding one frame of a video [s/pixel].
    resize_s_per_pixel : float
        Resizing, normalising and cutting, by pixels after resizing [s/pixel].
    workers : int
        Cores that work on different requests at once.
    low, high : float
        Band, as in `KindEfficiency`.
    """

    decode_s_per_pixel: FrozenMap[NotNegative] = Field(default_factory=dict, validate_default=True)
    frame_s_per_pixel: NotNegative = 0.0
    resize_s_per_pixel: NotNegative = 0.0
    workers: Annotated[int, Field(ge=1)] = 1
    low: Annotated[float, Field(le=0, gt=-1)] | None = None
    high: NotNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        for codec in self.decode_s_per_pixel:
            if codec not in CODED:
                raise ValueError(f"decode_s_per_pixel.{codec} is no codec that is decoded; known: {', '.join(CODED)}")
        return self

    def numbers(self) -> Iterator[str]:
        """Yield the dotted key of every number that is set."""
        yield from (key for key in self.model_fields_set if key != "decode_s_per_pixel")
        yield from (f"decode_s_per_pixel.{codec}" for codec in self.decode_s_per_pixel)

    def decode_s(self, codec: str, pixels: Quantity) -> Quantity:
        """Return the time to decode so many pixels of image files [s].

        Raises
        ------
        Unsupported
            If rates are stated, and none for this codec.
        """
        if not self.decode_s_per_pixel or codec == "raw":
            return 0.0
        if codec not in self.decode_s_per_pixel:
            known = ", ".join((*self.decode_s_per_pixel, "raw"))
            message = f"codec={codec!r} of an image has no decoding time; give its size with a known one: {known}"
            raise Unsupported(message)
        return pixels * self.decode_s_per_pixel[codec]


class EngineProfile(Frozen):
    """One serving engine, or one way to idealise it.

    Parameters
    ----------
    pricing : {"operators", "equations"}
        Whether stages are lists of operators or the equations of the survey.
    counts_full_square : bool
        Whether causal attention is charged for the masked half too.
    executes_everything : bool
        Whether what `transformers` runs beyond need is run: vision layers behind the one that is read, padding, the
        expansion of every cached latent in each step.
    first_token_in_prefill : bool
        Whether the first output token belongs to prefill; otherwise every output token is a decode step.
    prefill_chunk_tokens : float
        Most tokens of prefill in one forward pass.
    encoder_chunk_tokens : float
        Most visual tokens encoded in one forward pass.
    kv_block_tokens : float
        Tokens of the smallest piece of cache that is allocated.
    step_host_s, request_host_s : float
        Time of the host that a decode step, and a prefill, waits for, where `HardwareProfile.host_speed` is one [s].
    sequence_host_s : float
        What each sequence of a step or prefill adds to that [s].
    layer_host_s : mapping
        By stage (encode, prefill, decode), the time in which the host issues the kernels of one layer [s]: a pass is
        not faster, unless it is replayed as a graph, as stages that are not named are.
    host_low, host_high : float or None
        Band of these times, as in `KindEfficiency`.
    software_low, software_high : float or None
        Band of whole stages on the device beyond the errors of their kernels, as in `KindEfficiency`.
    concatenates_cache : bool
        Whether a step writes the whole cache anew to append a token, instead of filling pages.
    repeats_heads : bool
        Whether keys and values are copied for every query head before attention.
    cache_adds_to_host : bool
        Whether what a decode step does to its cache comes on top of the host's time, instead of hiding behind it.
    fuses_elementwise : bool
        Whether norms, activations and rotations are one kernel each, not the several that PyTorch has for them.
    memory_fraction : float
        Share of the device memory that the engine may use.
    reserve_bytes : float
        Context, kernels and graphs [bytes].
    compute_power_fraction, memory_power_fraction : float
        Power while compute, and while memory, is the limit, as a share of the device's limit.
    carbon_g_per_j : float
        Carbon intensity of the grid [g CO2 / J].
    efficiency : mapping
        By kind of operator, the flat efficiency where no fitted curve describes it.
    kernels : mapping
        By kind of operator, the libraries whose kernels run it, the preferred first: `library`, or `library.kernel`
        where the library has several; see `costmodel.kernels`.
    preprocessing : Preprocessing
        What the host does to pictures.
    """

    schema_version: Literal[1]
    name: str
    title: str
    description: str
    pricing: Literal["operators", "equations"] = "operators"
    counts_full_square: bool = False
    executes_everything: bool = False
    first_token_in_prefill: bool = True
    prefill_chunk_tokens: Annotated[float, Field(ge=1)] = UNBOUNDED
    encoder_chunk_tokens: Annotated[float, Field(ge=1)] = UNBOUNDED
    kv_block_tokens: Annotated[float, Field(ge=1)] = 1.0
    step_host_s: NotNegative = 0.0
    request_host_s: NotNegative = 0.0
    sequence_host_s: NotNegative = 0.0
    layer_host_s: FrozenMap[NotNegative] = Field(default_factory=dict, validate_default=True)
    host_low: Annotated[float, Field(le=0, gt=-1)] | None = None
    host_high: NotNegative | None = None
    software_low: Annotated[float, Field(le=0, gt=-1)] | None = None
    software_high: NotNegative | None = None
    concatenates_cache: bool = False
    repeats_heads: bool = False
    cache_adds_to_host: bool = False
    fuses_elementwise: bool = True
    memory_fraction: Share = 1.0
    reserve_bytes: NotNegative = 0.0
    compute_power_fraction: Share
    memory_power_fraction: Share
    carbon_g_per_j: NotNegative
    efficiency: FrozenMap[KindEfficiency] = Field(default_factory=dict, validate_default=True)
    kernels: FrozenMap[tuple[str, ...]] = Field(default_factory=dict, validate_default=True)
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    sources: tuple[Source, ...]

    @model_validator(mode="after")
    def _check(self) -> EngineProfile:
        known = {kind.label for kind in Kind}
        for name, held in (("efficiency", self.efficiency), ("kernels", self.kernels)):
            foreign = sorted(set(held) - known)
            if foreign:
                raise ValueError(f"{name}.{foreign[0]} is no kind of operator; known: {', '.join(sorted(known))}")
        strange = sorted(set(self.layer_host_s) - set(LAUNCHED_STAGES))
        if strange:
            raise ValueError(f"layer_host_s.{strange[0]} is no stage with layers; known: {', '.join(LAUNCHED_STAGES)}")
        require_sources(self.numbers(), self.sources)
        return self

    def numbers(self) -> Iterator[str]:
        """Yield the dotted key of every number that the file sets."""
        for key in self.model_fields_set:
            value = getattr(self, key)
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "schema_version":
                yield key
        yield from (f"layer_host_s.{stage}" for stage in self.layer_host_s)
        for kind, efficiency in self.efficiency.items():
            yield from (f"efficiency.{kind}.{key}" for key in efficiency.model_fields_set)
        yield from (f"preprocessing.{key}" for key in self.preprocessing.numbers())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, other values laid over it, whose derived properties are worked out anew."""
        copied = super().model_copy(update=update, deep=deep)
        for name in DERIVED:
            copied.__dict__.pop(name, None)  # pydantic copies what was cached along with the fields
        return copied

    @functools.cached_property
    def provenance(self) -> Mapping[SourceKind, tuple[str, ...]]:
        """The keys of all numbers by how sure they are."""
        return by_source_kind(self.numbers(), self.sources)

    @functools.cached_property
    def execution(self) -> Execution:
        """How it runs what models leave open."""
        return Execution(
            self.executes_everything, self.concatenates_cache, self.repeats_heads, apart=not self.fuses_elementwise
        )

    @functools.cached_property
    def by_kind(self) -> Array:
        """Compute fraction, bandwidth fraction and start cycles of every kind, shape (3, n_kinds)."""
        rows = [self.kind(kind) for kind in Kind]
        return np.array([(e.compute_fraction, e.bandwidth_fraction, e.start_cycles) for e in rows]).T

    @functools.cached_property
    def spread(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Low and high of every kind and of preprocessing; None unless all are stated."""
        rows: list[KindEfficiency | Preprocessing] = [*(self.kind(kind) for kind in Kind), self.preprocessing]
        low = tuple(row.low for row in rows if row.low is not None)
        high = tuple(row.high for row in rows if row.high is not None)
        return (low, high) if len(low) == len(high) == len(rows) else None

    def kind(self, kind: Kind) -> KindEfficiency:
        """Return how operators of a kind use a device: as the datasheet says unless the file says otherwise."""
        return self.efficiency.get(kind.label, self._ideal)

    @functools.cached_property
    def _ideal(self) -> KindEfficiency:
        return KindEfficiency()


@functools.cache
def load_engine_texts() -> Mapping[str, str]:
    """Return the text of every engine file by name."""
    return packaged_texts("costmodel", "engines", suffix=".toml")


def engine_names() -> list[str]:
    """Return the names of the engines."""
    return list(load_engine_texts())


def engine_values(name: str) -> dict[str, Any]:
    """Return the values of an engine file; where it is `like` another, that one's stand for what it leaves out.

    Its own sources come first, so that they cover what it says itself.

    Raises
    ------
    LookupError
        If there is no file of this name.
    """
    import tomllib  # needed for files alone

    if name not in load_engine_texts():
        raise unknown("engine", name, load_engine_texts())
    values = tomllib.loads(load_engine_texts()[name])
    base = values.pop("like", None)
    if base is None:
        return values
    below = engine_values(base)
    return {**_over(below, values), "sources": [*values["sources"], *below["sources"]]}


def _over(below: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values laid over others, tables key by key."""
    merged = dict(below)
    for key, value in values.items():
        under = below.get(key)
        merged[key] = _over(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


@functools.cache
def load_engine(name: str) -> EngineProfile:
    """Return an engine.

    Raises
    ------
    LookupError
        If there is none of this name.
    """
    values = engine_values(name)
    try:
        return EngineProfile.model_validate(values)
    except ValidationError as error:
        raise one_line(error, f"engine {name}") from None
