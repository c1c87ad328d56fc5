"""A mixer whose memory does not grow: linear attention with a recurrent state."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.units import UNBOUNDED

STATE_BITS = 32
"""Width in which engines keep recurrent states (`mamba_ssm_dtype` of the configs), whatever that of the cache is."""


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """Linear attention by the gated delta rule: a state of fixed size a sequence in place of a cache that grows.

    Parameters
    ----------
    key_heads, value_heads : int
        Heads of queries and keys, and of values; each value head has a state.
    key_dim, value_dim : int
        Width of one head's key and value: the sides of its state.
    kernel : int
        Tokens that the causal convolution in front sees, its own included.
    chunk : int
        Tokens that prefill handles as one block.

    References
    ----------
    .. [1] S. Yang, J. Kautz, A. Hatamizadeh, "Gated Delta Networks", arXiv:2412.06464.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int = 4
    chunk: int = 64
    window: float = UNBOUNDED

    @property
    def label(self) -> str:
        """Short name in tables."""
        return "recurrent"

    @property
    def heads(self) -> int:
        """Heads that tensor parallelism deals out: value heads go with their keys."""
        return self.key_heads

    @property
    def value_width(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_dim

    @property
    def mixed_width(self) -> int:
        """Width of all queries, keys and values, which go through the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_width

    @property
    def cached_width(self) -> int:
        """Numbers that one token leaves in a cache: none."""
        return 0

    @property
    def state_width(self) -> float:
        """Numbers of 32 bits that a sequence keeps: the states, and at 16 bits the convolution's last inputs."""
        return self.value_heads * self.key_dim * self.value_dim + self.mixed_width * (self.kernel - 1) / 2

    @property
    def step_flops(self) -> int:
        """FLOPs that one token takes one after another: read by its key, update, read by its query [FLOP]."""
        return 6 * self.value_heads * self.key_dim * self.value_dim

    def block_flops(self, *, solves: bool) -> int:
        """Return the FLOPs of one token in blocks: with the state, and inside the block [FLOP].

        Parameters
        ----------
        solves : bool
            Whether to count the triangular systems, applied as dense products; `FlopCounterMode` does not see them.
        """
        inside = 4 * self.key_dim + 2 * self.value_dim + 2 * (self.key_dim + self.value_dim) * solves
        return self.step_flops + self.value_heads * self.chunk * inside

    def parameters(self, width: int) -> int:
        """Return the parameters of projections, gates, decays, convolution and norm of a layer of this width."""
        gates = 2 * self.value_heads
        matrices = width * (self.mixed_width + 2 * self.value_width + gates)
        return matrices + self.mixed_width * self.kernel + gates + self.value_dim
