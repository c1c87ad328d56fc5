"""Measure what a CPU core needs to turn an image file into pixel values, and fit it by pixels.

Decoding is timed with Pillow on JPEG files made of a real photograph; resizing, normalising and cutting into patches
with the `transformers` image processor of Qwen2.5-VL (its Pillow and NumPy path). One core, best of several runs is
not used: every sample is kept and the median is fitted. Writes measurement lines (see docs/measurements.md).

Run by hand::

    python -m studies.validation.preprocess -o studies/measurements/preprocess-cpu.jsonl
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from PIL import Image

SIZES = ((640, 480), (1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))
REPEATS = 15


def jpeg_of(width: int, height: int) -> bytes:
    """Return a JPEG of this size made of a public-domain photograph, at the quality cameras use."""
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    grain = np.random.default_rng(0).normal(0.0, 4.0, (height, width, 3))
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC), dtype=float) + grain
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Return the picture of a JPEG file, decoded."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def samples(action: Callable[[], object]) -> list[float]:
    """Return the CPU seconds of repeated runs of an action, after two that warm it up."""
    taken = []
    for i in range(REPEATS + 2):
        start = time.process_time()
        action()
        if i > 1:
            taken.append(time.process_time() - start)
    return taken


def measure() -> Iterator[dict[str, Any]]:
    """Yield one measurement line a size and part."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    for width, height in SIZES:
        data = jpeg_of(width, height)
        picture = decode(data)
        shape = {"width": width, "height": height, "part": "decode", "codec": "jpeg", "file_bytes": len(data)}
        yield line(shape, samples(partial(decode, data)), "pillow")
        grid = processor(picture, return_tensors="np")["image_grid_thw"][0]
        shape = {"width": int(grid[2]) * 14, "height": int(grid[1]) * 14, "part": "resize_normalise_patch"}
        yield line(shape, samples(partial(processor, picture, return_tensors="np")), "transformers")


def line(shape: dict[str, Any], taken: list[float], implementation: str) -> dict[str, Any]:
    """Return one measurement line."""
    return {
        "schema_version": 1,
        "kind": "preprocess",
        "implementation": implementation,
        "shape": shape,
        "precision": "fp32",
        "samples_s": [round(s, 6) for s in taken],
        "peak_bytes": None,
        "power_w": None,
        "device": cpu_name(),
        "driver": None,
        "versions": {name: metadata.version(name) for name in ("pillow", "numpy", "transformers")},
        "commit": commit(),
        "clocks": {},
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """Return the commit of the working tree, if it is one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    return done.stdout.strip() or None if done.returncode == 0 else None


def seconds_per_pixel(lines: list[dict[str, Any]], part: str) -> float:
    """Return the slope of median time against pixels, through zero [s/pixel]."""
    rows = [r for r in lines if r["shape"]["part"] == part]
    pixels = np.array([r["shape"]["width"] * r["shape"]["height"] for r in rows], dtype=float)
    times = np.array([statistics.median(r["samples_s"]) for r in rows])
    return float((pixels / times).mean() ** -1)


def main() -> None:
    """Measure, write the lines and print the two slopes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    lines = []
    output = parser.parse_args().output
    for row in measure():
        lines.append(row)
        print(row["shape"], f"median {statistics.median(row['samples_s']) * 1e3:.2f} ms", file=sys.stderr)
    output.write_text("".join(json.dumps(row) + "\n" for row in lines))
    for part in ("decode", "resize_normalise_patch"):
        print(f"{part}: {seconds_per_pixel(lines, part):.3e} s/pixel")


if __name__ == "__main__":
    main()
