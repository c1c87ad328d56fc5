"""Settings of a worker: what its pool, policy, engine and device say, resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypedDict

from simulator.batching import batch_policy
from simulator.host_cache import host_rate_bytes_per_s
from simulator.service import Service
from simulator.topology import Pool

if TYPE_CHECKING:
    from simulator.serving_plan import Policies


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Settings of a worker, resolved.

    Parameters
    ----------
    token_budget, max_sequences : int
        Tokens of a step, and sequences that run at once.
    long_prefill_tokens : int
        Most tokens of one prompt in a step; 0 is no limit.
    kv_blocks, block_tokens : int
        Blocks of the cache, and tokens in each.
    encoder_budget, encoder_cache_tokens : int
        Embeddings that a step may encode, and that the cache holds.
    prefix_caching : bool
        Whether prompts that start alike share blocks.
    encode_items : int or None
        Most items of a forward pass for other workers.
    host_blocks : int
        Blocks that the host keeps copies of.
    host_block_bytes, host_block_s : float
        Bytes of one, and the time to load it [s].
    """

    token_budget: int
    max_sequences: int
    kv_blocks: int
    block_tokens: int
    encoder_budget: int
    encoder_cache_tokens: int
    long_prefill_tokens: int = 0
    prefix_caching: bool = True
    encode_items: int | None = None
    host_blocks: int = 0
    host_block_bytes: float = 0.0
    host_block_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no engine starts with."""
        for name in ("token_budget", "max_sequences", "kv_blocks", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; raise it")
        if self.token_budget < self.max_sequences:
            raise ValueError(
                f"token_budget={self.token_budget} must be max_sequences={self.max_sequences} or more, so that every "
                "sequence can decode; lower max_batch"
            )
        if self.long_prefill_tokens < 0:
            raise ValueError(f"long_prefill_tokens={self.long_prefill_tokens} must be 0 (no limit) or more")


@dataclass(frozen=True, slots=True)
class Roles:
    """What a worker does itself.

    Parameters
    ----------
    encodes, prefills, decodes : bool
        Whether it encodes the pictures of its own prompts, computes prompts, generates.
    """

    encodes: bool = True
    prefills: bool = True
    decodes: bool = True


EVERYTHING: Final = Roles()


def limits_of(
    pool: Pool, policies: Policies, service: Service, *, largest_item: int, largest_request: int, sends: bool
) -> Limits:
    """Return the settings of a pool's workers: the pool's own, else those of policy, engine and device.

    Parameters
    ----------
    largest_item, largest_request : int
        Embeddings of the largest item, and of all items of the largest request.
    sends : bool
        Whether it encodes for other pools.
    """
    capacity = service.capacity
    policy_budget = batch_policy(policies.batch).token_budget
    max_sequences = pool.max_batch or capacity.max_sequences
    budget = pool.token_budget or policy_budget or max(capacity.chunk_tokens, max_sequences)
    encoder = max(pool.encoder_budget_tokens or capacity.encoder_tokens, largest_item)
    receives = pool.runs("prefill") and not pool.runs("encode")
    least = largest_request if receives or sends else largest_item
    together = pool.lockstep
    shares = policies.prefix_caching and service.shares_prefixes
    return Limits(
        token_budget=budget * together,
        max_sequences=max(1, max_sequences * together // pool.pp),
        kv_blocks=max(1, capacity.kv_blocks * together // pool.pp),
        block_tokens=capacity.block_tokens,
        encoder_budget=encoder * together,
        encoder_cache_tokens=max((pool.encoder_cache_tokens or encoder) * together, least),
        long_prefill_tokens=pool.long_prefill_tokens or (budget if together > 1 else 0),
        prefix_caching=shares,
        encode_items=pool.encode_items,
        **(_host(pool, service) if shares and pool.host_cache_bytes else {}),
    )


class _Host(TypedDict, total=False):
    host_blocks: int
    host_block_bytes: float
    host_block_s: float


def _host(pool: Pool, service: Service) -> _Host:
    """Return what the host of a worker keeps.

    A block's bytes are what a sequence grows by: states of recurrences, which do not grow, are not counted.
    """
    tokens = service.capacity.block_tokens
    block_bytes = service.kv_bytes(2 * tokens) - service.kv_bytes(tokens)
    rate = host_rate_bytes_per_s(pool)
    if block_bytes <= 0:
        raise ValueError(
            f"host_cache_bytes={pool.host_cache_bytes:g} of pool {pool.name!r} is of a cache whose blocks have "
            "no bytes; leave it out"
        )
    return _Host(
        host_blocks=int(pool.host_cache_bytes / pool.loops // block_bytes),
        host_block_bytes=block_bytes,
        host_block_s=block_bytes / rate,
    )
