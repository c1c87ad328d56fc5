"""Devices: datasheet facts, every one with a source, and what-if changes of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from costmodel.base import Frozen, FrozenMap
from costmodel.errors import Unsupported, one_line, unknown
from costmodel.packaged import packaged_texts
from costmodel.sources import Source, SourceKind, by_source_kind, require_sources

Positive = Annotated[float, Field(ge=1e-9, le=1e21)]
"""A number that some device may have in SI units: nothing slower than a nanohertz, nothing beyond a zetta."""

PRECISIONS_BY_BITS: Mapping[int, tuple[str, ...]] = {
    32: ("fp32", "tf32"),
    16: ("bf16", "fp16", "fp32"),
    8: ("fp8", "int8"),
    4: ("fp4", "int4"),
}
"""Formats that a matrix product of this width may run in, the preferred one first. A 16-bit product also runs, slower,
in a wider format; a narrower one than the device has does not."""


class Link(Frozen):
    """A link between devices, or between a device and its host.

    Parameters
    ----------
    bandwidth_bytes_per_s : float
        One direction, one device.
    latency_s : float
        Time of an empty message.
    devices : int
        Devices of the usual node that it connects.
    topology : {"switch", "mesh", "ring", "torus", "host"}
        How they are connected; a mesh links every pair, a torus neighbours in two or three dimensions.
    """

    kind: Literal["nvlink", "pcie", "xgmi", "infiniband", "ethernet", "socket", "ici", "hccs"]
    bandwidth_bytes_per_s: Positive
    latency_s: Annotated[float, Field(ge=0)]
    devices: Annotated[int, Field(ge=1)]
    topology: Literal["switch", "mesh", "ring", "torus", "host"]

    def rate_bytes_per_s(self, n_devices: int) -> float:
        """Return what one device sends to so many others at once, itself counted [bytes/s].

        In a mesh every pair has its own share of the device's bandwidth, so fewer peers get less of it.
        """
        used = (n_devices - 1) / (self.devices - 1) if self.topology == "mesh" else 1.0
        return self.bandwidth_bytes_per_s * used


class HardwareProfile(Frozen):
    """One device as its maker describes it.

    Parameters
    ----------
    memory_bytes, memory_bandwidth_bytes_per_s, l2_bytes : float
        Device memory, its bandwidth, and the cache that feeds the cores.
    core_count : int
        Streaming multiprocessors, compute units or CPU cores.
    clock_hz : float
        Clock at which the peak rates are quoted.
    tdp_w, idle_w : float
        Power limit, and power at rest.
    host_speed : float
        Speed of one core of the usual host, over that of an AMD EPYC 7742, on which host times of engines are stated.
    price_usd_per_s : float or None
        List price of one device; None where no public one is known.
    peak_flops_per_s : mapping
        Dense matrix rates by number format; never sparse, never extrapolated.
    links : tuple of Link
        Scale-up link first.
    sources : tuple of Source
        A number that no source covers does not load.
    """

    schema_version: Literal[1]
    name: str
    title: str
    vendor: str
    generation: str
    kind: Literal["gpu", "cpu", "accelerator"]
    memory_bytes: Positive
    memory_bandwidth_bytes_per_s: Positive
    l2_bytes: Positive
    core_count: Annotated[int, Field(gt=0)]
    clock_hz: Positive
    tdp_w: Positive
    idle_w: Annotated[float, Field(ge=0)] = 0.0
    host_speed: Positive = 1.0
    price_usd_per_s: Positive | None = None
    peak_flops_per_s: FrozenMap[Positive]
    links: tuple[Link, ...] = ()
    sources: tuple[Source, ...]
    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """Where it was read from, if not from the catalogue: fitted curves may lie beside it."""
        return self._file

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Return whether another profile says the same, wherever both were read from."""
        fields = type(self).model_fields
        return isinstance(other, HardwareProfile) and all(getattr(self, x) == getattr(other, x) for x in fields)

    def read_from(self, file: Path) -> HardwareProfile:
        """Return the same profile, which knows its file."""
        copied = self.model_copy()
        copied._file = file  # noqa: SLF001 - of its own class
        return copied

    @model_validator(mode="after")
    def _every_number_has_a_source(self) -> HardwareProfile:
        require_sources((key for key, _ in self.numbers()), self.sources)
        known = {name for names in PRECISIONS_BY_BITS.values() for name in names}
        foreign = sorted(set(self.peak_flops_per_s) - known)
        if foreign or not self.peak_flops_per_s:
            raise ValueError(f"peak_flops_per_s has {foreign or 'no entry'}; known formats: {', '.join(sorted(known))}")
        return self

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Yield every number of the profile under its dotted key."""
        for key in self.model_fields_set - {"schema_version", "peak_flops_per_s", "links", "sources"}:
            value = getattr(self, key)
            if isinstance(value, int | float):
                yield key, value
        for precision, rate in self.peak_flops_per_s.items():
            yield f"peak_flops_per_s.{precision}", rate
        for link in self.links:
            for key in ("bandwidth_bytes_per_s", "latency_s", "devices"):
                yield f"links.{link.kind}.{key}", getattr(link, key)

    @functools.cached_property
    def provenance(self) -> Mapping[SourceKind, tuple[str, ...]]:
        """The keys of all numbers by how sure they are."""
        return by_source_kind((key for key, _ in self.numbers()), self.sources)

    def precision(self, bits: int) -> str:
        """Return the number format in which a matrix product of this width runs.

        Raises
        ------
        Unsupported
            If the device has no matrix unit for it.
        """
        for name in PRECISIONS_BY_BITS.get(bits, ()):
            if name in self.peak_flops_per_s:
                return name
        able = sorted(b for b, names in PRECISIONS_BY_BITS.items() if set(names) & set(self.peak_flops_per_s))
        widths = ", ".join(str(b) for b in able)
        raise Unsupported(f"activation_bits={bits} has no matrix unit on {self.name}, which has {widths} bits")

    def host_link(self) -> Link:
        """Return the link to the host.

        Raises
        ------
        Unsupported
            If the profile has none.
        """
        found = [link for link in self.links if link.kind == "pcie"]
        if not found:
            raise Unsupported(f"{self.name} has no link to its host in its profile; keep everything on the device")
        return max(found, key=lambda link: link.bandwidth_bytes_per_s)

    def link(self, devices: int) -> Link:
        """Return the fastest link that joins this many devices.

        Raises
        ------
        Unsupported
            If no link of the node joins that many.
        """
        able = [link for link in self.links if link.devices >= devices]
        if not able:
            most = max((link.devices for link in self.links), default=1)
            raise Unsupported(
                f"tp={devices} has no link on {self.name}, whose node joins {most}; use tp={most} or less"
            )
        return max(able, key=lambda link: link.rate_bytes_per_s(devices))


@functools.cache
def load_catalogue() -> Mapping[str, str]:
    """Return the text of every device file of the catalogue by name."""
    return packaged_texts("hardware_profiles", suffix=".toml")


def hardware_names() -> list[str]:
    """Return the names of the devices in the catalogue."""
    return list(load_catalogue())


def load_hardware(name: str) -> HardwareProfile:
    """Return a device.

    Parameters
    ----------
    name : str
        A name of the catalogue, the path of a TOML file, or `name:key=value,…` for a what-if, such as
        `h100-sxm5-80gb:memory_bandwidth_bytes_per_s=4e12,peak_flops_per_s.fp8=2.5e15`.

    Raises
    ------
    LookupError
        If the catalogue has no such device.
    ValueError
        If the file or a what-if key is wrong.

    Examples
    --------
    >>> load_hardware("a100-sxm4-80gb").peak_flops_per_s["bf16"]
    312000000000000.0
    """
    return _load_known(name) if name in load_catalogue() else _load(name)


@functools.cache
def _load_known(name: str) -> HardwareProfile:
    return _load(name)


def _load(name: str) -> HardwareProfile:
    import tomllib  # needed for files alone

    base, colon, changes = name.partition(":")
    if colon and not changes:
        raise ValueError(f"hardware {name!r} ends in ':'; leave it out, or change something: {name}tdp_w=500")
    text, source = _text(base)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source} is no TOML file: {error}") from None
    if changes:
        _apply(values, changes, name)
    try:
        profile = HardwareProfile.model_validate(values)
    except ValidationError as error:
        raise one_line(error, source) from None
    return profile.read_from(Path(base)) if base.endswith(".toml") else profile


def _text(base: str) -> tuple[str, str]:
    path = Path(base)
    if path.suffix == ".toml":
        try:
            return path.read_text(encoding="utf-8"), base
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read hardware file {base!r}: {error}") from None
    if base not in load_catalogue():
        raise unknown("hardware", base, load_catalogue())
    return load_catalogue()[base], base


def _apply(values: dict[str, Any], changes: str, name: str) -> None:
    """Write what-if values into the profile, each with itself as its source."""
    keys = []
    for change in changes.split(","):
        key, equals, text = change.partition("=")
        _set(values, key.strip(), _number(text, change) if equals else None, change)
        keys.append(key.strip())
    what_if = {"kind": "assumed", "title": "what-if of the user", "covers": keys}
    values["sources"] = [what_if, *values["sources"]]
    values["name"] = name


def _number(text: str, change: str) -> float | int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"what-if {change!r} needs a number behind '=', such as tdp_w=500")
    return int(number) if number.is_integer() and abs(number) < 1e9 else number  # noqa: PLR2004 - counts stay whole


def _set(values: dict[str, Any], key: str, number: float | None, change: str) -> None:
    if number is None:
        raise ValueError(f"what-if {change!r} must read key=value, such as memory_bandwidth_bytes_per_s=4e12")
    head, _, rest = key.partition(".")
    if head == "peak_flops_per_s" and rest:
        values["peak_flops_per_s"][rest] = number
        return
    if head == "links" and rest:
        kind, _, field = rest.partition(".")
        links = [link for link in values.get("links", []) if link["kind"] == kind]
        if links and field in links[0]:
            links[0][field] = number
            return
    known = {k for k, v in values.items() if isinstance(v, int | float)} - {"schema_version"}
    known |= {f"peak_flops_per_s.{p}" for p in values["peak_flops_per_s"]}
    known |= {f"links.{x['kind']}.{f}" for x in values.get("links", []) for f in ("bandwidth_bytes_per_s", "latency_s")}
    optional = {"price_usd_per_s", "idle_w", "host_speed"}
    if key not in known | optional:
        raise unknown("what-if key", key, known | optional)
    values[key] = number
