"""How a model is put on devices: widths of numbers, and how many devices share it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from costmodel.errors import Unsupported
from costmodel.models import ModelSpec

BITS = (1, 2, 3, 4, 6, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Precision:
    """Widths of numbers.

    Parameters
    ----------
    weight_bits : int
        Of the linear layers of the language model; below 16 the vision tower, the adapter, the embedding and the
        head stay at 16, as in published checkpoints.
    activation_bits : int
        Of the inputs of those matrix products, and so of the matrix unit used.
    kv_bits : int
        Of cached keys and values.
    """

    weight_bits: int = 16
    activation_bits: int = 16
    kv_bits: int = 16

    def __post_init__(self) -> None:
        """Refuse widths that nobody stores."""
        for name in ("weight_bits", "activation_bits", "kv_bits"):
            value = getattr(self, name)
            if value not in BITS:
                raise ValueError(f"Precision.{name}={value!r} must be one of {', '.join(map(str, BITS))}")
        if self.activation_bits < self.weight_bits and self.activation_bits != 16:  # noqa: PLR2004
            bits = f"Precision.activation_bits={self.activation_bits} below weight_bits={self.weight_bits}"
            raise Unsupported(f"{bits} is not modelled; use activation_bits={self.weight_bits} or more")


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How many devices share a model, by stage.

    Parameters
    ----------
    tp : int
        Tensor parallelism of the language model.
    encoder_tp : int or None
        Tensor parallelism of vision encoder and adapter; None is that of the language model.
    """

    tp: int = 1
    encoder_tp: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no cluster has."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or value != int(value) or not 1 <= value <= 1024):  # noqa: PLR2004
                raise ValueError(f"Parallelism.{field.name}={value!r} must be a whole number from 1 to 1024")
        if self.encoder_tp is not None and self.encoder_tp > self.tp:
            raise ValueError(
                f"Parallelism.encoder_tp={self.encoder_tp} must not exceed tp={self.tp}, the devices there are"
            )

    @property
    def encoder(self) -> int:
        """Devices that share the vision encoder."""
        return self.encoder_tp or self.tp


def check_parallelism(model: ModelSpec, parallelism: Parallelism) -> None:
    """Refuse degrees that do not divide the heads of a tower, as engines do.

    Raises
    ------
    ValueError
        If one does not, naming those that do.
    """
    vision = model.vision.runs if model.vision else ()
    towers = (("tp", parallelism.tp, model.decoder.runs), ("encoder_tp", parallelism.encoder, vision))
    for name, degree, runs in towers:
        if degree == 1:
            continue
        for run in runs:
            heads = run.layer.mixer.heads
            if heads % degree:
                able = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
                raise ValueError(
                    f"{name}={degree} does not divide the {heads} heads of {model.name}; use one of {able}"
                )
