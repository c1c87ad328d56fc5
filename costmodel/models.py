"""What a model is: its towers as runs of equal layers, its adapter, and how its family turns pictures into tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from costmodel.adapters import AdapterSpec
from costmodel.layers import CrossAttentionSpec, LayerRun, LayerSpec, MoeSpec, Norm, norm_parameters
from costmodel.memo import Cache, remember
from costmodel.recurrent import STATE_BITS, RecurrentSpec
from costmodel.traces import TracedFfnSpec
from costmodel.workload import Video


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
        Norms around the layers, heads that are not run, and the like.
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
class DecoderSpec:
    """A decoder-only language model.

    Parameters
    ----------
    width, vocabulary : int
        Hidden size, and tokens of the head.
    runs : tuple of LayerRun
        Its layers, in order.
    norm : {"rms", "layer", "layer_no_bias"}
        Kind of the last norm.
    tied_head : bool
        Whether the head is the embedding.
    max_positions : int
        Positions that the config names; 0 is unknown.
    extra_parameters : int
        Learned positions, additional embedding rows and the like.
    bidirectional_media : bool
        Whether the tokens of one picture see each other in both directions.
    """

    width: int
    vocabulary: int
    runs: tuple[LayerRun, ...]
    norm: Norm = "rms"
    tied_head: bool = False
    max_positions: int = 0
    extra_parameters: int = 0
    bidirectional_media: bool = False

    @property
    def n_layers(self) -> int:
        """Layers in all runs."""
        return sum(run.n_layers for run in self.runs)

    @property
    def layer_parameters(self) -> int:
        """Parameters of all layers."""
        return sum(run.parameters for run in self.runs)

    @property
    def end_parameters(self) -> int:
        """Parameters of embedding, head (a tied one counts once), last norm and the like."""
        embedding = self.vocabulary * self.width * (1 if self.tied_head else 2)
        return embedding + norm_parameters(self.norm, self.width) + self.extra_parameters

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.layer_parameters + self.end_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return sum(run.active_parameters for run in self.runs) + self.end_parameters

    def kv_bytes_per_token(self, kv_bits: float = 16) -> float:
        """Return the bytes that one token leaves in the caches of all layers in a short context [bytes]."""
        runs = [run for run in self.runs if not isinstance(run.layer.mixer, CrossAttentionSpec)]
        return sum(run.n_layers * run.layer.mixer.cached_width * kv_bits / 8 for run in runs)

    def cross_kv_bytes_per_token(self, kv_bits: float = 16) -> float:
        """Return the bytes that one encoder output leaves in the caches of cross-attention [bytes]."""
        runs = [run for run in self.runs if isinstance(run.layer.mixer, CrossAttentionSpec)]
        return sum(run.n_layers * run.layer.mixer.cached_width * kv_bits / 8 for run in runs)

    @property
    def state_bytes(self) -> float:
        """Bytes that a sequence of any length keeps in the states of all recurrences [bytes]."""
        runs = [(run.n_layers, run.layer.mixer) for run in self.runs]
        return sum(n * mixer.state_width * STATE_BITS / 8 for n, mixer in runs if isinstance(mixer, RecurrentSpec))

    def layers(self) -> list[LayerSpec]:
        """Return every layer, in order."""
        return [run.layer for run in self.runs for _ in range(run.n_layers)]


@dataclass(frozen=True, slots=True)
class MediaCost:
    """What one image or one video is to the model.

    Parameters
    ----------
    patches : int
        Patches that the encoder embeds.
    rows : int
        Rows that go through the encoder's layers: patches, class tokens, padding.
    pairs : int
        Query-key pairs of a layer that attends over the whole item (a tile, or a frame pair).
    window_pairs : int
        Query-key pairs of a layer that attends inside windows.
    visual_tokens, marker_tokens : int
        Embeddings out of the adapter that enter the language model, and the wrapper tokens around them.
    largest_rows : int
        Rows of the largest piece that must be encoded at once.
    resized_pixels : int
        Pixels after resizing, over all frames and tiles.
    cross_tokens : int
        Encoder outputs that only cross-attention sees.
    block_pairs : int
        Query-key pairs beyond the causal ones when its tokens see each other in both directions: n (n - 1) / 2 a block.
    adapter_tokens : int or None
        Tokens that the adapter makes, where some are dropped, pooled or added behind it; None: the visual tokens.
    executed : MediaCost or None
        What `transformers` runs where that is more than an engine needs: padded tiles and the like.
    frames, frame_pixels : int
        Of a video, where whoever asked says so: frames that the model is given, and their pixels in the file.
    """

    patches: int
    rows: int
    pairs: int
    window_pairs: int
    visual_tokens: int
    marker_tokens: int
    largest_rows: int
    resized_pixels: int
    cross_tokens: int = 0
    block_pairs: int = 0
    adapter_tokens: int | None = None
    executed: MediaCost | None = None
    frames: int = 0
    frame_pixels: int = 0


class MediaRule(Protocol):
    """How a family turns pictures into patches and tokens."""

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model, one of so many in the request."""

    def frames(self, video: Video) -> int:
        """Return how many frames are taken from a video."""

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Return what this many frames of this size [pixels] are to the model."""

    def unit(self) -> MediaCost:
        """Return the piece that a given number of visual tokens is made of when no size is known.

        Its `pairs` are 0 where the encoder attends over the whole picture: then they are the square of all rows.
        """


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
    other_parameters : int
        Parameters of parts that are loaded but never priced, such as an audio tower.
    notes : tuple of str
        What is not known of it, for people to read beside every prediction.
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
    notes: tuple[str, ...] = ()
    other_parameters: int = 0
    cache: Cache = field(default_factory=dict, repr=False)

    def parameters(self) -> dict[str, int]:
        """Return parameters by component: total, vision, adapter, language, active (what one token uses)."""
        return dict(remember(self.cache, "parameters", self._count_parameters))

    @property
    def routing(self) -> tuple[int, int] | None:
        """Routed experts of a layer and those that one token uses; None without any."""
        return remember(self.cache, "routing", self._routing)[0]

    def _routing(self) -> tuple[tuple[int, int] | None]:
        for run in self.decoder.runs:
            ffn = run.layer.ffn
            if isinstance(ffn, MoeSpec):
                return ((ffn.experts, ffn.top_k),)
            grouped = [p for p in ffn.products if p.experts] if isinstance(ffn, TracedFfnSpec) else []
            if grouped:
                return ((grouped[0].experts, round(grouped[0].rows_ratio)),)
        return (None,)

    def _count_parameters(self) -> dict[str, int]:
        vision = self.vision.parameters if self.vision else 0
        adapter = self.adapter.parameters if self.adapter else 0
        language = self.decoder.parameters
        total = vision + adapter + language + self.other_parameters
        active = total - language + self.decoder.active_parameters
        return {"total": total, "vision": vision, "adapter": adapter, "language": language, "active": active}
