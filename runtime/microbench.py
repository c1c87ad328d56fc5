"""Kernels alone, in the shapes of a model: products, attention, element-wise operators, launches, copies, pictures.

Each is one or a few calls of PyTorch, timed warm over and over on the same operands unless the stopwatch is cold.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from costmodel.layers import AttentionSpec, LayerSpec, MlpSpec, MoeSpec
from costmodel.models import ModelSpec
from runtime.attention import attend_one, attend_prompt
from runtime.device import facts
from runtime.modules import rotate
from runtime.new_device import STREAM_OVER_CACHE
from runtime.preprocess import preprocess
from runtime.settings import Blueprint
from runtime.timing import Action

LIBRARY: Final = "torch"
ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Rows of products and element-wise operators: a decode batch to a long prompt."""
SQUARES: Final = (512, 1024, 2048, 4096, 8192)
"""Sides of square products, for the highest rate."""
SIDE_STEP: Final = 256
"""Sides of weights are multiples of it."""
NEEDED_SQUARE: Final = 1024
"""One of them is measured whatever it takes."""
LENGTHS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a prompt, of a context, of a picture."""
BATCHES: Final = (1, 4, 16, 64)
COPIES: Final = tuple(4**power for power in range(6, 15))
"""Bytes of copies, 4 KiB to 256 MiB."""
LAUNCHED: Final = 100
"""Kernels of a launch line."""
PICTURES: Final = ((640, 480), (1280, 720), (1920, 1080), (3840, 2160))
QUALITY: Final = 90
"""Of a JPEG, as cameras write it."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One kernel in one shape.

    Parameters
    ----------
    kind : str
        As in `runtime.measurement`.
    shape : mapping
    work : float
        FLOPs, or bytes where there are none; for the order, and for what is left out.
    nbytes : float
        Memory of its operands [bytes].
    prepare : callable
        Makes the operands and returns what is timed.
    implementation : str
    repeatable : bool
        Whether it may be captured and run many times within a sample.
    needed : bool
        Whether a profile of the device needs it, however long it takes.
    """

    kind: str
    shape: Mapping[str, Any]
    work: float
    nbytes: float
    prepare: Callable[[], Action]
    implementation: str = LIBRARY
    repeatable: bool = True
    needed: bool = False

    @property
    def group(self) -> str:
        """Cases of one group take longer the more work they are."""
        keys = ("part", "operator", "direction", "kind")
        return ".".join([self.kind, *(str(self.shape[key]) for key in keys if key in self.shape)])


@dataclass(frozen=True, slots=True)
class Bench:
    """Where kernels run and in which number format."""

    device: torch.device
    dtype: torch.dtype

    def tensor(self, *shape: int) -> Tensor:
        """Return random numbers of usual size."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    @property
    def width_bytes(self) -> int:
        """Size of a number [bytes]."""
        return self.dtype.itemsize


def cases(blueprint: Blueprint, bench: Bench) -> Iterator[Case]:
    """Yield all kernels in the shapes of a model, small ones of each kind first."""
    yield from gemms(blueprint.spec, bench)
    yield from attentions(blueprint.spec, bench)
    yield from elementwise(blueprint.spec, bench)
    yield from launches(bench)
    yield from copies(bench)
    yield from pictures(blueprint)


def gemms(spec: ModelSpec, bench: Bench) -> Iterator[Case]:
    """Yield the products of a model's layers and head for many numbers of rows, and square ones."""
    grid = [(m, n, k) for m in ROWS for n, k in sorted(weights(spec))]
    grid += [(side, side, side) for side in SQUARES]
    for m, n, k in dict.fromkeys(grid):
        yield product(bench, m, n, k, needed=m == n == k == NEEDED_SQUARE)
    yield product(bench, 1, *[stream_side(bench)] * 2, needed=True)


def stream_side(bench: Bench) -> int:
    """Return the side of a square weight too large for the cache: a product of one row then reads memory."""
    least_bytes = STREAM_OVER_CACHE * facts(bench.device).get("l2_bytes", 0.0)
    return max(NEEDED_SQUARE, math.ceil(math.sqrt(least_bytes / bench.width_bytes) / SIDE_STEP) * SIDE_STEP)


def product(bench: Bench, m: int, n: int, k: int, *, needed: bool = False, turns: int = 1) -> Case:
    """Return one product of m rows with a weight of n outputs and k inputs; with several, weights that take turns."""
    work, nbytes = 2.0 * m * n * k, float((m * k + turns * n * k + m * n) * bench.width_bytes)
    shape = {"m": m, "n": n, "k": k, **({"turns": turns} if turns > 1 else {})}
    return Case("gemm", shape, work, nbytes, partial(_gemm, bench, m, n, k, turns=turns), needed=needed)


def turns_beyond_cache(bench: Bench, n: int, k: int) -> int:
    """Return how many weights must take turns so that none is in the cache when its turn comes, as in a model."""
    least_bytes = STREAM_OVER_CACHE * facts(bench.device).get("l2_bytes", 0.0)
    return max(1, math.ceil(least_bytes / (n * k * bench.width_bytes)))


def _gemm(bench: Bench, m: int, n: int, k: int, *, turns: int = 1) -> Action:
    rows, weight = bench.tensor(m, k), bench.tensor(n, k)
    if turns == 1:
        return lambda: functional.linear(rows, weight)
    others = itertools.cycle([weight.clone() for _ in range(turns)])
    return lambda: functional.linear(rows, next(others))


def weights(spec: ModelSpec) -> set[tuple[int, int]]:
    """Return outputs and inputs of the products that layers of both towers and the head run."""
    layers = [run.layer for run in (*spec.decoder.runs, *(spec.vision.runs if spec.vision else ()))]
    found = {(spec.decoder.vocabulary, spec.decoder.width)}
    return found.union(*(_weights(layer) for layer in layers))


def _weights(layer: LayerSpec) -> set[tuple[int, int]]:
    width, mixer, ffn = layer.width, layer.mixer, layer.ffn
    found: set[tuple[int, int]] = set()
    if isinstance(mixer, AttentionSpec):
        found |= {(mixer.q_width + 2 * mixer.kv_width, width), (width, mixer.q_width)}
    if isinstance(ffn, MlpSpec | MoeSpec):
        gated = ffn.gated if isinstance(ffn, MlpSpec) else True
        found |= {(ffn.hidden * (1 + gated), width), (width, ffn.hidden)}
    return found


def attentions(spec: ModelSpec, bench: Bench) -> Iterator[Case]:
    """Yield attention of prompts, of pictures, and of one new token a sequence."""
    mixer = spec.decoder.runs[0].layer.mixer
    if isinstance(mixer, AttentionSpec):
        for batch, length in _sizes((1, 4)):
            yield attention("prefill_attention", bench, mixer, batch, length)
        for batch, length in _sizes(BATCHES):
            yield attention("decode_attention", bench, mixer, batch, length)
    tower = spec.vision.runs[0].layer.mixer if spec.vision else None
    if isinstance(tower, AttentionSpec):
        for batch, length in _sizes((1, 4, 16)):
            yield attention("encoder_attention", bench, tower, batch, length)


def _sizes(batches: Sequence[int]) -> list[tuple[int, int]]:
    return sorted(((batch, length) for batch in batches for length in LENGTHS), key=lambda pair: pair[0] * pair[1])


def attention(kind: str, bench: Bench, spec: AttentionSpec, batch: int, length: int) -> Case:
    """Return attention of a batch of prompts or pictures of this length, or of new tokens with so many keys."""
    decodes = kind == "decode_attention"
    shape = {
        "b": batch,
        "context" if decodes else "s": length,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
    }
    queries = 1 if decodes else length
    work = 4.0 * batch * queries * length * spec.q_width
    numbers = batch * (2 * queries * spec.q_width + 2 * length * spec.kv_width)
    prepare = partial(_attend, kind, bench, spec, batch=batch, queries=queries, keys=length)
    return Case(kind, shape, work, float(numbers * bench.width_bytes), prepare)


def _attend(kind: str, bench: Bench, spec: AttentionSpec, *, batch: int, queries: int, keys: int) -> Action:
    q = bench.tensor(batch, spec.heads, queries, spec.head_dim)
    k, v = (bench.tensor(batch, spec.kv_heads, keys, spec.head_dim) for _ in range(2))
    if kind == "decode_attention":
        return lambda: attend_one(q, k, v, None)
    if kind == "prefill_attention":
        return lambda: attend_prompt(q, k, v, None)
    return lambda: functional.scaled_dot_product_attention(q, k, v)


def elementwise(spec: ModelSpec, bench: Bench) -> Iterator[Case]:
    """Yield norms, activations, sums, softmax and copies over rows as wide as the model."""
    width = spec.decoder.width
    for name in OPERATORS:
        for rows in ROWS:
            yield moved(bench, name, rows, width)


def moved(bench: Bench, name: str, rows: int, width: int) -> Case:
    """Return an element-wise operator over so many rows."""
    nbytes = float(OPERATORS[name][0] * rows * width * bench.width_bytes)
    shape = {"operator": name, "rows": rows, "width": width}
    return Case("elementwise", shape, nbytes, nbytes, partial(_elementwise, bench, name, rows, width))


def _elementwise(bench: Bench, name: str, rows: int, width: int) -> Action:
    operands = [bench.tensor(rows, width) for _ in range(2)]
    return partial(OPERATORS[name][1], *operands)


def _norm(x: Tensor, other: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], other[0])


OPERATORS: Final[Mapping[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]]] = {
    "norm": (2, _norm),
    "activation": (2, lambda x, _: functional.gelu(x)),
    "rope": (2, lambda x, other: rotate(x, other[0], other[0])),
    "add": (3, torch.add),
    "softmax": (2, lambda x, _: x.softmax(-1)),
    "copy": (2, lambda x, _: x.clone()),
}
"""Element-wise operators, a rotation as the reference model runs it: values that one fused kernel would read
and write for each that is given."""


def launches(bench: Bench) -> Iterator[Case]:
    """Yield the time of empty kernels: launched one by one, and on a GPU as one graph."""
    shape = {"kind": "eager", "kernels": LAUNCHED}
    yield Case("launch", shape, LAUNCHED, 4.0, partial(_launch, bench), repeatable=False)
    if bench.device.type == "cuda":
        graph = {"kind": "graph", "kernels": LAUNCHED}
        yield Case("launch", graph, LAUNCHED, 4.0, partial(_graph_launch, bench), repeatable=False)


def _launch(bench: Bench) -> Action:
    one = torch.zeros(1, device=bench.device)

    def run() -> None:
        for _ in range(LAUNCHED):
            one.add_(1.0)

    return run


def _graph_launch(bench: Bench) -> Action:
    run, graph = _launch(bench), torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copies(bench: Bench) -> Iterator[Case]:
    """Yield copies on the device, and between it and pinned memory of the host."""
    directions = ("h2d", "d2h", "d2d") if bench.device.type == "cuda" else ("d2d",)
    stream = round(STREAM_OVER_CACHE * facts(bench.device).get("l2_bytes", 0.0) / 2)
    for direction in directions:
        on_device = direction == "d2d"
        for nbytes in sorted({*COPIES, *([stream] if on_device and stream else [])}):
            shape = {"direction": direction, "bytes": nbytes}
            prepare, needed = partial(_copy, bench, direction, nbytes), on_device and nbytes == stream
            yield Case("copy", shape, 2.0 * nbytes, 2.0 * nbytes, prepare, repeatable=on_device, needed=needed)


def _copy(bench: Bench, direction: str, nbytes: int) -> Action:
    on_device = torch.zeros(nbytes, dtype=torch.uint8, device=bench.device)
    if direction == "d2d":
        other = torch.zeros_like(on_device)
        return lambda: other.copy_(on_device)
    on_host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    target, source = (on_device, on_host) if direction == "h2d" else (on_host, on_device)
    return lambda: target.copy_(source, non_blocking=True)


def pictures(blueprint: Blueprint) -> Iterator[Case]:
    """Yield decoding of JPEG files, and resizing, normalising and cutting, on the host."""
    for width, height in PICTURES:
        shape = {"width": width, "height": height}
        size, resized = float(width * height), 0
        if blueprint.spec.media:
            resized = blueprint.spec.media.image(width, height).resized_pixels
        decoded, decode = {**shape, "codec": "jpeg", "part": "decode"}, partial(_decode, width, height)
        yield Case("preprocess", decoded, size, 3 * size, decode, "pillow", repeatable=False)
        cut = {**shape, "pixels": resized, "part": "resize_normalise_patch"}
        resize = partial(_resize, blueprint, width, height)
        yield Case("preprocess", cut, size, 12.0 * resized, resize, "ours", repeatable=False)


def _decode(width: int, height: int) -> Action:
    data = jpeg(width, height)
    return lambda: opened(data)


def _resize(blueprint: Blueprint, width: int, height: int) -> Action:
    picture = opened(jpeg(width, height))
    return lambda: preprocess(blueprint, [picture])


def opened(data: bytes) -> Image.Image:
    """Return the picture of a file, decoded."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(width: int, height: int, *, seed: int = 0) -> bytes:
    """Return a JPEG file of smooth shapes and grain, at the quality that cameras use."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.normal(0.0, 4.0, (height, width, 3)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
