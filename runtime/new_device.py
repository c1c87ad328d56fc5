"""The profile of a device that nobody has described yet, from what was measured on it.

Peak rates are the highest that were sustained: of products by number format, and of streams longer than the cache. A
datasheet's are higher; so fractions that are fitted to these are near one, and a flat efficiency of an engine, which is
a share of a datasheet's peak, takes the loss a second time. What lines cannot show must be given.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from costmodel.errors import one_line, unknown
from costmodel.hardware import PRECISIONS_BY_BITS, HardwareProfile, hardware_names
from runtime.lines import one_device
from runtime.measurement import SIZES, Measurement

FACTS: Final = ("memory_bytes", "l2_bytes", "core_count", "clock_hz", "tdp_w")
"""Numbers of a profile that no time shows."""
TEXTS: Final = ("kind", "vendor", "generation", "title")
BANDWIDTH: Final = "memory_bandwidth_bytes_per_s"
OTHERS: Final = (BANDWIDTH, "idle_w", "price_usd_per_s")
PEAK: Final = "peak_flops_per_s."
STREAM_OVER_CACHE: Final = 4.0
"""A stream must be this many times the last cache (the rule of J. McCalpin's STREAM benchmark)."""
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
HEAD: Final = """# Written by `lvlm calibrate new:…`: rates are measured ones, not a datasheet's.
"""
PEAK_NOTE: Final = (
    "{what}. Sustained, so below a datasheet's peak: fractions fitted to it are near one, and an engine's flat "
    "efficiency takes the loss twice."
)


@dataclass(frozen=True, slots=True)
class Rate:
    """A measured rate, and the line that it is from."""

    per_s: float
    note: str


@dataclass(frozen=True, slots=True)
class Shown:
    """What lines and a person say of a device.

    Parameters
    ----------
    title : str
        Of the lines, as a source.
    stated : mapping
        Numbers that a person gave.
    facts : mapping
        Numbers that no time shows, given or said by the device.
    peaks : mapping of Rate
        Of products by number format.
    stream : Rate or None
        Of device memory.
    link : mapping or None
        To the host.
    link_note : str
        What the link is from.
    """

    title: str
    stated: Mapping[str, float]
    facts: Mapping[str, Any]
    peaks: Mapping[str, Rate]
    stream: Rate | None
    link: Mapping[str, Any] | None
    link_note: str

    @staticmethod
    def of(lines: Sequence[Measurement], given: Mapping[str, float | str]) -> Shown:
        """Collect it."""
        facts = {key: value for key in FACTS if (value := _fact(key, lines, given)) is not None}
        days = sorted({line.taken_at.partition("T")[0] for line in lines})
        link, link_note = host_link(lines)
        return Shown(
            title=f"measurement lines of {one_device(lines)}, {' to '.join(dict.fromkeys((days[0], days[-1])))}",
            stated={key: value for key, value in given.items() if isinstance(value, int | float)},
            facts=facts,
            peaks=best_products(lines),
            stream=best_stream(lines, facts["l2_bytes"]) if "l2_bytes" in facts else None,
            link=link,
            link_note=link_note,
        )

    def missing(self) -> list[str]:
        """Return the numbers that a profile needs and nothing says."""
        found = [key for key in FACTS if key not in self.facts]
        if not self.peaks and not any(key.startswith(PEAK) for key in self.stated):
            found.append(f"{PEAK}bf16")
        if self.stream is None and BANDWIDTH not in self.stated and "l2_bytes" in self.facts:
            found.append(BANDWIDTH)
        return found

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of the profile: what is given before what was measured."""
        peaks = {precision: rate.per_s for precision, rate in self.peaks.items()}
        peaks |= {key.removeprefix(PEAK): value for key, value in self.stated.items() if key.startswith(PEAK)}
        plain = {key: value for key, value in self.stated.items() if not key.startswith(PEAK)}
        measured = {BANDWIDTH: self.stream.per_s} if self.stream else {}
        links = {"links": [dict(self.link)]} if self.link else {}
        return {**measured, **self.facts, **plain, "peak_flops_per_s": peaks, **links}

    def sources(self) -> list[dict[str, Any]]:
        """Return the source of every number; the first that covers one counts, so what is given comes first."""

        def measured(note: str, *covers: str) -> dict[str, Any]:
            return {"kind": "measured", "title": self.title, "note": note, "covers": list(covers)}

        told = [key for key in self.facts if key not in self.stated]
        by_hand = {"kind": "assumed", "title": "given by hand with --set", "covers": list(self.stated)}
        return [
            *([by_hand] if self.stated else []),
            *(measured(rate.note, f"{PEAK}{precision}") for precision, rate in self.peaks.items()),
            *([measured(self.stream.note, BANDWIDTH)] if self.stream else []),
            *([measured("What the device says of itself: clocks and versions of the lines.", *told)] if told else []),
            *([measured(self.link_note, "links.pcie.*")] if self.link else []),
        ]


def measured_profile(name: str, lines: Sequence[Measurement], given: Mapping[str, float | str]) -> dict[str, Any]:
    """Return a hardware profile as its file has it, checked.

    Parameters
    ----------
    name : str
        Of the new device.
    lines : sequence of Measurement
        Of this device.
    given : mapping
        What a person states: numbers of `FACTS`, `OTHERS` and `peak_flops_per_s.*`, and `TEXTS`.

    Raises
    ------
    ValueError
        If the name is taken or none, a number is missing or the lines are of several devices.
    LookupError
        If a key that is given is unknown.
    """
    _check_name(name)
    _check_given(given)
    device, found = one_device(lines), Shown.of(lines, given)
    kind = given.get("kind") or ("gpu" if any(line.driver for line in lines) else None)
    missing = [*found.missing(), *([] if kind else ["kind"])]
    if missing:
        raise ValueError(_what_is_missing(name, missing))
    values: dict[str, Any] = {
        "schema_version": 1,
        "name": name,
        "title": given.get("title", device),
        "vendor": given.get("vendor", "unknown"),
        "generation": given.get("generation", "unknown"),
        "kind": kind,
        **found.numbers(),
        "sources": found.sources(),
    }
    try:
        HardwareProfile.model_validate(values)
    except ValidationError as error:
        raise one_line(error, f"new:{name}") from None
    return values


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"new:{name} must be named in small letters, digits, '.', '_' and '-', such as new:my-gpu")
    if name in hardware_names():
        raise ValueError(f"new:{name} is in the catalogue; leave 'new:' out, or choose another name")


def _check_given(given: Mapping[str, float | str]) -> None:
    formats = [f"{PEAK}{name}" for names in PRECISIONS_BY_BITS.values() for name in names]
    numbers = {*FACTS, *OTHERS, *formats}
    for key, value in given.items():
        if key not in numbers and key not in TEXTS:
            raise unknown("key of --set", key, {*numbers, *TEXTS})
        if key in numbers and isinstance(value, str):
            raise ValueError(f"--set {key}={value!r} must be a number, such as {key}=80e9")


def _what_is_missing(name: str, missing: Sequence[str]) -> str:
    longer = f"; or measure a copy of at least {STREAM_OVER_CACHE:g} x l2_bytes" if BANDWIDTH in missing else ""
    flags = ",".join(f"{key}=…" for key in missing)
    return f"new:{name} lacks {', '.join(missing)}, which the lines do not show; give --set {flags}{longer}"


def _fact(key: str, lines: Sequence[Measurement], given: Mapping[str, float | str]) -> float | str | None:
    """Return a fact that is given, or that the lines state; a clock is their median, the rest must agree."""
    if key in given:
        return given[key]
    stated = [line.clocks[key] for line in lines if key in line.clocks]
    stated += [_number(key, line.versions[key]) for line in lines if key in line.versions]
    if not stated:
        return None
    if key == "clock_hz":
        return statistics.median(stated)
    if len(set(stated)) > 1:
        raise ValueError(f"{key} differs between the lines ({min(stated):g} and {max(stated):g}); give --set {key}=…")
    return int(stated[0]) if key == "core_count" else stated[0]


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"versions.{key}={text!r} must be a number; correct the line, or leave it out") from None


def best_products(lines: Sequence[Measurement]) -> dict[str, Rate]:
    """Return the highest sustained rate of products by number format [FLOP/s]."""
    known = [name for names in PRECISIONS_BY_BITS.values() for name in names]
    best: dict[str, Rate] = {}
    for line in lines:
        if line.kind == "gemm" and line.precision in known:
            m, n, k = (line.number(side) for side in ("m", "n", "k"))
            rate = 2 * m * n * k / line.median_s
            if line.precision not in best or rate > best[line.precision].per_s:
                what = f"Best median of all products: m, n, k = {m}, {n}, {k} of {line.implementation}"
                best[line.precision] = Rate(rate, PEAK_NOTE.format(what=what))
    return best


def best_stream(lines: Sequence[Measurement], l2_bytes: float | str) -> Rate | None:
    """Return the highest rate of a stream too long for the cache [bytes/s]: a copy, an element-wise operator, a weight.

    A product of one row reads its weight once and writes next to nothing: that is what decoding does, and on a CPU it
    is faster than a copy, whose writes fetch the line first.
    """
    best: Rate | None = None
    for line in lines:
        traffic = _streamed(line)
        if traffic >= STREAM_OVER_CACHE * float(l2_bytes) and (best is None or traffic / line.median_s > best.per_s):
            what = "a product of one row" if line.kind == "gemm" else line.shape.get("operator", "copy on the device")
            best = Rate(traffic / line.median_s, f"Best median of all streams: {what}, {traffic:.4g} bytes.")
    return best


def _streamed(line: Measurement) -> float:
    if line.kind == "copy" and line.shape["direction"] == "d2d":
        return 2 * line.number("bytes")
    if line.kind == "gemm" and line.number("m") == 1 and line.precision in SIZES:
        return line.number("n") * line.number("k") * SIZES[line.precision]
    return line.traffic_bytes if line.kind == "elementwise" else 0.0


def host_link(lines: Sequence[Measurement]) -> tuple[dict[str, Any] | None, str]:
    """Return the link to the host, and what it is from; none without copies from the host.

    Its latency is the time of one eager launch where that was measured, which is an empty message; else that of the
    shortest copy.
    """
    copies = [line for line in lines if line.kind == "copy" and line.shape["direction"] == "h2d"]
    if not copies:
        return None, ""
    best = max(copies, key=lambda line: line.number("bytes") / line.median_s)
    launches = [x for x in lines if x.kind == "launch" and x.shape["kind"] == "eager"]
    each = [line.median_s / line.number("kernels") for line in launches]
    latency_s = min(each, default=min(line.median_s for line in copies))
    link = {
        "kind": "pcie",
        "bandwidth_bytes_per_s": best.number("bytes") / best.median_s,
        "latency_s": latency_s,
        "devices": 1,
        "topology": "host",
    }
    what = "one eager launch" if each else "the shortest copy"
    return link, f"Best copy from the host, {best.number('bytes'):.4g} bytes; latency of {what}; one device measured."


def to_toml(values: Mapping[str, Any]) -> str:
    """Return a profile as text."""
    import tomlkit

    return HEAD + tomlkit.dumps(values)
