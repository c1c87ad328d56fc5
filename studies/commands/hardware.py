"""`lvlm hardware`: the known devices, or one of them with the source of every number."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from costmodel import Unsupported, hardware_names, load_hardware
from costmodel.hardware import HardwareProfile
from costmodel.units import SECONDS_PER_HOUR
from studies.numbers import as_rows, numbers_table, source_lines, sourced
from studies.options import FOR_PEOPLE, Format
from studies.output import Answer, emit
from studies.roofs import Roof
from studies.tables import GB, MISSING, TERA, number, sections, table

COLUMNS = ("name", "GB", "TB/s", "bf16", "fp8", "int8", "ridge", "TDP W", "USD/h")


def hardware(name: str | None = None, /, *, form: Format = FOR_PEOPLE) -> None:
    """List the known devices, or show one with the source of every number.

    Parameters
    ----------
    name : str
        A device, the path of a TOML file, or name:key=value,... for a what-if.
    """
    if name is None:
        devices = [load_hardware(known) for known in hardware_names()]
        rows = [_row(device) for device in devices]
        emit(Answer("hardware", {}, {"hardware": rows}, lambda: rows, lambda to: _show_list(to, devices)), form)
        return
    device = load_hardware(name)
    numbers = sourced(device.numbers(), device.sources)
    values = {"hardware": [{**_row(device), "numbers": as_rows(numbers)}]}

    def show(to: Console) -> None:
        head = f"{device.name}: {device.title} ({device.vendor}, {device.generation}, {device.kind})"
        sections(to, head, numbers_table(numbers), "\n".join(source_lines(numbers)))

    emit(Answer("hardware", {"name": name}, values, lambda: as_rows(numbers), show), form)


def _row(device: HardwareProfile) -> dict[str, Any]:
    roof = _roof(device)
    return {
        "name": device.name,
        "title": device.title,
        "memory_bytes": device.memory_bytes,
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s,
        **{f"{kind}_flops_per_s": device.peak_flops_per_s.get(kind) for kind in ("bf16", "fp8", "int8")},
        "ridge_flops_per_byte": roof.ridge_flops_per_byte if roof else None,
        "tdp_w": device.tdp_w,
        "price_usd_per_s": device.price_usd_per_s,
    }


def _roof(device: HardwareProfile) -> Roof | None:
    """Return the roof of 16-bit matrix products, None where the device has no unit for them."""
    try:
        return Roof.of(device, 16)
    except Unsupported:
        return None


def _show_list(to: Console, devices: list[HardwareProfile]) -> None:
    rows = []
    for device in devices:
        rates = [device.peak_flops_per_s.get(kind) for kind in ("bf16", "fp8", "int8")]
        roof, price = _roof(device), device.price_usd_per_s
        rows.append(
            (
                device.name,
                number(device.memory_bytes * GB),
                number(device.memory_bandwidth_bytes_per_s * TERA),
                *(number(rate * TERA) if rate else MISSING for rate in rates),
                number(roof.ridge_flops_per_byte) if roof else MISSING,
                number(device.tdp_w),
                f"{price * SECONDS_PER_HOUR:.2f}" if price else MISSING,
            )
        )
    legend = (
        "Dense matrix rates in TFLOP/s; ridge: FLOP/byte at which 16-bit compute and memory take equally long;"
        f" {MISSING}: the device has none, or no public price. Sources: lvlm hardware NAME"
    )
    sections(to, table(COLUMNS, rows), legend)
