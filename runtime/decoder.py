"""The language model: layers of grouped-query attention over a static cache, dense or with experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec, LayerSpec
from costmodel.models import DecoderSpec
from costmodel.units import UNBOUNDED
from runtime.cache import KvCache
from runtime.modules import RmsNorm, make_ffn, make_norm, rotate, turns
from runtime.rotations import Rotation
from runtime.settings import DecoderSettings

Turn = tuple[Tensor, Tensor]
N_NORMS = 4  # of layers whose halves are normed behind as well


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None) -> Tensor:
    """Return attention of whole prompts, shape (batch, heads, tokens, head_dim); without a mask it is causal.

    The fused kernels that take a mask take no grouped heads, so keys and values are repeated for them.
    """
    grouped = q.shape[1] != k.shape[1]
    if mask is not None and grouped:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        grouped = False
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None) -> Tensor:
    """Return attention of one new token a sequence, shape (batch, heads, 1, head_dim).

    The heads that share keys become queries of one head, so that every key is read once.
    """
    batch, heads, _, head_dim = q.shape
    queries = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    mixed = functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)
    return mixed.reshape(batch, heads, 1, head_dim)


class Attention(nn.Module):
    """Grouped-query attention; queries, keys and values are one matrix, in this order."""

    def __init__(self, width: int, spec: AttentionSpec, settings: DecoderSettings, index: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, spec.q_width + 2 * spec.kv_width, bias=spec.qkv_bias)
        self.out = nn.Linear(spec.q_width, width, bias=spec.out_bias)
        normed, eps, offset = settings.qk_norm == "head", settings.norm_eps, settings.norm_offset
        self.q_norm = RmsNorm(spec.head_dim, eps, offset=offset) if normed else nn.Identity()
        self.k_norm = RmsNorm(spec.head_dim, eps, offset=offset) if normed else nn.Identity()
        self.spec, self.index, self.scale = spec, index, settings.query_scale
        self.widths = (spec.q_width, spec.kv_width, spec.kv_width)

    def _project(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, shape (batch, heads, tokens, head_dim)."""
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2) for part in parts)
        return rotate(self.q_norm(q), *turn), rotate(self.k_norm(k), *turn), v

    def prefill(self, x: Tensor, turn: Turn, mask: Tensor | None, cache: KvCache) -> Tensor:
        """Return the output for whole prompts and keep their keys and values; without a mask it is causal."""
        q, k, v = self._project(x, turn)
        cache.fill(self.index, k, v)
        mixed = attend_prompt(q, k, v, mask, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def step(self, x: Tensor, turn: Turn, cache: KvCache) -> Tensor:
        """Return the output for one new token a sequence."""
        q, k, v = self._project(x, turn)
        cache.append(self.index, k, v)
        span, mask = cache.span(self.spec.window)
        keys, values = (part[self.index][:, :, span] for part in (cache.keys, cache.values))
        mixed = attend_one(q, keys, values, mask, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One layer; where there are four norms, the output of each half is normed before it is added."""

    def __init__(self, spec: LayerSpec, settings: DecoderSettings, index: int) -> None:
        super().__init__()
        if not isinstance(spec.mixer, AttentionSpec) or spec.mixer.gated or not spec.mixer.causal:
            raise Unsupported("a decoder layer without plain causal attention has no runtime")
        self.attention = Attention(spec.width, spec.mixer, settings, index)
        self.mlp = make_ffn(spec.width, spec.ffn, settings.activation, normalises=settings.normalises_experts)
        both = spec.n_norms == N_NORMS

        def norm() -> nn.Module:
            return make_norm(spec.norm, spec.width, settings.norm_eps, offset=settings.norm_offset)

        self.norm1, self.norm2 = norm(), norm()
        self.behind1, self.behind2 = (norm(), norm()) if both else (nn.Identity(), nn.Identity())
        self.window = spec.mixer.window

    def prefill(self, x: Tensor, turn: Turn, mask: Tensor | None, cache: KvCache) -> Tensor:
        """Return the layer's output for whole prompts."""
        x = x + self.behind1(self.attention.prefill(self.norm1(x), turn, mask, cache))
        return x + self.behind2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def step(self, x: Tensor, turn: Turn, cache: KvCache) -> Tensor:
        """Return the layer's output for one new token a sequence."""
        x = x + self.behind1(self.attention.step(self.norm1(x), turn, cache))
        return x + self.behind2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, layers, last norm and head."""

    def __init__(self, spec: DecoderSpec, settings: DecoderSettings) -> None:
        super().__init__()
        self.spec, self.settings = spec, settings
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        layers = [DecoderLayer(layer, settings, index) for index, layer in enumerate(spec.layers())]
        self.layers = nn.ModuleList(layers)
        self.windows = [layer.window for layer in layers]
        self.turner = Turner(settings.rotation)
        differs = settings.sliding_rotation != settings.rotation
        self.sliding_turner = Turner(settings.sliding_rotation) if differs else None
        self.norm = make_norm(spec.norm, spec.width, settings.norm_eps, offset=settings.norm_offset)
        self.lm_head = None if spec.tied_head else nn.Linear(spec.width, spec.vocabulary, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of text tokens."""
        x: Tensor = self.embedding(tokens)
        scale = self.settings.embedding_scale
        return x if scale == 1.0 else x * float(torch.tensor(scale, dtype=x.dtype))  # rounded as the weights are

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of normed rows."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return functional.linear(x, weight)

    def prefill(
        self, x: Tensor, positions: Tensor, cache: KvCache, *, blocks: Tensor | None, deep: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return normed outputs for whole prompts.

        Parameters
        ----------
        x : Tensor, shape (batch, tokens, width)
        positions : Tensor, shape (3, batch, tokens)
        cache : KvCache
            Empty.
        blocks : Tensor or None, shape (batch, tokens)
            Which picture a token belongs to, where tokens of one picture see each other in both directions.
        deep : sequence of Tensor, shape (batch, tokens, width)
            What is added behind the first layers.
        """
        turns_by_kind = self._turns(positions, x.dtype)
        masks = {window: _prompt_mask(x.shape[1], window, blocks, x.device) for window in set(self.windows)}
        for index, layer in enumerate(self._layers()):
            x = layer.prefill(x, turns_by_kind[layer.window != UNBOUNDED], masks[layer.window], cache)
            if index < len(deep):
                x = x + deep[index]
        return self.norm(x)  # type: ignore[no-any-return]

    def step(self, x: Tensor, positions: Tensor, cache: KvCache) -> Tensor:
        """Return normed outputs for one new token a sequence, shape (batch, 1, width)."""
        turns_by_kind = self._turns(positions, x.dtype)
        for layer in self._layers():
            x = layer.step(x, turns_by_kind[layer.window != UNBOUNDED], cache)
        return self.norm(x)  # type: ignore[no-any-return]

    def _layers(self) -> Iterable[DecoderLayer]:
        return cast("Iterable[DecoderLayer]", self.layers)

    def _turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Turn, Turn]:
        """Return cosine and sine for layers that see all, and for those with a window."""
        plain = self.turner(positions, dtype)
        return plain, self.sliding_turner(positions, dtype) if self.sliding_turner else plain


class Turner:
    """Turns positions into cosine and sine; its constants stay on the device, so that a CUDA graph can hold it."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Turn:
        """Return cosine and sine, shape (batch, 1, tokens, head_dim), of positions, shape (3, batch, tokens)."""
        device = positions.device
        if device not in self.constants:
            axes = torch.tensor(self.rotation.axes(), device=device)
            self.constants[device] = axes, torch.from_numpy(self.rotation.frequencies()).to(device)
        axes, frequencies = self.constants[device]
        cos, sin = turns(positions.index_select(0, axes).movedim(0, -1) * frequencies)
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


def _prompt_mask(tokens: int, window: float, blocks: Tensor | None, device: torch.device) -> Tensor | None:
    """Return what each token of a prompt sees; None where that is what came before it."""
    slides = window < tokens
    if blocks is None and not slides:
        return None
    index = torch.arange(tokens, device=device)
    behind = index[:, None] - index
    seen = (behind >= 0)[None]
    if blocks is not None:
        seen = seen | ((blocks[:, :, None] == blocks[:, None]) & (blocks >= 0)[:, None])
    if slides:
        seen = seen & (behind < int(window))
    return seen[:, None]
