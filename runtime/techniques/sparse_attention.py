"""Block-sparse prefill: some blocks of queries and keys are computed, the others never are.

References
----------
.. [1] R. Xu et al., "XAttention", ICML 2025 (arXiv:2503.16428): blocks scored by sums along their antidiagonals.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.techniques.sparse_attention import SparseAttention
from costmodel.techniques.sparse_estimators import ESTIMATORS
from runtime.attention import attend_prompt
from runtime.techniques.plan import refuse


def antidiagonal_scores(q: Tensor, k: Tensor, *, block: int, stride: int, scale: float) -> Tensor:
    """Return the worth of every block of every head, shape (heads, blocks, blocks), those above the diagonal empty.

    Sums along the antidiagonals of squares of a side of `stride` are products of rows so many times as wide. A softmax
    over the squares that a row sees gives shares, and a block is worth the sum of its own.

    Parameters
    ----------
    q, k : Tensor, shape (heads, tokens, head_dim)
        Of whole blocks.
    """
    wide_q = torch.unflatten(q, 1, (-1, stride)).flip(2).flatten(2)
    wide_k = torch.unflatten(k, 1, (-1, stride)).flatten(2)
    n_blocks, side = q.shape[1] // block, block // stride
    worth = torch.zeros(q.shape[0], n_blocks, n_blocks, device=q.device)
    for i in range(n_blocks):
        rows, end = wide_q[:, i * side : (i + 1) * side], (i + 1) * side
        scores = (rows @ wide_k[:, :end].transpose(-1, -2)).float() * (scale / stride)
        later = torch.arange(end, device=q.device) > torch.arange(end - side, end, device=q.device)[:, None]
        shares = scores.masked_fill(later, -torch.inf).softmax(-1)
        worth[:, i, : i + 1] = torch.unflatten(shares, 2, (i + 1, side)).sum((1, 3))
    return worth


def nearest_scores(heads: int, n_blocks: int, device: torch.device) -> Tensor:
    """Return the worth of blocks where nothing is estimated: those near the diagonal count more."""
    index = torch.arange(n_blocks, device=device)
    return -(index[:, None] - index).abs().float().expand(heads, -1, -1)


def chosen_blocks(worth: Tensor, density: float) -> Tensor:
    """Return which blocks each head computes: its diagonal ones, and the best until there are enough."""
    n_blocks = worth.shape[-1]
    below = torch.ones(n_blocks, n_blocks, dtype=torch.bool, device=worth.device).tril()
    count = max(round(density * int(below.sum())), n_blocks)
    ranked = worth.masked_fill(~below, -torch.inf).clone()
    ranked.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    best = ranked.flatten(1).argsort(descending=True, stable=True, dim=-1)[:, :count]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).flatten(1).scatter_(1, best, value=True)
    return chosen.reshape(worth.shape)


class SparsePrefill:
    """Attends over chosen blocks of the prompt.

    Parameters
    ----------
    parameters : SparseAttention
    """

    def __init__(self, parameters: SparseAttention) -> None:
        refuse(parameters, neutral={"visual_only": False, "stage": "prefill"})
        if parameters.estimator not in ("none", "antidiagonal"):
            raise Unsupported(f"SparseAttention.estimator={parameters.estimator!r} does not run; use 'antidiagonal'")
        stride = parameters.estimator_stride or ESTIMATORS["antidiagonal"][0]
        self.parameters, self.block, self.stride = parameters, int(parameters.block), int(stride)
        if self.block != parameters.block or self.stride != stride or self.block % self.stride:
            given = f"block={parameters.block!r} and estimator_stride={stride!r}"
            raise Unsupported(f"SparseAttention.{given} do not run; give whole numbers, the first a multiple")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        """Return causal attention over the chosen blocks, shape (1, heads, tokens, head_dim)."""
        tokens, group = q.shape[2], q.shape[1] // k.shape[1]
        density = float(self.parameters.density_at(float(tokens)))
        chosen = self._chosen(q, k, scale=q.shape[-1] ** -0.5 if scale is None else scale, density=density)
        if bool(chosen.equal(torch.ones_like(chosen).tril())):
            return attend_prompt(q, k, v, None, scale=scale)
        index = torch.arange(tokens, device=q.device)
        out = torch.empty_like(q)
        for head, blocks in enumerate(chosen):
            for i, columns in enumerate(blocks):
                rows = index[i * self.block : (i + 1) * self.block]
                seen = torch.cat([index[j * self.block : (j + 1) * self.block] for j in columns.nonzero()[:, 0]])
                keys, values = (part[:, [head // group]][:, :, seen] for part in (k, v))
                mask = seen <= rows[:, None]
                mixed = functional.scaled_dot_product_attention(
                    q[:, [head]][:, :, rows], keys, values, attn_mask=mask, scale=scale
                )
                out[:, head, rows] = mixed[:, 0]
        return out

    def _chosen(self, q: Tensor, k: Tensor, *, scale: float, density: float) -> Tensor:
        missing = -q.shape[2] % self.block  # the last block is filled up for the estimate alone
        n_blocks = (q.shape[2] + missing) // self.block
        if self.parameters.estimator == "none":
            return chosen_blocks(nearest_scores(q.shape[1], n_blocks, q.device), density)
        keys = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
        padded = (functional.pad(part, (0, 0, 0, missing)) for part in (q[0], keys))
        worth = antidiagonal_scores(*padded, block=self.block, stride=self.stride, scale=scale)
        return chosen_blocks(worth, density)
