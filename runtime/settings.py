"""What a computation needs beyond sizes: activations, epsilons, rotations, scales.

`ModelSpec` holds what a model costs, and this what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from costmodel.models import ModelSpec
from runtime.rotations import Rotation

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"]
ACTIVATIONS: Final = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")
QkNorm = Literal["none", "head", "width"]
"""Norms over queries and keys: none, over every head, or over all heads together."""


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """How the language model computes.

    Parameters
    ----------
    activation : str
        Of the feed-forward blocks.
    norm_eps : float
        Added under the root of every norm.
    rotation : Rotation
        Of queries and keys.
    sliding_rotation : Rotation
        The same in layers with a window.
    norm_offset : float
        Added to the gains of norms.
    qk_norm : {"none", "head", "width"}
    query_scale : float or None
        Factor of the scores; None is one over the root of the head's width.
    embedding_scale : float
        Factor of text embeddings.
    normalises_experts : bool
        Whether the weights of a token's experts are made to sum to one.
    """

    activation: Activation
    norm_eps: float
    rotation: Rotation
    sliding_rotation: Rotation
    norm_offset: float = 0.0
    qk_norm: QkNorm = "none"
    query_scale: float | None = None
    embedding_scale: float = 1.0
    normalises_experts: bool = True


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """How the vision encoder computes.

    Parameters
    ----------
    activation, norm_eps, qk_norm
        As in `DecoderSettings`.
    positions : {"none", "learned", "interpolated"}
        Learned positions as they are, or a square of them stretched over each picture.
    axial_theta : float
        Base of the rotation by row and column; 0 is no rotation.
    pre_norm, post_norm : bool
        Norms before the first layer and behind the last one.
    layer_scale : bool
        Whether the output of each half of a layer has gains.
    drops_class_token : bool
        Whether the adapter does not see the class token.
    deep_layers : tuple of int
        Layers whose output is adapted too, besides the last (DeepStack).
    """

    activation: Activation
    norm_eps: float
    qk_norm: QkNorm = "none"
    positions: Literal["none", "learned", "interpolated"] = "learned"
    axial_theta: float = 0.0
    pre_norm: bool = False
    post_norm: bool = False
    layer_scale: bool = False
    drops_class_token: bool = False
    deep_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """How encoder outputs become embeddings.

    Parameters
    ----------
    kind : {"projector", "merger", "pool"}
        Two matrices (behind a pixel shuffle where `merge` says so), patches that lie side by side in a row of
        memory merged, or groups of patches averaged.
    activation : str
    norm_eps : float
    merge : int
        Patches along a side that become one token.
    norm : {"none", "rms", "layer"}
        Of its input.
    """

    kind: Literal["projector", "merger", "pool"]
    activation: Activation
    norm_eps: float
    merge: int = 1
    norm: Literal["none", "rms", "layer"] = "none"


@dataclass(frozen=True, slots=True)
class PictureSettings:
    """How pictures become numbers.

    Parameters
    ----------
    mean, std : tuple of float
        Of the three channels, pixels being shares of one.
    resampling : {"bicubic", "bilinear"}
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resampling: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a model computes by, beside its sizes."""

    image_token: int
    decoder: DecoderSettings
    vision: VisionSettings
    adapter: AdapterSettings
    pictures: PictureSettings
    tile: int = 0
    """Patches along the side of a tile; 0 where pictures keep their own grid."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model as it is built: sizes, settings, and the folder of its weights if it has one."""

    spec: ModelSpec
    settings: Settings
    folder: Path | None = None
