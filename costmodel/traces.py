"""Towers as `lvlm trace` lists them: every matrix product and attention of all layers, counted."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.units import UNBOUNDED


@dataclass(frozen=True, slots=True)
class TracedAttention:
    """Attention as a trace lists it: two batched products.

    Parameters
    ----------
    heads, qk_dim, v_dim : int
        Batch of the products, and widths of one head's query and value.
    pairs_ratio : float
        Query-key pairs over the square of the rows.
    repeats : int
        How often it stands in the trace.
    """

    heads: int
    qk_dim: int
    v_dim: int
    pairs_ratio: float = 1.0
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class TracedMixerSpec:
    """The attention of a whole tower as traced; its projections are among the tower's products.

    Parameters
    ----------
    attentions : tuple of TracedAttention
    cached_width : int
        Numbers that one token leaves in the caches of all layers.
    """

    attentions: tuple[TracedAttention, ...]
    cached_width: int = 0
    window: float = UNBOUNDED

    @property
    def label(self) -> str:
        """Short name in tables."""
        return "traced"

    @property
    def heads(self) -> int:
        """A trace cannot be split over devices."""
        return 1

    @property
    def q_width(self) -> float:
        """Width of all heads of all attentions: the mean of query and value."""
        return sum(a.heads * (a.qk_dim + a.v_dim) / 2 * a.pairs_ratio * a.repeats for a in self.attentions)

    def parameters(self, width: int) -> int:
        """Return nothing: parameters are counted whole."""
        del width
        return 0


@dataclass(frozen=True, slots=True)
class TracedProduct:
    """A matrix product as a trace lists it.

    Parameters
    ----------
    name : str
        The module that ran it, layer numbers left out.
    d_in, d_out : int
        Shape of the weight.
    rows_ratio : float
        Its rows over the rows of the tower.
    repeats : int
        How often it stands in the trace.
    experts : int
        Weights of a grouped product, of which each row uses one; 0 is a plain product.
    """

    name: str
    d_in: int
    d_out: int
    rows_ratio: float = 1.0
    repeats: int = 1
    experts: int = 0


@dataclass(frozen=True, slots=True)
class TracedFfnSpec:
    """Every matrix product of a whole tower as traced, and the parameters of the tower."""

    products: tuple[TracedProduct, ...]
    n_parameters: int

    @property
    def hidden(self) -> int:
        """Widest output of any product."""
        return max(product.d_out for product in self.products)

    def parameters(self, width: int) -> int:
        """Return the parameters of the tower."""
        del width
        return self.n_parameters

    def active_parameters(self, width: int) -> int:
        """Return the parameters that one token uses: of grouped products those of the rows it makes."""
        del width
        idle = sum(p.repeats * (p.experts - p.rows_ratio) * p.d_in * p.d_out for p in self.products if p.experts)
        return round(self.n_parameters - idle)
