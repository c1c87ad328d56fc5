"""Small parts that both towers share: norms, feed-forward blocks, experts, rotation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.layers import FfnSpec, MlpSpec, MoeSpec, Norm

QUICK_GELU: Final = (
    1.702  # D. Hendrycks, K. Gimpel, arXiv:1606.08415, section 2: a sigmoid in place of the error function
)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK_GELU * x)


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


class RmsNorm(nn.Module):
    """A norm by the root of the mean square, with gains of which `offset` is left out of the weights."""

    def __init__(self, width: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Return rows of unit mean square times the gains; in single precision where gains have an offset."""
        if not self.offset:
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        gains = self.weight.float() + self.offset
        return functional.rms_norm(x.float(), self.weight.shape, gains, self.eps).to(x.dtype)


def make_norm(kind: Norm, width: int, eps: float, *, offset: float = 0.0) -> nn.Module:
    """Return a norm of a kind that layers name."""
    if kind == "rms":
        return RmsNorm(width, eps, offset=offset)
    return nn.LayerNorm(width, eps=eps, bias=kind == "layer")


class Mlp(nn.Module):
    """A feed-forward block; where it is gated, gate and input are one matrix, in this order."""

    def __init__(self, width: int, spec: MlpSpec, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(width, spec.hidden * (1 + spec.gated), bias=spec.bias)
        self.down = nn.Linear(spec.hidden, width, bias=spec.bias)
        self.gated, self.activation = spec.gated, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for every row."""
        hidden = self.up(x)
        if not self.gated:
            return self.down(self.activation(hidden))  # type: ignore[no-any-return]
        gate, value = hidden.chunk(2, dim=-1)
        return self.down(self.activation(gate) * value)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A mixture of gated experts: each row goes to those of highest score, weighted by their shares.

    Rows are put in the order of their experts, and each product of all experts is one grouped product: no number
    leaves the device, so a CUDA graph can hold it.
    """

    def __init__(self, width: int, spec: MoeSpec, activation: str, *, normalises: bool) -> None:
        super().__init__()
        self.router = nn.Linear(width, spec.experts, bias=False)
        self.up = nn.Parameter(torch.empty(spec.experts, 2 * spec.hidden, width))
        self.down = nn.Parameter(torch.empty(spec.experts, width, spec.hidden))
        self.top_k, self.normalises, self.activation = spec.top_k, normalises, ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs for every row."""
        rows = x.reshape(-1, x.shape[-1])
        shares, chosen = torch.topk(self.router(rows).softmax(-1, dtype=torch.float32), self.top_k, dim=-1)
        if self.normalises:
            shares = shares / shares.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        source = order // self.top_k
        experts = torch.arange(len(self.up), device=x.device)
        ends = (chosen.flatten()[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
        gate, value = _grouped(rows[source], self.up, ends).chunk(2, dim=-1)
        outputs = _grouped(self.activation(gate) * value, self.down, ends)
        weighted = outputs * shares.flatten()[order, None].to(outputs.dtype)
        return torch.zeros_like(rows).index_add_(0, source, weighted).reshape(x.shape)


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return each group of rows times the transpose of its own weight; a group ends before the row of `ends`."""
    if rows.is_cuda and rows.dtype != torch.bfloat16:  # the CUDA kernel takes no other type
        parts = rows.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])
    return functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def make_ffn(width: int, spec: FfnSpec, activation: str, *, normalises: bool = True) -> nn.Module:
    """Return the feed-forward block of a layer.

    Raises
    ------
    Unsupported
        If it has experts that all tokens share, or is not known by its matrices.
    """
    if isinstance(spec, MlpSpec):
        return Mlp(width, spec, activation)
    if isinstance(spec, MoeSpec) and not spec.shared_hidden:
        return Experts(width, spec, activation, normalises=normalises)
    raise Unsupported("shared experts and traced layers have no runtime; gated and plain blocks and experts have")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of numbers that lie half a head apart.

    Parameters
    ----------
    x : Tensor, shape (..., head_dim)
    cos, sin : Tensor
        Of the angles, each half a copy of the other; shapes that broadcast.
    """
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of angles of half a head, for the whole of it."""
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()
