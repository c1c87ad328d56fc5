"""MFU and MBU of measured stages: the cost model's FLOPs and bytes over the time, as shares of a device's peaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from costmodel.engine import load_engine
from costmodel.errors import Unsupported
from costmodel.hardware import load_hardware
from runtime.devices import device_of
from runtime.measurement import Measurement
from runtime.new_device import best_products, best_stream
from runtime.stages import DECODE, STAGES, request

COUNTED_ON = "h100-sxm5-80gb"
"""FLOPs and bytes of a request do not depend on the device; one must be named to ask for them."""


@dataclass(frozen=True, slots=True)
class Utilised:
    """A measured stage.

    Parameters
    ----------
    line : Measurement
    mfu, mbu : float or None
        Shares of the peak rate of products and of memory; None where the cost model counts no such stage on a device,
        or no peak is known.
    peaks : str
        Whose peaks: the datasheet's, or the best of the same run; empty where none is known.
    """

    line: Measurement
    mfu: float | None
    mbu: float | None
    peaks: str


def utilised(lines: Sequence[Measurement]) -> tuple[Utilised, ...]:
    """Return the stages among lines of one device, each with its MFU and MBU."""
    stages = [line for line in lines if line.kind in {*STAGES, DECODE} and "part" not in line.shape]
    if not stages:
        return ()
    flops_per_s, bytes_per_s, source = _peaks(lines)
    found = []
    for line in stages:
        flops, nbytes = (None, None) if line.kind == "preprocess" else _work(line)
        found.append(
            Utilised(
                line,
                _share(flops, line.median_s, flops_per_s.get(line.precision)),
                _share(nbytes, line.median_s, bytes_per_s),
                source,
            )
        )
    return tuple(found)


def _share(work: float | None, time_s: float, peak_per_s: float | None) -> float | None:
    return None if work is None or peak_per_s is None else work / time_s / peak_per_s


def _work(line: Measurement) -> tuple[float | None, float | None]:
    """Return FLOPs and bytes of the stage of the request that a line describes."""
    try:
        found = request(line, None, load_hardware(COUNTED_ON), load_engine("ideal"))
    except Unsupported:
        return None, None
    stage = found.stages["decode" if line.kind == DECODE else line.kind]
    return float(stage.flops), float(stage.weight_bytes + stage.activation_bytes + stage.kv_bytes)


def _peaks(lines: Sequence[Measurement]) -> tuple[Mapping[str, float], float | None, str]:
    """Return peak rates of products by number format [FLOP/s], of memory [bytes/s], and whose they are."""
    device = device_of(lines[0].device, None)
    if device is not None:
        return dict(device.peak_flops_per_s), device.memory_bandwidth_bytes_per_s, f"{device.name}, datasheet"
    products = {precision: rate.per_s for precision, rate in best_products(lines).items()}
    cache = max((line.clocks.get("l2_bytes", 0.0) for line in lines), default=0.0)
    stream = best_stream(lines, cache) if cache else None
    source = "the best product and stream of the same run" if products or stream else ""
    return products, stream.per_s if stream else None, source
