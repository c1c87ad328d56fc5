"""Layers of a transformer: how tokens are mixed, the feed-forward block, and runs of equal layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from costmodel.recurrent import RecurrentSpec
from costmodel.traces import TracedFfnSpec, TracedMixerSpec
from costmodel.units import UNBOUNDED

Norm = Literal["rms", "layer", "layer_no_bias"]


def norm_parameters(kind: Norm, width: int) -> int:
    """Return the parameters of a normalisation: a gain, and for a layer norm a bias unless it has none."""
    return 2 * width if kind == "layer" else width


class GroupedHeads:
    """Widths of query heads of which several may share one key and value head."""

    __slots__ = ()
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def q_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class AttentionSpec(GroupedHeads):
    """Grouped-query attention.

    Parameters
    ----------
    heads, kv_heads, head_dim : int
        Query heads, key/value heads and the width of one head.
    causal : bool
        Whether a query sees only what came before it.
    window : float
        Keys that a query sees at most, itself included [tokens].
    grouping : {"sequence", "window"}
        Whether a vision layer attends over the whole item or inside windows of the picture.
    rotary : bool
        Whether queries and keys are rotated.
    qkv_bias, out_bias : bool
        Biases of the projections.
    gated : bool
        Whether each query head brings a gate for its output, as wide as itself and biased as it is.
    extra_parameters : int
        Norms over queries and keys, missing or additional biases.
    """

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    window: float = UNBOUNDED
    grouping: Literal["sequence", "window"] = "sequence"
    rotary: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    gated: bool = False
    extra_parameters: int = 0

    @property
    def label(self) -> str:
        """Short name in tables."""
        return "full" if self.grouping == "sequence" and self.window == UNBOUNDED else "window"

    @property
    def cached_width(self) -> int:
        """Numbers that one token leaves in the cache."""
        return 2 * self.kv_width

    def parameters(self, width: int) -> int:
        """Return the parameters of the four projections of a layer of this width."""
        qkv = self.q_width * (1 + self.gated) + 2 * self.kv_width
        biases = qkv * self.qkv_bias + width * self.out_bias
        return width * (qkv + self.q_width) + biases + self.extra_parameters


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec:
    """Multi-head latent attention: keys and values are expanded from one cached latent a token.

    Parameters
    ----------
    heads : int
        Query heads, each with its own expanded key and value.
    q_rank, kv_rank : int
        Ranks of the query's and of the key/value's bottleneck; a query rank of 0 is none.
    nope_dim, rope_dim, value_dim : int
        Widths of one head's key without and with rotation, and of its value.

    References
    ----------
    .. [1] DeepSeek-AI, "DeepSeek-V2", arXiv:2405.04434, section 2.1.
    """

    heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    window: float = UNBOUNDED
    extra_parameters: int = 0

    @property
    def label(self) -> str:
        """Short name in tables."""
        return "latent"

    @property
    def q_width(self) -> int:
        """Width of all query heads."""
        return self.heads * (self.nope_dim + self.rope_dim)

    @property
    def out_width(self) -> int:
        """Width of all heads' outputs."""
        return self.heads * self.value_dim

    @property
    def expanded_width(self) -> int:
        """Width of all heads' keys (without rotation) and values after expansion."""
        return self.heads * (self.nope_dim + self.value_dim)

    @property
    def cached_width(self) -> int:
        """Numbers that one token leaves in the cache: the latent and one rotated key."""
        return self.kv_rank + self.rope_dim

    def parameters(self, width: int) -> int:
        """Return the parameters of all projections and of the two norms inside."""
        query = width * self.q_width
        if self.q_rank:
            query = width * self.q_rank + self.q_rank + self.q_rank * self.q_width
        latent = width * self.cached_width + self.kv_rank
        return query + latent + self.kv_rank * self.expanded_width + self.out_width * width + self.extra_parameters


@dataclass(frozen=True, slots=True)
class CrossAttentionSpec(GroupedHeads):
    """Cross-attention from text to encoder outputs, whose keys and values are computed once a request.

    Parameters
    ----------
    heads, kv_heads, head_dim : int
        As in `AttentionSpec`.
    extra_parameters : int
        Norms over queries and keys, gates.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: float = UNBOUNDED
    extra_parameters: int = 0

    @property
    def label(self) -> str:
        """Short name in tables."""
        return "cross"

    @property
    def cached_width(self) -> int:
        """Numbers that one encoder output leaves in the cache."""
        return 2 * self.kv_width

    def parameters(self, width: int) -> int:
        """Return the parameters of the four projections of a layer of this width."""
        return width * (2 * self.q_width + 2 * self.kv_width) + self.extra_parameters


MixerSpec: TypeAlias = AttentionSpec | LatentAttentionSpec | CrossAttentionSpec | RecurrentSpec | TracedMixerSpec


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A dense feed-forward block: two matrices, or three when gated."""

    hidden: int
    gated: bool
    bias: bool

    def parameters(self, width: int) -> int:
        """Return the parameters of the block in a layer of this width."""
        up = 2 if self.gated else 1
        biases = (up * self.hidden + width) * self.bias
        return (up + 1) * width * self.hidden + biases

    def active_parameters(self, width: int) -> int:
        """Return the parameters that one token uses."""
        return self.parameters(width)


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of gated experts, each token going to `top_k` of them and to the shared ones.

    Parameters
    ----------
    experts, top_k : int
        Routed experts, and those that one token uses.
    hidden : int
        Hidden width of one routed expert.
    shared_hidden : int
        Hidden width of all shared experts together; 0 is none.
    shared_gate : bool
        Whether a token scales the shared experts' output by a gate of its own: one more column beside the router.
    extra_parameters : int
        Biases and the like beyond the router's matrix.
    """

    experts: int
    top_k: int
    hidden: int
    shared_hidden: int = 0
    shared_gate: bool = False
    extra_parameters: int = 0

    @property
    def router_width(self) -> int:
        """Columns of the router, with that of the shared experts' gate."""
        return self.experts + self.shared_gate

    def _parameters(self, width: int, n_experts: int) -> int:
        matrices = 3 * width * (n_experts * self.hidden + self.shared_hidden)
        return matrices + width * self.router_width + self.extra_parameters

    def parameters(self, width: int) -> int:
        """Return the parameters of the block in a layer of this width."""
        return self._parameters(width, self.experts)

    def active_parameters(self, width: int) -> int:
        """Return the parameters that one token uses."""
        return self._parameters(width, self.top_k)


FfnSpec: TypeAlias = MlpSpec | MoeSpec | TracedFfnSpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One transformer layer: norms, a mixer and a feed-forward block, and what else it may hold.

    Parameters
    ----------
    width : int
        Hidden size.
    mixer, ffn
        How tokens are mixed, and the block behind.
    norm : {"rms", "layer", "layer_no_bias"}
        Kind of its norms.
    n_norms : int
        How many there are: 2, 4 where outputs are normalised too, 1 where both halves share one.
    extra_parameters : int
        Layer scales and the like.
    """

    width: int
    mixer: MixerSpec
    ffn: FfnSpec
    norm: Norm
    n_norms: int = 2
    extra_parameters: int = 0

    @property
    def _rest(self) -> int:
        return self.n_norms * norm_parameters(self.norm, self.width) + self.extra_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the layer."""
        return self._rest + self.mixer.parameters(self.width) + self.ffn.parameters(self.width)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        return self._rest + self.mixer.parameters(self.width) + self.ffn.active_parameters(self.width)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Consecutive equal layers."""

    n_layers: int
    layer: LayerSpec

    @property
    def parameters(self) -> int:
        """Parameters of the run."""
        return self.n_layers * self.layer.parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        return self.n_layers * self.layer.active_parameters


def runs_of(layers: list[LayerSpec]) -> tuple[LayerRun, ...]:
    """Return layers in order as runs, equal neighbours together."""
    runs: list[LayerRun] = []
    for layer in layers:
        n_equal = runs.pop().n_layers if runs and runs[-1].layer == layer else 0
        runs.append(LayerRun(n_equal + 1, layer))
    return tuple(runs)
