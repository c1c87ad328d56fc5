"""The reference model, with the verbs of the cost model: encode, adapt, prefill, decode_step.

The decoder, the encoder and the adapter are built from the same `ModelSpec` that is priced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from costmodel.errors import Unsupported
from runtime.adapters import Adapter, Visual
from runtime.cache import KvCache
from runtime.decoder import Decoder
from runtime.device import require
from runtime.grids import Grid
from runtime.prompts import AXES, Batch, Picture
from runtime.settings import Blueprint
from runtime.vision import Features, VisionEncoder, Watch

Step: TypeAlias = Callable[[Tensor, Tensor, KvCache], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """Pictures as the encoder takes them.

    Parameters
    ----------
    patches : Tensor, shape (patches, patch_width)
        Of all items, one behind the other.
    grids : tuple of (int, int, int)
        Slices, rows and columns of every item: a picture, or a tile of one.
    pictures : tuple of Picture
        What each picture is in a prompt.
    """

    patches: Tensor
    grids: tuple[Grid, ...]
    pictures: tuple[Picture, ...]


class Lvlm(nn.Module):
    """A vision-language model in PyTorch.

    Parameters
    ----------
    blueprint : Blueprint
        Of its sizes and settings. Weights are neither read nor made here, see `runtime.weights`.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        spec, settings = blueprint.spec, blueprint.settings
        if spec.vision is None or spec.adapter is None:
            raise Unsupported(f"{spec.name} has no vision part; the runtime runs vision-language models")
        self.spec, self.settings = spec, settings
        merge = 1 if settings.tile else settings.adapter.merge
        window = int(getattr(spec.media, "window", 0))
        self.vision = VisionEncoder(spec.vision, settings.vision, merge=merge, window=window)
        self.adapter = Adapter(spec.adapter, settings, spec.vision.width)
        self.decoder = Decoder(spec.decoder, settings.decoder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.decoder.embedding.weight.dtype

    def encode(self, pixels: Pixels, watch: Watch | None = None) -> Features:
        """Return the features of all patches; `watch` attends in place of the last layer."""
        patches = pixels.patches.to(self.device, self.dtype)
        return self.vision(patches, pixels.grids, watch)  # type: ignore[no-any-return]

    def adapt(self, features: Features) -> Visual:
        """Return the embeddings of all visual tokens."""
        return self.adapter(features)  # type: ignore[no-any-return]

    def reserve(self, batch: int, capacity: int) -> KvCache:
        """Return an empty cache for so many sequences of so many tokens.

        Raises
        ------
        DoesNotFit
            If it exceeds the free memory.
        """
        nbytes = batch * capacity * self.spec.decoder.kv_bytes_per_token(8 * self.dtype.itemsize)
        require(f"cache of {batch} x {capacity} tokens of {self.spec.name}", nbytes, self.device)
        return KvCache.reserve(self.spec.decoder, batch, capacity, device=self.device, dtype=self.dtype)

    def prefill(self, batch: Batch, visual: Visual | None, cache: KvCache, *, every: bool = False) -> Tensor:
        """Run whole prompts and fill the cache.

        Parameters
        ----------
        batch : Batch
        visual : Visual or None
            Embeddings of the visual tokens of all prompts, in order.
        cache : KvCache
            Empty, at least as long as the prompts.
        every : bool
            Whether to return the logits of every token, not of the last ones alone.

        Returns
        -------
        Tensor, shape (batch, vocabulary) or (batch, tokens, vocabulary)
            Logits.
        """
        longest = batch.tokens.shape[1]
        if longest > cache.capacity:
            raise ValueError(f"prompt of {longest} tokens exceeds the {cache.capacity} reserved; reserve more")
        tokens, positions, blocks, lengths, offsets = (
            torch.from_numpy(part).to(self.device)
            for part in (batch.tokens, batch.positions, batch.blocks, batch.lengths, batch.offsets)
        )
        x, deep = self.merge(tokens, blocks, visual)
        seen = blocks if self.spec.decoder.bidirectional_media and visual is not None else None
        out = self.decoder.prefill(x, positions, cache, blocks=seen, deep=deep)
        cache.prompt(lengths, offsets, longest, equal=len(set(batch.lengths.tolist())) == 1)
        if every:
            return self.decoder.head(out)
        rows = torch.arange(len(lengths), device=self.device)
        return self.decoder.head(out[rows, lengths - 1])

    def merge(self, tokens: Tensor, blocks: Tensor, visual: Visual | None) -> tuple[Tensor, Sequence[Tensor]]:
        """Return embeddings with the visual ones in their places, and what is added behind the first layers."""
        is_visual = blocks >= 0
        x = self.decoder.embed(tokens.masked_fill(is_visual, 0))
        if visual is None:
            return x, ()
        x[is_visual] = visual.embeddings.to(x.dtype)
        deep = []
        for part in visual.deep:
            added = torch.zeros_like(x)
            added[is_visual] = part.to(x.dtype)
            deep.append(added)
        return x, deep

    def decode_step(self, tokens: Tensor, cache: KvCache, *, step: Step | None = None) -> Tensor:
        """Run one new token a sequence and return the logits of what follows.

        Parameters
        ----------
        tokens : Tensor of int, shape (batch,)
        cache : KvCache
            Of a prefill or of earlier steps.
        step : callable, optional
            In place of the decoder's own.
        """
        if cache.longest >= cache.capacity:
            raise ValueError(f"cache is full with {cache.capacity} tokens; reserve more")
        places = (cache.lengths + cache.offsets)[:, None]
        run = step or self.decoder.step
        out = run(self.decoder.embed(tokens[:, None]), places.expand(AXES, -1, -1), cache)
        cache.advance()
        return self.decoder.head(out[:, 0])
