"""Bytes on one device: weights, cache, activations at their peak, what fits, and the largest batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from costmodel.activations import Activations, activations
from costmodel.base import Quantity
from costmodel.blocks import weight_bytes_each
from costmodel.deployment import Parallelism
from costmodel.hardware import HardwareProfile
from costmodel.layers import AttentionSpec, CrossAttentionSpec, LatentAttentionSpec, LayerSpec, MoeSpec
from costmodel.memo import remember
from costmodel.mixers import cached_width_on_device
from costmodel.query import MAX_BATCH, KVEntry, Query
from costmodel.recurrent import RecurrentSpec
from costmodel.stages import Structure
from costmodel.sums import evicted_tokens, kept_tokens
from costmodel.units import BITS_PER_BYTE

Part: TypeAlias = Literal["vision", "language"]
PARTS: Final[tuple[Part, ...]] = ("vision", "language")
_OF_PART: Final[Mapping[Part, tuple[str, ...]]] = {
    "vision": ("vision_weights_bytes", "encode_activation_bytes"),
    "language": (
        "language_weights_bytes",
        "draft_weights_bytes",
        "kv_bytes",
        "host_kv_bytes",
        "block_bytes",
        "prefill_activation_bytes",
    ),
}
"""What of `Memory` a device without a part does not hold."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one device [bytes].

    Parameters
    ----------
    vision_weights_bytes, language_weights_bytes : float
        Weights of encoder and adapter, and of the language model.
    kv_bytes : float
        Cached keys and values at the end of the answer, in whole blocks.
    encode_activation_bytes, prefill_activation_bytes : float
        Activations of the two stages that have most; they do not run at the same time. With those of prefill stand
        keys and values that are evicted when it ends.
    reserve_bytes : float
        Context, kernels and graphs of the engine, and what fragments.
    capacity_bytes, usable_bytes : float
        Memory of the device, and the share of it that the engine may use.
    block_bytes : float
        One block of the cache in all layers; 0 where the model caches nothing that grows.
    host_kv_bytes : float
        Cached keys and values that are kept on the host.
    draft_weights_bytes : float
        Weights of a draft that the device keeps beside the model; its cache is part of `kv_bytes`.
    """

    vision_weights_bytes: float
    language_weights_bytes: float
    kv_bytes: float
    encode_activation_bytes: float
    prefill_activation_bytes: float
    reserve_bytes: float
    capacity_bytes: float
    usable_bytes: float
    block_bytes: float
    host_kv_bytes: float = 0.0
    draft_weights_bytes: float = 0.0

    @property
    def weights_bytes(self) -> float:
        """All weights."""
        return self.vision_weights_bytes + self.language_weights_bytes + self.draft_weights_bytes

    @property
    def activation_bytes(self) -> float:
        """The larger activations."""
        return max(self.encode_activation_bytes, self.prefill_activation_bytes)

    @property
    def peak_bytes(self) -> float:
        """Everything at once."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.reserve_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the engine may use."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def kv_blocks(self) -> int:
        """Blocks that an engine would allocate: all that weights, activations and reserve leave."""
        free = self.usable_bytes - self.peak_bytes + self.kv_bytes
        return max(0, int(free / self.block_bytes)) if self.block_bytes else 0


def memory(
    query: Query,
    hardware: HardwareProfile,
    structure: Structure | None = None,
    *,
    parts: Collection[Part] = PARTS,
) -> Memory:
    """Return the memory of one device for a query of single numbers.

    Parameters
    ----------
    query : Query
    hardware : HardwareProfile
    structure : Structure, optional
        That of the query, where it is at hand.
    parts : collection of str
        What the device holds: vision (encoder and adapter), language, or both. What it does not hold costs nothing.
    """
    structure = structure or Structure.of(query)
    whole = _whole_memory(query, hardware, structure)
    missing = {name for part in PARTS if part not in parts for name in _OF_PART[part]}
    return replace(whole, **dict.fromkeys(missing, 0.0)) if missing else whole


def _whole_memory(query: Query, hardware: HardwareProfile, structure: Structure) -> Memory:
    engine = query.engine
    vision, language = weights_bytes(structure)
    stages = activations(query, structure, evicted_bytes=evicted_bytes_per_request(query, structure))
    live = [float(stage.at(query.replica_batch)) for stage in stages]
    drafting = _draft_activations(query)
    encoding = max([live[0] if len(live) > 1 else 0.0, *(float(s.at(query.replica_batch)) for s in drafting[:-1])])
    return Memory(
        vision_weights_bytes=vision,
        language_weights_bytes=language,
        kv_bytes=float(query.replica_batch * (kv_bytes_per_request(query, structure) + draft_kv_bytes(query))),
        encode_activation_bytes=encoding,
        prefill_activation_bytes=max([live[-1], *(float(s.at(query.replica_batch)) for s in drafting[-1:])]),
        reserve_bytes=engine.reserve_bytes,
        capacity_bytes=hardware.memory_bytes,
        usable_bytes=hardware.memory_bytes * engine.memory_fraction,
        block_bytes=engine.kv_block_tokens * (bytes_per_token(structure) + _draft_bytes_per_token(query)),
        host_kv_bytes=float(query.replica_batch * host_kv_bytes_per_request(query, structure)),
        draft_weights_bytes=draft_weights_bytes(query),
    )


def _draft_beside(query: Query) -> tuple[Query, Structure] | None:
    """Return what a draft adds to the target's device, None where it adds nothing."""
    draft, own = query.draft, query.drafting
    if draft is None or own is None or not draft.keeps_on_device:
        return None
    return own, Structure.of(own)


def draft_weights_bytes(query: Query) -> float:
    """Return the weights of a draft that one device keeps beside the model [bytes].

    A head has its layers, and the product that joins an embedding with the target's last state (EAGLE,
    arXiv:2401.15077).
    """
    draft, beside = query.draft, _draft_beside(query)
    if draft is None or beside is None:
        return 0.0
    _, structure = beside
    if draft.origin == "head":
        width, parallelism = structure.model.decoder.width, structure.parallelism
        layers = sum(part.n_layers * _layer_parameters(part.layer, parallelism) for part in structure.decoder)
        return (layers + 2 * width * width / parallelism.tp) * weight_bytes_each(structure.precision.weight_bits)
    vision, language = weights_bytes(structure)
    return language + vision * draft.own_encoder


def draft_kv_bytes(query: Query) -> Quantity:
    """Return the cache of a draft for one request that one device keeps beside the model's [bytes]."""
    beside = _draft_beside(query)
    return 0.0 if beside is None else kv_bytes_per_request(*beside)


def _draft_bytes_per_token(query: Query) -> float:
    beside = _draft_beside(query)
    return 0.0 if beside is None else bytes_per_token(beside[1])


def _draft_activations(query: Query) -> list[Activations]:
    beside = _draft_beside(query)
    return [] if beside is None else activations(*beside)


def weights_bytes(structure: Structure) -> tuple[float, float]:
    """Return the weights on one device, of the vision part and of the language model [bytes].

    Linear layers of the language model are stored at their width, the rest at no less than 16 bits.
    """
    return remember(structure.tables, "weights", lambda: _weights_bytes(structure))


def _weights_bytes(structure: Structure) -> tuple[float, float]:
    decoder, parallelism = structure.model.decoder, structure.parallelism
    full = max(16, structure.precision.weight_bits) / BITS_PER_BYTE
    linear = weight_bytes_each(structure.precision.weight_bits)
    layers = sum(run.n_layers * _layer_parameters(run.layer, parallelism) for run in decoder.runs)
    ends = decoder.end_parameters / parallelism.tp
    parameters = structure.model.parameters()
    pictures = (parameters["vision"] + parameters["adapter"]) / parallelism.encoder + structure.model.other_parameters
    return pictures * full, layers * linear * stage_share(structure) + ends * full


def _layer_parameters(layer: LayerSpec, parallelism: Parallelism) -> float:
    """Return the parameters of a layer that one device holds: its share, and whole what cannot be split."""
    tp, copied = parallelism.tp, _copied_parameters(layer, parallelism.tp)
    if not isinstance(layer.ffn, MoeSpec) or parallelism.ep == 1:
        return layer.parameters / tp + copied
    routed = 3 * layer.width * layer.ffn.experts * layer.ffn.hidden
    return (layer.parameters - routed) / tp + routed / parallelism.ep + copied


def _copied_parameters(layer: LayerSpec, tp: int) -> float:
    """Return what one device holds beyond its share: key heads beyond their number, latents, the router."""
    mixer, whole = layer.mixer, 0.0
    if isinstance(mixer, LatentAttentionSpec):
        whole += layer.width * (mixer.cached_width + mixer.q_rank)
    if isinstance(layer.ffn, MoeSpec):
        whole += layer.width * layer.ffn.router_width
    copied = whole * (1 - 1 / tp)
    if isinstance(mixer, AttentionSpec | CrossAttentionSpec):
        copied += layer.width * (cached_width_on_device(mixer, tp) - mixer.cached_width / tp)
    return copied


def stage_share(structure: Structure) -> float:
    """Return the share of the layers that the longest pipeline stage holds."""
    n_layers, n_stages = structure.model.decoder.n_layers, structure.parallelism.pp
    return math.ceil(n_layers / n_stages) / n_layers


def entry_bytes_per_token(entry: KVEntry, n_devices: int) -> float:
    """Return the bytes that one token takes in a cache entry on one device [bytes]."""
    return entry.n_layers * cached_width_on_device(entry.mixer, n_devices) * entry.bytes_each


def kept_bytes(entry: KVEntry, tokens: Quantity, n_devices: int) -> Quantity:
    """Return what a cache entry holds of a sequence of so many kept tokens on one device [bytes].

    The next query sees a window of keys, its own included, so one fewer is kept.
    """
    most = np.inf if isinstance(entry.mixer, RecurrentSpec) else entry.mixer.window - 1.0
    return np.minimum(tokens, most) * entry_bytes_per_token(entry, n_devices)


def bytes_per_token(structure: Structure) -> float:
    """Return the bytes that one token takes in the growing caches of one device [bytes]."""
    tp, growing = structure.parallelism.tp, [e for e in structure.kv if e.grows and e.placement == "gpu"]
    return sum(entry_bytes_per_token(entry, tp) for entry in growing) * stage_share(structure)


def kv_bytes_per_request(query: Query, structure: Structure | None = None) -> Quantity:
    """Return the cache of one request on one device when its answer ends, in whole blocks [bytes].

    Of a cache on the host, the device holds what a step reads.
    """
    structure = structure or Structure.of(query)
    total: Quantity = 0.0
    for entry in structure.kv:
        here = 1.0 if entry.placement == "gpu" else entry.read_share
        total = total + here * _entry_bytes(query, entry)
    return total * stage_share(structure)


def evicted_bytes_per_request(query: Query, structure: Structure) -> Quantity:
    """Return what prefill holds of one request's cache on one device, and no step [bytes]."""
    tp = structure.parallelism.tp
    total: Quantity = 0.0
    for entry in structure.kv:
        kept = kept_tokens(query, entry)
        more = _in_blocks(query, entry, kept + evicted_tokens(query, entry)) - _in_blocks(query, entry, kept)
        total = total + more * entry_bytes_per_token(entry, tp)
    return total * stage_share(structure)


def host_kv_bytes_per_request(query: Query, structure: Structure) -> Quantity:
    """Return the cache of one request on the host of one device [bytes]."""
    away = (entry for entry in structure.kv if entry.placement != "gpu")
    total: Quantity = sum((_entry_bytes(query, entry) for entry in away), start=0.0)
    return total * stage_share(structure)


def _in_blocks(query: Query, entry: KVEntry, tokens: Quantity) -> Quantity:
    """Return tokens of an entry in whole blocks."""
    block = query.engine.kv_block_tokens if entry.grows else 1.0
    return np.ceil(tokens / block) * block


def _entry_bytes(query: Query, entry: KVEntry) -> Quantity:
    return _in_blocks(query, entry, kept_tokens(query, entry)) * entry_bytes_per_token(entry, query.parallelism.tp)


def max_batch(query: Query, hardware: HardwareProfile, structure: Structure | None = None) -> int:
    """Return the largest batch of this request that fits on the devices, 0 when not even one does."""
    engine = query.engine
    structure = structure or Structure.of(query)
    free = hardware.memory_bytes * engine.memory_fraction - engine.reserve_bytes - sum(weights_bytes(structure))
    free -= draft_weights_bytes(query)
    cache = kv_bytes_per_request(query, structure) + draft_kv_bytes(query)
    stages = activations(query, structure, evicted_bytes=evicted_bytes_per_request(query, structure))
    stages += _draft_activations(query)
    largest = int(min(max(0.0, min(float(stage.largest_batch(free, cache)) for stage in stages)), MAX_BATCH))
    return int(min(largest * query.parallelism.dp, MAX_BATCH))
