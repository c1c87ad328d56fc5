"""The device that a model runs on: opened by name, its free memory, and what it says of itself."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from costmodel.errors import DoesNotFit, unknown

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Number formats of weights and activations, by the names of a hardware profile."""
KINDS: Final = ("cpu", "cuda")
CPUINFO: Final = Path("/proc/cpuinfo")
CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
SUFFIXES: Final = {"b": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
ASKED: Final = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)
"""How PyTorch's allocators say what they were asked for."""


def open_device(name: str) -> torch.device:
    """Return a device by name: cpu, cuda, cuda:1.

    Raises
    ------
    LookupError
        If it is of no known kind.
    ValueError
        If it is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in KINDS or (index and not index.isdigit()):
        raise unknown("device", name, KINDS)
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU answers the driver"
        raise ValueError(f"device={name!r} must be there, and {build}; use --device cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r} must be below cuda:{torch.cuda.device_count()}, of which there are so many")
    return torch.device("cuda", int(index or 0))


def dtype_of(name: str) -> torch.dtype:
    """Return a number format by name."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device [bytes]."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept  # what the allocator holds back is free too
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else pages


def require(what: str, required_bytes: float, device: torch.device) -> None:
    """Refuse what is larger than the free memory of a device, before any of it is taken.

    Raises
    ------
    DoesNotFit
    """
    if required_bytes > free_bytes(device):
        raise DoesNotFit(what, required_bytes=required_bytes, available_bytes=free_bytes(device))


@contextmanager
def memory_guarded(what: str, device: torch.device) -> Iterator[None]:
    """Turn an allocation that fails inside into one clear line.

    Raises
    ------
    DoesNotFit
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the allocator of the CPU raises it plain
        asked = ASKED.search(str(error))
        if asked is None:
            raise
        needed = float(asked[1]) * SUFFIXES[asked[2][0]]
        raise DoesNotFit(what, required_bytes=needed, available_bytes=free_bytes(device)) from error


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what the system calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(device: torch.device) -> dict[str, float]:
    """Return what a device says of itself, in SI units and under the names of a hardware profile.

    Of a CPU: the threads that PyTorch uses, as its cores; its last cache; all memory.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "core_count": float(properties.multi_processor_count),
            "memory_bytes": float(properties.total_memory),
            "l2_bytes": float(properties.L2_cache_size),
        }
    found = {
        "core_count": float(torch.get_num_threads()),
        "memory_bytes": float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    }
    last, clock = _last_cache_bytes(), cpu_clock_hz()
    return found | ({"l2_bytes": last} if last else {}) | ({"clock_hz": clock} if clock else {})


def _last_cache_bytes() -> float:
    sizes = [path.read_text(encoding="utf-8").strip() for path in CACHES.glob("index*/size")] if CACHES.is_dir() else []
    return max((float(text[:-1]) * SUFFIXES[text[-1]] for text in sizes if text[-1:] in SUFFIXES), default=0.0)


def cpu_clock_hz() -> float:
    """Return the clock of the first core as the system states it [Hz]; 0 where it does not."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    clocks = [float(line.partition(":")[2]) * 1e6 for line in lines if line.startswith("cpu MHz")]
    return clocks[0] if clocks else 0.0
