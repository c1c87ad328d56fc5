"""How a model is put on devices: widths of numbers, and how many devices share it."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.errors import Unsupported
from costmodel.layers import MoeSpec
from costmodel.models import ModelSpec

MAX_DEGREE = 1024
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
    tp, pp, dp : int
        Tensor, pipeline and data parallelism of the language model; they multiply to the devices in use.
    ep : int
        Devices over which routed experts are dealt out, tensor-parallel ones first, then replicas.
    encoder_tp : int or None
        Tensor parallelism of vision encoder and adapter; None is that of the language model.
    encoder_dp : int
        Copies of the encoder among a replica's devices, each encoding whole items, the longest dealt out first.
    expert_imbalance : float
        Load of the busiest expert-parallel device over the mean.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    encoder_tp: int | None = None
    encoder_dp: int = 1
    expert_imbalance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no cluster has."""
        for name in ("tp", "pp", "dp", "ep", "encoder_tp", "encoder_dp"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not 1 <= value <= MAX_DEGREE or value != int(value)):
                raise ValueError(f"Parallelism.{name}={value!r} must be a whole number from 1 to {MAX_DEGREE}")
        if not 1 <= self.expert_imbalance <= MAX_DEGREE:
            raise ValueError(f"Parallelism.expert_imbalance={self.expert_imbalance!r} must be 1 (even) or more")
        if self.ep not in (1, self.tp, self.tp * self.dp):
            raise ValueError(f"Parallelism.ep={self.ep} must be 1, tp={self.tp} or tp x dp={self.tp * self.dp}")
        if self.encoder * self.encoder_dp > self.tp * self.pp:
            used = f"encoder_tp x encoder_dp={self.encoder * self.encoder_dp}"
            raise ValueError(f"Parallelism.{used} must not exceed tp x pp={self.tp * self.pp}, a replica's devices")

    @property
    def encoder(self) -> int:
        """Devices that share one copy of the vision encoder."""
        if self.encoder_tp is not None:
            return self.encoder_tp
        return self.tp if self.encoder_dp == 1 else 1

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.tp * self.pp * self.dp

    def busy(self, stage: str) -> int:
        """Return the devices that work at the same time in a stage of the request: one stage of each pipeline."""
        if stage in ("encode", "adapt"):
            return self.encoder * self.encoder_dp * self.dp
        return 0 if stage == "preprocess" else self.tp * self.dp

    @property
    def expert_replicas(self) -> int:
        """Data-parallel replicas that share one set of experts."""
        return max(1, self.ep // self.tp)


def check_parallelism(model: ModelSpec, parallelism: Parallelism) -> None:
    """Refuse degrees that do not divide the heads, layers or experts of a model, as engines do.

    Raises
    ------
    ValueError
        If one does not, naming those that do.
    """
    vision = model.vision.runs if model.vision else ()
    towers = (("tp", parallelism.tp, model.decoder.runs), ("encoder_tp", parallelism.encoder, vision))
    for name, degree, runs in towers:
        for heads in {run.layer.mixer.heads for run in runs} if degree > 1 else ():
            _check_divides(name, degree, heads, f"heads of {model.name}")
    if parallelism.pp > model.decoder.n_layers:
        raise ValueError(f"pp={parallelism.pp} exceeds the {model.decoder.n_layers} layers of {model.name}; use fewer")
    experts = {run.layer.ffn.experts for run in model.decoder.runs if isinstance(run.layer.ffn, MoeSpec)}
    if parallelism.ep > 1 and not experts:
        raise ValueError(f"ep={parallelism.ep} needs routed experts, and {model.name} has none; leave ep out")
    for n_experts in experts:
        _check_divides("ep", parallelism.ep, n_experts, f"experts of {model.name}")


def _check_divides(name: str, degree: int, whole: int, what: str) -> None:
    if whole % degree:
        able = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise ValueError(f"{name}={degree} does not divide the {whole} {what}; use one of {able}")
