"""The kernels that a CPU is calibrated with: sizes of no model, so that nothing of what is predicted is in the fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Final

from costmodel.layers import AttentionSpec

if TYPE_CHECKING:
    from runtime.microbench import Bench, Case

WEIGHTS: Final = (
    (320, 320),
    (640, 640),
    (2560, 640),
    (640, 2560),
    (1280, 1280),
    (4096, 1024),
    (1024, 4096),
    (3072, 3072),
    (4096, 4096),
    (20480, 640),
)
"""Outputs and inputs, 0.4 to 67 MB in single precision; so many of them take turns that none stays in the cache."""
WARM: Final = ((640, 640), (2560, 640), (1280, 1280))
"""Weights that a product also meets again at once."""
ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024)
MOST_FLOPS: Final = 2e10
"""Of one product: a fifth of a second on one core."""
HEADS: Final = ((4, 4, 64), (12, 12, 64), (12, 2, 64), (16, 8, 64), (4, 1, 128), (4, 4, 128))
"""Heads, heads of keys, width of a head."""
PROMPTS: Final = (48, 96, 192, 384, 768, 1536)
CONTEXTS: Final = (64, 256, 512, 1024, 2048, 4096)
BATCHES: Final = (1, 2, 4)
WIDTHS: Final = (320, 640, 1280, 2560)
HEIGHTS: Final = (1, 4, 32, 128, 512, 2048, 8192)
MOVED: Final = ("norm", "activation", "rope")
SMOKE: Final = 36
"""Kernels of every kind at smoke size: enough that most curves can be fitted."""


def kernels(bench: Bench, *, smoke: bool = False) -> list[Case]:
    """Return the kernels, all of them or a few of every kind.

    Parameters
    ----------
    bench : Bench
        Where they run, and in which number format.
    smoke : bool
        Whether few and small ones do: then rates are those of caches, and no time means anything.
    """
    from runtime.microbench import NEEDED_SQUARE, copies, stream_side
    from runtime.microbench import product as one_product

    side, square = stream_side(bench), NEEDED_SQUARE
    needed = [one_product(bench, square, square, square, needed=True)]
    found = [*_products(bench), *_attentions(bench), *_moved(bench)]
    if smoke:
        found = [case for case in found if "turns" not in case.shape]
        few = sorted(found, key=lambda case: case.work)
        groups = {case.group for case in few}
        found = [case for group in sorted(groups) for case in [x for x in few if x.group == group][:SMOKE]]
        stream = [case for case in copies(bench) if case.needed]
        return [*needed, *stream, *found]
    streams = [one_product(bench, m, side, side) for m in ROWS if 2 * m * side * side <= MOST_FLOPS]
    return [*needed, *streams, *found]


def _products(bench: Bench) -> Iterator[Case]:
    from runtime.microbench import product as one_product
    from runtime.microbench import turns_beyond_cache

    for (n, k), m in product(WEIGHTS, ROWS):
        if 2 * m * n * k <= MOST_FLOPS:
            yield one_product(bench, m, n, k, turns=turns_beyond_cache(bench, n, k))
    yield from (one_product(bench, m, n, k) for (n, k), m in product(WARM, ROWS))


def _attentions(bench: Bench) -> Iterator[Case]:
    from runtime.microbench import attention

    for (heads, kv_heads, head_dim), batch in product(HEADS, BATCHES):
        spec = AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for length in PROMPTS:
            yield attention("prefill_attention", bench, spec, batch, length)
            if heads == kv_heads:
                yield attention("encoder_attention", bench, spec, batch, length)
        for length in CONTEXTS:
            yield attention("decode_attention", bench, spec, batch, length)


def _moved(bench: Bench) -> Iterator[Case]:
    from runtime.microbench import moved

    for name, width, rows in product(MOVED, WIDTHS, HEIGHTS):
        case = moved(bench, name, rows, width)
        yield replace(case, needed=False)
