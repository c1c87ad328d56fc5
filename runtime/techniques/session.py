"""One request under techniques: encode, adapt, prefill and steps, with what they leave out really left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec
from costmodel.techniques import Technique
from costmodel.techniques.sparse_attention import SparseAttention
from costmodel.techniques.speculate import Speculate
from costmodel.units import UNBOUNDED
from runtime.adapters import Visual
from runtime.attention import attend_openly, attend_prompt
from runtime.generate import Prompt, batched
from runtime.model import Lvlm
from runtime.prompts import AXES, Batch
from runtime.techniques.kv_evict import Evictor
from runtime.techniques.kv_quantize import Quantizer
from runtime.techniques.kv_retrieve import Retriever, RetrievingStore
from runtime.techniques.plan import Plan
from runtime.techniques.sparse_attention import SparsePrefill
from runtime.techniques.speculate import Drafter, LayersDrafter, ModelDrafter, Speculator, proposes, seen_by_draft
from runtime.techniques.stores import PlainStore, Store, held_bytes
from runtime.techniques.stream_state import Streamer
from runtime.techniques.token_reduce import LayerReducer, OutsideReducer


class LayerCaches:
    """The cache of one request, layer by layer: what layers ask of it is in `runtime.cache.Cache`.

    Parameters
    ----------
    plan : Plan
    model : Lvlm
    visual : Tensor of bool, shape (tokens,)
        Which tokens of the prompt are visual.
    """

    def __init__(self, plan: Plan, model: Lvlm, visual: Tensor) -> None:
        n_layers = model.spec.decoder.n_layers
        mixer = model.spec.decoder.layers()[0].mixer
        kv_width = cast("AttentionSpec", mixer).kv_width
        self.reducer = LayerReducer(plan.layer, n_layers, visual) if plan.layer else None
        self.evictor = Evictor(plan.evict, n_layers) if plan.evict else None
        self.quantizer = Quantizer(plan.quantize, kv_width) if plan.quantize else None
        self.retriever = Retriever(plan.retrieve) if plan.retrieve else None
        self.sparse = SparsePrefill(plan.sparse) if plan.sparse and plan.sparse != SparseAttention() else None
        if self.retriever and (self.evictor or self.quantizer):
            raise Unsupported("KVRetrieve runs on a whole cache of full width; leave KVEvict and KVQuantize out")
        self.visual = visual
        self.stores: list[Store] = []

    def thin(self, layer: int) -> Tensor | None:
        """Return the tokens that go on into a layer; None where all do."""
        rows = self.reducer.thin(layer) if self.reducer else None
        if rows is not None:
            self.visual = self.visual[rows]
        return rows

    def attend_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None
    ) -> Tensor:
        """Return the attention of the prompt, and keep of it what techniques leave."""
        shares = None
        if (self.reducer and self.reducer.wants_map(layer)) or (self.evictor and self.evictor.wants_map()):
            mixed, shares = attend_openly(q, k, v, scale=scale)
        elif self.sparse:
            mixed = self.sparse.attend(q, k, v, scale=scale)
        else:
            mixed = attend_prompt(q, k, v, mask, scale=scale)
        if self.reducer:
            self.reducer.see(layer, q, k, shares, scale=scale)
        self.stores.append(self._store(layer, (q, k, v), shares, scale=scale))
        return mixed

    def _store(
        self, layer: int, parts: tuple[Tensor, Tensor, Tensor], shares: Tensor | None, *, scale: float | None
    ) -> Store:
        if self.retriever and bool(self.visual.any()):
            return self.retriever.store(*parts, self.visual)
        store: Store = PlainStore(*parts[1:])
        if self.evictor:
            store = self.evictor.store(layer, parts, shares, visual=self.visual, scale=scale)
        if self.quantizer:
            if not isinstance(store, PlainStore):
                raise Unsupported("KVQuantize packs heads of one length; set ragged=False in KVEvict")
            store = self.quantizer.store(store.keys, store.values)
        return store

    def attend_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: float, *, scale: float | None) -> Tensor:
        """Return the attention of new tokens over what is kept, themselves included."""
        del window  # a session takes models that see everything
        self.stores[layer].append(k, v)
        return self.stores[layer].attend(q, scale=scale)


class Session:
    """One request that is running.

    Parameters
    ----------
    model : Lvlm
    caches : LayerCaches
        Behind the prefill.
    logits : Tensor, shape (vocabulary,)
        Of what follows the last token.
    place : int
        Position of the next token.
    """

    def __init__(self, model: Lvlm, caches: LayerCaches, logits: Tensor, place: int) -> None:
        self.model, self.caches, self.logits, self.place = model, caches, logits, place
        self.speculator: Speculator | None = None
        self.streamer: Streamer | None = None

    @staticmethod
    @torch.inference_mode()
    def start(
        model: Lvlm, prompt: Prompt, techniques: Sequence[Technique] = (), *, draft: Lvlm | None = None, seed: int = 0
    ) -> Session:
        """Return a prompt, encoded, adapted and prefilled under techniques."""
        _check(model)
        plan = Plan.of(techniques)
        batch, visual = _seen(model, prompt, plan)
        if plan.stream:
            return streamed(model, plan, batch, visual)
        session = prefilled(model, plan, batch, visual)
        if plan.speculate and proposes(plan.speculate):
            if plan.retrieve and plan.retrieve.each == "step":
                raise Unsupported("KVRetrieve.each='step' chooses for one token, and a draft has several; use 'turn'")
            drafter = _drafter(session, plan.speculate, draft, batch, (prompt, visual))
            session.speculator = Speculator(plan.speculate, plan.relax, drafter, seed=seed)
        elif plan.relax and plan.relax.probability:
            raise ValueError(f"{plan.relax.name} relaxes the verification of a draft, and there is none; speculate too")
        return session

    @property
    def nbytes(self) -> int:
        """Keys and values that are held on the device, with their scales, a draft's included [bytes]."""
        drafter = self.speculator.drafter if self.speculator else None
        beside = drafter.session.nbytes if isinstance(drafter, ModelDrafter) else 0
        return held_bytes(self.caches.stores) + beside

    @property
    def host_bytes(self) -> int:
        """Keys and values that are held on the host [bytes]."""
        return sum(store.host_bytes for store in self.caches.stores if isinstance(store, RetrievingStore))

    @torch.inference_mode()
    def step(self, tokens: Tensor, *, layers: int | None = None) -> Tensor:
        """Run new tokens behind each other and return the logits of what follows each, shape (new, vocabulary).

        Parameters
        ----------
        tokens : Tensor of int, shape (new,)
        layers : int, optional
            The first ones alone, as a draft.
        """
        places = torch.arange(self.place, self.place + len(tokens), device=tokens.device)
        decoder = self.model.decoder
        out = decoder.step(decoder.embed(tokens[None]), places.expand(AXES, 1, -1), self.caches, layers=layers)
        self.place += len(tokens)
        if self.streamer:
            self.streamer.came(torch.zeros(len(tokens), dtype=torch.bool))
        return decoder.head(out[0])

    def drop(self, count: int, *, layers: int | None = None) -> None:
        """Forget the last tokens; of the first layers alone, where these ran as a draft."""
        for store in self.caches.stores[:layers]:
            store.drop(count)
        self.place -= count

    def settle(self) -> None:
        """Let the stores do what follows once the last tokens are sure to stay."""
        for store in self.caches.stores:
            store.settle()
        if self.streamer:
            self.streamer.trim(self.caches.stores)

    @torch.inference_mode()
    def greedy(self, max_tokens: int, *, stop: Sequence[int] = ()) -> list[int]:
        """Return so many new tokens at most, each the most likely one, up to one behind which the prompt has ended."""
        found = [int(self.logits.argmax())]
        while len(found) < max_tokens and not set(found) & set(stop):
            found += self.speculator.round(self, found[-1]) if self.speculator else [self._next(found[-1])]
        ends = [i for i, token in enumerate(found) if token in stop]
        return found[: min(ends[0] + 1 if ends else max_tokens, max_tokens)]

    def _next(self, token: int) -> int:
        self.logits = self.step(torch.tensor([token], device=self.model.device))[-1]
        self.settle()
        return int(self.logits.argmax())


def prefilled(model: Lvlm, plan: Plan, batch: Batch, visual: Visual | None) -> Session:
    """Return the session of a prompt whose visual tokens are there."""
    tokens, positions, blocks = (
        torch.from_numpy(part).to(model.device) for part in (batch.tokens, batch.positions, batch.blocks)
    )
    caches = LayerCaches(plan, model, blocks[0] >= 0)
    x, deep = model.merge(tokens, blocks, visual)
    out = model.decoder.prefill(x, positions, caches, blocks=None, deep=deep, thin=caches.thin)
    return Session(model, caches, model.decoder.head(out[0, -1]), int(batch.lengths[0] + batch.offsets[0]))


def streamed(model: Lvlm, plan: Plan, batch: Batch, visual: Visual | None) -> Session:
    """Return the session of a prompt that came chunk by chunk against a bounded state."""
    others = ("layer", "evict", "quantize", "retrieve", "sparse", "speculate")
    taken = [name for name in others if getattr(plan, name) is not None]
    if taken or plan.stream is None or (visual is not None and visual.deep):
        what = ", ".join(taken) or "states added behind the first layers"
        raise Unsupported(f"StreamState runs beside what acts in front of the language model, not with {what}")
    streamer = Streamer(plan.stream)
    tokens, positions, blocks = (
        torch.from_numpy(part).to(model.device) for part in (batch.tokens, batch.positions, batch.blocks)
    )
    caches = LayerCaches(plan, model, blocks[0] >= 0)
    x, _ = model.merge(tokens, blocks, visual)
    out = x
    for start, end in streamer.chunks(x.shape[1]):
        part, places = x[:, start:end], positions[:, :, start:end]
        run = partial(model.decoder.prefill, blocks=None) if not start else model.decoder.step
        out = run(part, places, caches)
        streamer.came(blocks[0, start:end] >= 0)
        streamer.trim(caches.stores)
    session = Session(model, caches, model.decoder.head(out[0, -1]), int(batch.lengths[0] + batch.offsets[0]))
    session.streamer = streamer
    return session


def _drafter(
    target: Session, parameters: Speculate, draft: Lvlm | None, batch: Batch, seen: tuple[Prompt, Visual | None]
) -> Drafter:
    """Return what proposes tokens: the target's first layers, or another model that has seen the prompt."""
    n_layers = target.model.spec.decoder.n_layers
    if parameters.layers is not None:
        if parameters.layers >= n_layers:
            raise ValueError(f"Speculate.layers={parameters.layers!r} must be fewer than {n_layers}; use less")
        return LayersDrafter(target, parameters.layers)
    if draft is None:
        raise Unsupported(f"Speculate.draft={parameters.draft!r} is a name; give the model as draft=, or set layers")
    _check(draft)
    prompt, visual = seen
    if visual is None:
        return ModelDrafter(prefilled(draft, Plan(), batch, None))
    if not parameters.shares_encoder:
        batch, visual = _seen(draft, prompt, Plan())
        assert visual is not None  # noqa: S101 - the prompt has pictures
    if visual.embeddings.shape[1] != draft.spec.decoder.width:
        rule = f"of width {draft.spec.decoder.width} cannot take visual tokens of {visual.embeddings.shape[1]}"
        raise Unsupported(f"draft {draft.spec.name} {rule}; set shares_encoder=False")
    places = seen_by_draft(parameters, len(visual.embeddings))
    fewer = Visual(visual.embeddings[places], tuple(part[places] for part in visual.deep))
    return ModelDrafter(prefilled(draft, Plan(), without(batch, places), fewer))


def _check(model: Lvlm) -> None:
    decoder = model.spec.decoder
    if any(window < UNBOUNDED for window in model.decoder.windows) or decoder.bidirectional_media:
        rule = "has layers with a window, or pictures that see both ways"
        raise Unsupported(f"{model.spec.name} {rule}; techniques run on models whose layers are causal and see all")


def _seen(model: Lvlm, prompt: Prompt, plan: Plan) -> tuple[Batch, Visual | None]:
    """Return the prompt without the visual tokens that techniques took out of it, and those that stay."""
    batch = batched(model, [prompt])
    if prompt.pixels is None:
        return batch, None
    places = torch.arange(int((batch.blocks >= 0).sum()))
    outside = _outside(model, plan) if plan.encoder_out and plan.encoder_out.keep != 1 else None
    features = model.encode(prompt.pixels, outside.watch if outside else None)
    if outside:
        features, kept = outside.behind_encoder(features)
        places = places[kept.cpu()]
    visual = model.adapt(features)
    if plan.pre_llm:
        kept = OutsideReducer(plan.pre_llm, merge=1, has_class=False).choose(visual.embeddings[:, None], None)[0]
        places = places[kept.cpu()]
        visual = Visual(visual.embeddings[kept], tuple(part[kept] for part in visual.deep))
    return without(batch, places), visual


def _outside(model: Lvlm, plan: Plan) -> OutsideReducer:
    settings = model.settings
    has_class = model.vision.class_token is not None
    if (settings.tile and settings.adapter.merge > 1) or (has_class and not settings.vision.drops_class_token):
        rule = "mixes patches of a tile, or keeps class tokens, in its adapter"
        raise Unsupported(f"{model.spec.name} {rule}; use at='pre_llm'")
    assert plan.encoder_out is not None  # noqa: S101 - the caller looked
    return OutsideReducer(plan.encoder_out, merge=settings.adapter.merge, has_class=has_class)


def without(batch: Batch, places: Tensor) -> Batch:
    """Return a prompt with the visual tokens at these places alone; all positions stay, also of what follows."""
    stays = batch.blocks[0] < 0
    stays[(batch.blocks[0] >= 0).nonzero()[0][places.numpy()]] = True
    lengths = batch.lengths * 0 + int(stays.sum())
    return replace(
        batch,
        tokens=batch.tokens[:, stays],
        positions=batch.positions[:, :, stays],
        blocks=batch.blocks[:, stays],
        lengths=lengths,
        offsets=batch.offsets + batch.lengths - lengths,
    )
