"""Options that commands share, as they are typed: `studies.request` turns them into a model and a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from cyclopts import Group, Parameter, Token

MOST: Final = 1e9
"""Largest number that any option takes."""


def whole(kind: Any, tokens: Sequence[Token]) -> int:  # noqa: ANN401 - cyclopts passes any type
    """Return a typed number that must be whole and positive; cyclopts by itself rounds."""
    del kind
    text = tokens[0].value
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (number.is_integer() and 1 <= number <= MOST):
        raise ValueError(f"{text!r} must be a whole number from 1 to {MOST:.0f}.")
    return int(number)


Whole: TypeAlias = Annotated[int, Parameter(converter=whole)]
Flag: TypeAlias = Annotated[bool, Parameter(show_default=False)]
Texts: TypeAlias = Annotated[tuple[str, ...], Parameter(show_default=False, allow_leading_hyphen=True)]

REQUEST: Final = Group("Request", sort_key=1)
SERVING: Final = Group("Serving", sort_key=2)
OUTPUT: Final = Group("Output", sort_key=3)


@Parameter(name="*", group=REQUEST)
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a request brings.

    Parameters
    ----------
    image : tuple of str
        An image: its size, such as 1920x1080 or 1920x1080:png, or a path. Repeat for several.
    video : tuple of str
        A video: size, length and rate, such as 1280x720:5s@24fps, or a path. Repeat for several.
    frames : int
        Frames of every video that the model is given.
    fps : float
        Frames a second of every video that the model is given.
    pixels : str
        Smallest and largest area to which pictures are resized, MIN:MAX in pixels.
    text : int
        Text tokens of the prompt, chat template included.
    """

    image: Texts = ()
    video: Texts = ()
    frames: Whole | None = None
    fps: float | None = None
    pixels: str | None = None
    text: Whole = 64


@Parameter(name="*", group=SERVING)
@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How requests are served.

    Parameters
    ----------
    output : int
        Tokens to generate.
    batch : int
        Requests that run together.
    tp : int
        Devices that share the language model (tensor parallelism).
    pp : int
        Stages into which the layers are cut (pipeline parallelism).
    dp : int
        Replicas that share the batch (data parallelism).
    ep : int
        Devices over which experts are dealt out: tp, or tp x dp.
    encoder_tp : int
        Devices that share the vision encoder; as many as the language model by default.
    encoder_dp : int
        Copies of the vision encoder that share the pictures, whole ones each.
    weight_bits : int
        Width of the language model's weights.
    activation_bits : int
        Width of the inputs of its matrix products.
    kv_bits : int
        Width of cached keys and values.
    engine : str
        What the software adds; see lvlm engines.
    technique : tuple of str
        A method that saves work, NAME or NAME:key=value,... Repeat for several.
    """

    output: Whole = 128
    batch: Whole = 1
    tp: Whole = 1
    pp: Whole = 1
    dp: Whole = 1
    ep: Whole = 1
    encoder_tp: Whole | None = None
    encoder_dp: Whole = 1
    weight_bits: Whole = 16
    activation_bits: Whole = 16
    kv_bits: Whole = 16
    engine: str = "fused"
    technique: Texts = ()


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the answer is printed.

    Parameters
    ----------
    json : bool
        Print one JSON object, in SI units.
    csv : bool
        Print rows of comma-separated values, in SI units.
    """

    json: Flag = False
    csv: Flag = False

    def __post_init__(self) -> None:
        """Refuse both at once."""
        if self.json and self.csv:
            raise ValueError("--json and --csv exclude each other; give one of them")


TEXT_PROMPT: Final = Prompt()
ONE_DEVICE: Final = Serving()
FOR_PEOPLE: Final = Format()
"""What is taken when no option of a group is given."""
