"""What a model is: its towers as runs of equal layers, its adapter, and how its family turns pictures into tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from costmodel.memo import Cache, remember
from costmodel.units import UNBOUNDED
from costmodel.workload import Video

Norm = Literal["rms", "layer"]


def norm_parameters(kind: Norm, width: int) -> int:
    """Return the parameters of a normalisation: a gain, and for a layer norm a bias."""
    return width if kind == "rms" else 2 * width


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention.

    Parameters
    ----------
    heads, kv_heads, head_dim : int
        Query heads, key/value heads and the width of one head.
    causal : bool
        Whether a query sees only what came before it.
    window : float
        Keys that a query sees at most [tokens].
    grouping : {"sequence", "window"}
        Whether a vision layer attends over the whole item or inside windows of the picture.
    rotary : bool
        Whether queries and keys are rotated.
    qkv_bias, out_bias : bool
        Biases of the projections.
    qk_norm : int
        Parameters of the norms over queries and keys.
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
    qk_norm: int = 0

    @property
    def q_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.kv_heads * self.head_dim

    def parameters(self, width: int) -> int:
        """Return the parameters of the four projections of a layer of this width."""
        qkv = self.q_width + 2 * self.kv_width
        biases = qkv * self.qkv_bias + width * self.out_bias
        return width * (qkv + self.q_width) + biases + self.qk_norm


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


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One transformer layer: two norms, a mixer and a feed-forward block, and what else it may hold."""

    width: int
    mixer: AttentionSpec
    ffn: MlpSpec
    norm: Norm
    extra_parameters: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of the layer."""
        norms = 2 * norm_parameters(self.norm, self.width)
        return norms + self.mixer.parameters(self.width) + self.ffn.parameters(self.width) + self.extra_parameters


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Consecutive equal layers."""

    n_layers: int
    layer: LayerSpec

    @property
    def parameters(self) -> int:
        """Parameters of the run."""
        return self.n_layers * self.layer.parameters


@dataclass(frozen=True, slots=True)
class VisionEncoderSpec:
    """A vision transformer.

    Parameters
    ----------
    width : int
        Hidden size.
    runs : tuple of LayerRun
        The layers whose output is used, in order.
    unused_runs : tuple of LayerRun
        Layers of the checkpoint behind the one that the language model reads; `transformers` runs them all the same.
    patch_width : int
        Numbers in one patch: channels x frames x height x width.
    patch_bias : bool
        Whether the patch embedding has a bias.
    positions : int
        Learned position embeddings (0: rotary or none).
    class_token : bool
        Whether each item carries a class token through the layers.
    extra_parameters : int
        Norms around the layers and the like.
    """

    width: int
    runs: tuple[LayerRun, ...]
    patch_width: int
    unused_runs: tuple[LayerRun, ...] = ()
    patch_bias: bool = False
    positions: int = 0
    class_token: bool = False
    extra_parameters: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of the encoder, unused layers included."""
        layers = sum(run.parameters for run in self.runs + self.unused_runs)
        embedding = self.width * (self.patch_width + self.patch_bias + self.positions + self.class_token)
        return layers + embedding + self.extra_parameters


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What maps encoder outputs into the language model: a norm over merged patches and a chain of linear layers.

    Parameters
    ----------
    widths : tuple of int
        Widths along the chain, input first; the last is the language model's.
    norm_width : int
        Numbers normalised for one visual token (0: no norm).
    norm_parameters : int
        Parameters of that norm.
    bias : bool
        Whether the linear layers have biases.
    """

    widths: tuple[int, ...]
    norm_width: int = 0
    norm_parameters: int = 0
    bias: bool = True

    @property
    def parameters(self) -> int:
        """Parameters of the adapter."""
        return self.norm_parameters + sum((d_in + self.bias) * d_out for d_in, d_out in pairwise(self.widths))


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only language model."""

    width: int
    vocabulary: int
    runs: tuple[LayerRun, ...]
    norm: Norm = "rms"
    tied_head: bool = False
    max_positions: int = 0

    @property
    def n_layers(self) -> int:
        """Layers in all runs."""
        return sum(run.n_layers for run in self.runs)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding and the head; a tied head counts once."""
        return self.vocabulary * self.width * (1 if self.tied_head else 2)

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers."""
        return sum(run.parameters for run in self.runs)

    @property
    def parameters(self) -> int:
        """Parameters of the language model with embedding, head and final norm."""
        return self.embedding_parameters + self.layer_parameters + norm_parameters(self.norm, self.width)

    def kv_bytes_per_token(self, kv_bits: float = 16) -> float:
        """Return the bytes of keys and values that one token leaves in all layers."""
        return sum(run.n_layers * 2 * run.layer.mixer.kv_width * kv_bits / 8 for run in self.runs)


@dataclass(frozen=True, slots=True)
class MediaCost:
    """What one image or one video is to the model.

    Parameters
    ----------
    patches : int
        Patches that the encoder embeds.
    rows : int
        Rows that go through the encoder's layers: patches and class tokens.
    pairs : int
        Query-key pairs of a layer that attends over the whole item (a tile, or a frame pair).
    window_pairs : int
        Query-key pairs of a layer that attends inside windows.
    visual_tokens, marker_tokens : int
        Embeddings out of the adapter, and the wrapper tokens around them.
    largest_rows : int
        Rows of the largest piece that must be encoded at once.
    resized_pixels : int
        Pixels after resizing, over all frames.
    """

    patches: int
    rows: int
    pairs: int
    window_pairs: int
    visual_tokens: int
    marker_tokens: int
    largest_rows: int
    resized_pixels: int


class MediaRule(Protocol):
    """How a family turns pictures into patches and tokens."""

    def image(self, width: int, height: int) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""

    def frames(self, video: Video) -> int:
        """Return how many frames are taken from a video."""

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames of this size [pixels] are to the model."""

    def unit(self) -> MediaCost:
        """Return the piece that a given number of visual tokens is made of when no size is known."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelSpec:
    """A whole model.

    Parameters
    ----------
    name, family : str
        Name shown to people; the file in `costmodel.families` that read it.
    decoder : DecoderSpec
        The language model.
    vision : VisionEncoderSpec or None
        The vision encoder; None for a language model alone.
    adapter : AdapterSpec or None
        What joins the two.
    media : MediaRule or None
        How pictures become tokens.
    source : str
        Where the configuration came from.
    cache : dict
        Operator tables compiled for this model, by structure; see `costmodel.stages`.
    """

    name: str
    family: str
    decoder: DecoderSpec
    vision: VisionEncoderSpec | None = None
    adapter: AdapterSpec | None = None
    media: MediaRule | None = None
    source: str = ""
    cache: Cache = field(default_factory=dict, repr=False)

    def parameters(self) -> dict[str, int]:
        """Return parameters by component: total, vision, adapter, language, active."""
        return dict(remember(self.cache, "parameters", self._count_parameters))

    def _count_parameters(self) -> dict[str, int]:
        vision = self.vision.parameters if self.vision else 0
        adapter = self.adapter.parameters if self.adapter else 0
        total = vision + adapter + self.decoder.parameters
        return {
            "total": total,
            "vision": vision,
            "adapter": adapter,
            "language": self.decoder.parameters,
            "active": total,
        }
