"""Attention over keys and values, grouped heads included: of whole prompts, and of new tokens behind a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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


def attend_behind(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Return attention of the last tokens, each of which sees what lies before it and itself.

    Parameters
    ----------
    q : Tensor, shape (batch, heads, new, head_dim)
    k, v : Tensor, shape (batch, kv_heads, tokens, head_dim)
        The new tokens stand at the end.
    """
    new, tokens = q.shape[2], k.shape[2]
    if new == 1:
        return attend_one(q, k, v, None, scale=scale)
    group = q.shape[1] // k.shape[1]
    seen = torch.ones(new, tokens, dtype=torch.bool, device=q.device).tril(tokens - new)
    queries = torch.unflatten(q, 1, (-1, group)).flatten(2, 3)
    mixed = functional.scaled_dot_product_attention(queries, k, v, attn_mask=seen.repeat(group, 1), scale=scale)
    return torch.unflatten(mixed, 2, (group, new)).flatten(1, 2)


def attend_openly(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return causal attention of a whole prompt, and its map, shape (batch, heads, tokens, tokens)."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    masked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    shares = scores.float().masked_fill(masked, -torch.inf).softmax(-1).to(q.dtype)
    return shares @ v, shares


def attention_rows(q: Tensor, k: Tensor, rows: int, *, scale: float | None = None) -> Tensor:
    """Return the attention of the last rows of a prompt, shape (batch, heads, rows, tokens).

    Fused attention keeps no map, so their product runs once more; grouped heads read each key once.
    """
    group, tokens = q.shape[1] // k.shape[1], k.shape[2]
    last = torch.unflatten(q[:, :, -rows:], 1, (-1, group)).flatten(2, 3)
    scores = (last @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.unflatten(scores, 2, (group, -1)).flatten(1, 2)
    masked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + tokens - scores.shape[2])
    return scores.float().masked_fill(masked, -torch.inf).softmax(-1)
