"""How papers count the work of prefill: five conventions, converted by name.

For n tokens, width d, key/value width d_kv and feed-forward width m, a layer costs

========== ======================================= ==========================================
name       expression                              who counts so
========== ======================================= ==========================================
fastv      4nd^2 + 2n^2d + 2ndm                    FastV, DyCoke, HoliTom, AOT, VisionThink
swiglu-mac 4nd^2 + 2n^2d + 3ndm                    PyramidDrop, BTP, TransPrune, SparseVLM
gqa-mac    2nd^2 + 2nd d_kv + 2n^2d + 3ndm         FastVID
torch      twice gqa-mac                           LLM-Viewer, AIM, PruMerge, ShortV; `FlopCounterMode`
kernel     torch with half the attention           what FlashAttention computes
========== ======================================= ==========================================

The first three are published as "FLOPs" and count a multiply-add once. None of them counts the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from costmodel.base import Quantity
from costmodel.errors import Unsupported, unknown
from costmodel.layers import AttentionSpec, LayerSpec, MlpSpec
from costmodel.models import DecoderSpec
from costmodel.query import Query

Convention = Literal["torch", "kernel", "fastv", "swiglu-mac", "gqa-mac"]
CONVENTIONS: Final[tuple[Convention, ...]] = ("torch", "kernel", "fastv", "swiglu-mac", "gqa-mac")


def layer_flops(layer: LayerSpec, tokens: Quantity, convention: Convention) -> Quantity:
    """Return what a convention counts for one layer of prefill.

    Parameters
    ----------
    layer : LayerSpec
        A layer with grouped-query attention and a gated feed-forward block.
    tokens : float or ndarray
        Tokens that go through the layer.
    convention : str
        One of `CONVENTIONS`.

    Raises
    ------
    LookupError
        If the convention is not known.
    Unsupported
        If the layer is of another kind.
    """
    if not isinstance(layer.mixer, AttentionSpec) or layer.mixer.gated or not isinstance(layer.ffn, MlpSpec):
        kinds = "latent, cross, gated or linear attention, or experts"
        raise Unsupported(f"convention {convention} has no formula for {kinds}; use kernel")
    if convention in ("swiglu-mac", "gqa-mac") and not layer.ffn.gated:
        raise Unsupported(f"convention {convention} counts a gate, and the feed-forward block has none; use kernel")
    d, m = layer.width, layer.ffn.hidden
    d_q, d_kv = layer.mixer.q_width, layer.mixer.kv_width
    n = tokens
    if convention == "fastv":
        return n * (4.0 * d * d + 2.0 * d * m) + 2.0 * n * n * d
    if convention == "swiglu-mac":
        return n * (4.0 * d * d + 3.0 * d * m) + 2.0 * n * n * d
    matrices = 3.0 if layer.ffn.gated else 2.0
    linear, square = n * (2.0 * d * d_q + 2.0 * d * d_kv + matrices * d * m), 2.0 * n * n * d_q
    if convention == "gqa-mac":
        return linear + square
    if convention == "torch":
        return 2.0 * (linear + square)
    if convention == "kernel":
        return 2.0 * linear + square
    raise unknown("convention", convention, CONVENTIONS)


def prefill_flops(decoder: DecoderSpec, tokens: Quantity | Sequence[Quantity], convention: Convention) -> Quantity:
    """Return what a convention counts for the layers of prefill, the head not included.

    Parameters
    ----------
    decoder : DecoderSpec
        The language model.
    tokens : float, ndarray, or a sequence of one a layer
        Tokens that go through each layer.
    """
    layers = decoder.layers()
    schedule = tokens if isinstance(tokens, Sequence) else [tokens] * len(layers)
    if len(schedule) != len(layers):
        raise ValueError(f"tokens has {len(schedule)} entries for {len(layers)} layers; give one number or one a layer")
    pairs = zip(layers, schedule, strict=True)
    return sum((layer_flops(layer, n, convention) for layer, n in pairs), start=0.0)


def query_flops(query: Query, convention: Convention) -> Quantity:
    """Return what a convention counts for prefill in the first turn of a query that techniques have edited.

    Parameters
    ----------
    query : Query
        Every layer is counted at the tokens that go through it: the schedule of a technique inside the language model.

    Returns
    -------
    float or ndarray
        Of the whole batch, heads and what techniques cost themselves not included [FLOP].
    """
    for run in query.model.decoder.runs:  # text alone skips layers of cross-attention: no formula has them
        layer_flops(run.layer, 0.0, convention)
    turn = query.turns[0]
    visual, other = (
        turn.visual_share * query.visual_tokens,
        query.prompt_tokens - turn.visual_share * query.visual_tokens,
    )
    layers = (
        segment.n_layers
        * layer_flops(segment.layer, visual * segment.visual_keep + other * segment.text_keep, convention)
        for segment in query.decoder
    )
    return query.batch * sum(layers, start=0.0)
