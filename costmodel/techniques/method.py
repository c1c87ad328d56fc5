"""A published method as a file: its paper, the primitives that it uses, its defaults, and what was published of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, ValidationError, model_validator

from costmodel.base import Frozen, FrozenMap
from costmodel.errors import one_line
from costmodel.packaged import packaged_texts

NOT_FOUND: Final = "not found"
"""What a file says where its sources say nothing; a number is never guessed instead."""
SOURCE_LETTERS: Final[Mapping[str, str]] = {
    "SV": "the survey, arXiv:2604.05546",
    "R": "the README of the official repository",
    "C": "the code of the official repository",
    "F": "a figure or table image of the official repository",
    "P": "the paper",
    "H": "the abstract on arXiv",
    "N": "notes of others with numbers",
    "X": "a comparison in another paper",
    "K": "prior knowledge, not looked up",
}
"""Letters that the sources of methods begin with."""
CONFIDENCE: Final[Mapping[str, str]] = {
    "A": "a primary source was read",
    "B": "abstract, or notes of others with numbers",
    "C": "abstract alone, or a part",
    "D": "mentioned by the survey",
}

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | tuple[Scalar, ...] | tuple[tuple[Scalar, ...], ...]
Settings: TypeAlias = FrozenMap[Value]
Stage = Literal["encoding", "prefilling", "decoding", "frontier", "system"]
Trait = Literal["keeps_vit_attention", "streams", "evicts_each_step"]
Need = Literal["vit_attention", "whole_video", "query", "class_token"]
NoSettings: TypeAlias = Annotated[Settings, Field(default_factory=dict, validate_default=True)]


class Paper(Frozen):
    """The paper of a method.

    Parameters
    ----------
    title : str
        As its authors or the survey's list of papers have it.
    arxiv : str
        Identifiers on arXiv, or where else it appeared.
    """

    title: str
    arxiv: str


class Stated(Frozen):
    """What is known of a method in words, as it was noted when its sources were read.

    Parameters
    ----------
    where, primitive, parameters, defaults, overheads, composes, quality, published : str
        Where it acts, its kind and parameters, its defaults, what it costs itself, what it goes together with, and the
        quality and efficiency that were published.
    effects : mapping
        What it does to vision FLOPs, tokens, cache and output, where it changes them.
    """

    where: str
    primitive: str
    parameters: str
    defaults: str
    overheads: str
    composes: str
    quality: str
    published: str
    effects: Annotated[FrozenMap[str], Field(default_factory=dict, validate_default=True)]


class Use(Frozen):
    """A primitive with the values that a method gives to its fields.

    Parameters
    ----------
    kind : str
        File of the primitive.
    prefix : str
        What the names of its fields begin with when the method is asked for, so that two primitives do not clash.
    parameters : mapping
        Fields with values.
    note : str
        What was assumed.
    """

    kind: str
    prefix: str = ""
    parameters: NoSettings
    note: str = ""


class Efficiency(Frozen):
    """One published measurement.

    Parameters
    ----------
    metric, unit, model, hardware, setting : str
        What was measured, where, and how.
    baseline, value : float or None
        Without and with the method; None where it was not printed.
    source : str
        Where it was read.
    rank : int
        Its row in the project's list of measurements.
    """

    metric: str
    unit: str
    model: str
    hardware: str
    setting: str
    baseline: float | None = None
    value: float | None = None
    source: str
    rank: int


class QualityPoint(Frozen):
    """Published quality at one setting.

    Parameters
    ----------
    benchmark, model : str
        What was scored, and which model answered.
    at : mapping
        Arguments of the method; those that are not named have their defaults.
    baseline, value : float or None
        Scores without and with the method.
    kept : float or None
        Share of the score that is kept, where the scores themselves were not printed.
    everywhere : bool
        Whether it holds at any arguments: what is lossless by construction.
    source : str
        Where it was read.
    """

    benchmark: str
    model: str
    at: NoSettings
    baseline: Annotated[float, Field(gt=0)] | None = None
    value: Annotated[float, Field(ge=0)] | None = None
    kept: Annotated[float, Field(ge=0)] | None = None
    everywhere: bool = False
    source: str

    @model_validator(mode="after")
    def _check(self) -> QualityPoint:
        if (self.kept is None) == (self.baseline is None or self.value is None):
            raise ValueError("quality needs baseline and value, or kept alone; give one of the two")
        return self

    @property
    def retention(self) -> float:
        """Share of the score that is kept."""
        if self.kept is not None:
            return self.kept
        assert self.baseline is not None  # noqa: S101 - checked when it was read
        assert self.value is not None  # noqa: S101
        return self.value / self.baseline


class MethodFile(Frozen):
    """A published method.

    Parameters
    ----------
    name : str
        As its paper has it.
    aliases : tuple of str
        Other names; case, blanks and signs do not matter.
    stage, category, confidence : str
        Where the survey puts it, and how well it is known: a key of `CONFIDENCE`.
    source : str
        Where it was read; letters are those of `SOURCE_LETTERS`.
    taxonomy : tuple of str
        Where the survey's figure has it: stage, group and kind, parted by /; none for what it does not show.
    needs, traits : tuple of str
        What it needs from model or request beyond what its primitives say, and what decides whom it goes together with.
    knob : str
        The argument by which published quality is interpolated; "" where it is not.
    required : tuple of str
        Arguments without a published value, that must be given: alternatives of one are parted by |.
    instead : str
        What answers the question where no rewrite of a request does: for systems and workloads.
    serving : tuple of str
        Serving systems of the simulator that a system-level entry names.
    paper, stated, settings, primitives, variants, efficiency, quality
        See their classes; `settings` are the published defaults as numbers, `variants` are other published settings by
        name, as arguments.
    """

    schema_version: Literal[1]
    name: str
    aliases: tuple[str, ...] = ()
    stage: tuple[Stage, ...]
    category: str
    confidence: Literal["A", "B", "C", "D"]
    source: str
    taxonomy: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    traits: tuple[Trait, ...] = ()
    required: tuple[str, ...] = ()
    knob: str = ""
    instead: str = ""
    serving: tuple[str, ...] = ()
    paper: Paper
    stated: Stated
    settings: NoSettings
    primitives: tuple[Use, ...] = ()
    variants: Annotated[FrozenMap[Settings], Field(default_factory=dict, validate_default=True)]
    efficiency: tuple[Efficiency, ...] = ()
    quality: tuple[QualityPoint, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> MethodFile:
        if bool(self.primitives) == bool(self.instead):
            raise ValueError("a method has primitives, or says what answers instead; give one of the two")
        return self


@functools.cache
def load_method_texts() -> Mapping[str, str]:
    """Return the text of every method file by id."""
    return packaged_texts(__name__.rpartition(".")[0], "catalogue", suffix=".toml")


@functools.cache
def load_method(identity: str) -> MethodFile:
    """Return a method by its id, which `load_method_texts` has.

    Raises
    ------
    ValueError
        If its file is broken.
    """
    import tomllib  # needed for files alone

    try:
        values: dict[str, Any] = tomllib.loads(load_method_texts()[identity])
        return MethodFile.model_validate(values)
    except ValidationError as error:
        raise one_line(error, f"technique {identity}") from None


@functools.cache
def load_ids_by_name() -> Mapping[str, str]:
    """Return the id of every method by each of its names, in small letters and digits."""
    return {
        plain(name): identity
        for identity in load_method_texts()
        for name in (identity, load_method(identity).name, *load_method(identity).aliases)
    }


def plain(name: str) -> str:
    """Return a name in small letters and digits: LOOK-M as lookm."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())
