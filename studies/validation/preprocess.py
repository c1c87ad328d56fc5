"""Measure what a CPU core needs to turn an image file into pixel values, and fit it by pixels.

Decoding is timed with Pillow, by codec, on files of several contents: a photograph with and without grain, and a page
of text. Resizing, normalising and cutting into patches is timed with the `transformers` image processor of Qwen2.5-VL
(its Pillow and NumPy path). One core; every sample is kept and the median is fitted. Writes measurement lines (see
docs/measurements.md).

Run by hand, from `studies/measurements`::

    python -m studies.validation.preprocess -o preprocess-cpu.jsonl
    python -m studies.validation.preprocess --codec png --codec webp --append -o preprocess-cpu.jsonl
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import cbook
from PIL import Image, ImageDraw, ImageFont

SIZES: Final = ((640, 480), (1280, 720), (1920, 1080), (2560, 1440), (3840, 2160))
CONTENTS: Final = ("grainy", "smooth", "page")
"""A photograph with the noise of a camera, the same without, and black text on white."""
REPEATS: Final = 15
GRAIN: Final = 4.0
"""Standard deviation of the noise of a camera, in steps of 256."""
WRITTEN: Final[Mapping[str, Mapping[str, Any]]] = {
    "jpeg": {"format": "JPEG", "quality": 90},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "quality": 90},
}
"""How files are written: JPEG and WebP (lossy) at the quality that cameras use, PNG as Pillow does."""
PAGE_LINE: Final = "The quick brown fox jumps over the lazy dog, 0123456789. "


def picture_of(content: str, width: int, height: int) -> Image.Image:
    """Return a picture of this content and size; the photograph is in the public domain."""
    if content == "page":
        return _page(width, height)
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    resized = photo.resize((width, height), Image.Resampling.BICUBIC)
    if content == "smooth":
        return resized
    grain = np.random.default_rng(0).normal(0.0, GRAIN, (height, width, 3))
    pixels = np.asarray(resized, dtype=float) + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _page(width: int, height: int) -> Image.Image:
    """Return a page of forty lines."""
    page = Image.new("RGB", (width, height), "white")
    draw, step = ImageDraw.Draw(page), height // 40
    font = ImageFont.load_default(max(8, step * 2 // 3))
    for top in range(step, height - step, step):
        draw.text((width // 20, top), PAGE_LINE * 3, fill="black", font=font)
    return page


def file_of(picture: Image.Image, codec: str) -> bytes:
    """Return a picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, **WRITTEN[codec])
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Return the picture of a file, decoded."""
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


def measure_decoding(codec: str, contents: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one measurement line a size and content."""
    for content in contents:
        for width, height in SIZES:
            data = file_of(picture_of(content, width, height), codec)
            size = {"width": width, "height": height, "part": "decode"}
            shape = {**size, "codec": codec, "content": content, "file_bytes": len(data)}
            yield line(shape, samples(partial(decode, data)), "pillow")


def measure_processing() -> Iterator[dict[str, Any]]:
    """Yield one measurement line a size."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    for width, height in SIZES:
        picture = decode(file_of(picture_of("grainy", width, height), "jpeg"))
        grid = processor(picture, return_tensors="np")["image_grid_thw"][0]
        shape = {"width": int(grid[2]) * 14, "height": int(grid[1]) * 14, "part": "resize_normalise_patch"}
        yield line(shape, samples(partial(processor, picture, return_tensors="np")), "transformers")


def measure(codecs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of some codecs on every content, or of JPEG and of the image processor when none is named."""
    if not codecs:
        yield from measure_decoding("jpeg", ("grainy",))
        yield from measure_processing()
    for codec in codecs:
        yield from measure_decoding(codec, CONTENTS)


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


def seconds_per_pixel(lines: Sequence[Mapping[str, Any]], part: str, codec: str | None = None) -> float:
    """Return the median time a pixel, in the mean over sizes and contents [s/pixel]."""
    rows = [r for r in lines if r["shape"]["part"] == part and r["shape"].get("codec") == codec]
    pixels = np.array([r["shape"]["width"] * r["shape"]["height"] for r in rows], dtype=float)
    times = np.array([statistics.median(r["samples_s"]) for r in rows])
    return float((times / pixels).mean())


def main() -> None:
    """Measure, write the lines and print the slopes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--codec", action="append", choices=tuple(WRITTEN), default=[])
    parser.add_argument("--append", action="store_true", help="keep the lines that the file has")
    asked = parser.parse_args()
    lines = []
    for row in measure(asked.codec):
        lines.append(row)
        print(row["shape"], f"median {statistics.median(row['samples_s']) * 1e3:.2f} ms", file=sys.stderr)
    with asked.output.open("a" if asked.append else "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines)
    for part, codec in dict.fromkeys((r["shape"]["part"], r["shape"].get("codec")) for r in lines):
        print(f"{part} {codec or ''}: {seconds_per_pixel(lines, part, codec):.3e} s/pixel")


if __name__ == "__main__":
    main()
