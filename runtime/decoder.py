"""The language model: layers of grouped-query attention over a static cache, dense or with experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec, LayerSpec
from costmodel.models import DecoderSpec
from costmodel.units import UNBOUNDED
from runtime.cache import Cache
from runtime.modules import RmsNorm, make_ffn, make_norm, rotate, turns
from runtime.rotations import Rotation
from runtime.settings import DecoderSettings

Turn = tuple[Tensor, Tensor]
Thin: TypeAlias = Callable[[int], Tensor | None]
N_NORMS = 4  # of layers whose halves are normed behind as well


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

    def prefill(self, x: Tensor, turn: Turn, mask: Tensor | None, cache: Cache) -> Tensor:
        """Return the output for whole prompts and keep their keys and values; without a mask it is causal."""
        q, k, v = self._project(x, turn)
        mixed = cache.attend_prompt(self.index, q, k, v, mask, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def step(self, x: Tensor, turn: Turn, cache: Cache) -> Tensor:
        """Return the output for the new tokens of each sequence."""
        q, k, v = self._project(x, turn)
        mixed = cache.attend_step(self.index, q, k, v, self.spec.window, scale=self.scale)
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

    def prefill(self, x: Tensor, turn: Turn, mask: Tensor | None, cache: Cache) -> Tensor:
        """Return the layer's output for whole prompts."""
        x = x + self.behind1(self.attention.prefill(self.norm1(x), turn, mask, cache))
        return x + self.behind2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def step(self, x: Tensor, turn: Turn, cache: Cache) -> Tensor:
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
        self,
        x: Tensor,
        positions: Tensor,
        cache: Cache,
        *,
        blocks: Tensor | None,
        deep: Sequence[Tensor] = (),
        thin: Thin | None = None,
    ) -> Tensor:
        """Return normed outputs for whole prompts.

        Parameters
        ----------
        x : Tensor, shape (batch, tokens, width)
        positions : Tensor, shape (3, batch, tokens)
        cache : Cache
            Empty.
        blocks : Tensor or None, shape (batch, tokens)
            Which picture a token belongs to, where tokens of one picture see each other in both directions.
        deep : sequence of Tensor, shape (batch, tokens, width)
            What is added behind the first layers.
        thin : callable, optional
            Asked in front of every layer which tokens go on; None is all. Those that do keep their positions.
        """
        turns_by_kind = self._turns(positions, x.dtype)
        masks = self._masks(x, blocks)
        for index, layer in enumerate(self._layers()):
            rows = thin(index) if thin is not None else None
            if rows is not None:
                x, positions, deep = x[:, rows], positions[:, :, rows], [part[:, rows] for part in deep]
                blocks = None if blocks is None else blocks[:, rows]
                turns_by_kind, masks = self._turns(positions, x.dtype), self._masks(x, blocks)
            x = layer.prefill(x, turns_by_kind[layer.window != UNBOUNDED], masks[layer.window], cache)
            if index < len(deep):
                x = x + deep[index]
        return self.norm(x)  # type: ignore[no-any-return]

    def step(self, x: Tensor, positions: Tensor, cache: Cache, *, layers: int | None = None) -> Tensor:
        """Return normed outputs for the new tokens of each sequence, shape (batch, new, width); of the first layers."""
        turns_by_kind = self._turns(positions, x.dtype)
        for layer in islice(self._layers(), layers):
            x = layer.step(x, turns_by_kind[layer.window != UNBOUNDED], cache)
        return self.norm(x)  # type: ignore[no-any-return]

    def _layers(self) -> Iterable[DecoderLayer]:
        return cast("Iterable[DecoderLayer]", self.layers)

    def _masks(self, x: Tensor, blocks: Tensor | None) -> dict[float, Tensor | None]:
        """Return what tokens see of a prompt, by window."""
        return {window: _prompt_mask(x.shape[1], window, blocks, x.device) for window in set(self.windows)}

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
