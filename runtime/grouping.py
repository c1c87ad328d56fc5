"""Which kernels devices share: rows of one kind, kernel family and library, with the sides of the split drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from costmodel.efficiency.transfer import link_class
from costmodel.hardware import HardwareProfile
from runtime.calibrate import FEWEST_TRAIN, MOST_TEST, MOST_TRAIN, IsTest, drawn, families_of
from runtime.recipes import recipe_of
from runtime.tables import Samples

ROWS_A_DEVICE: Final = 600
"""Train rows that each of several devices gives, so that none outweighs the others."""
SAME_KERNELS: Final[Mapping[tuple[str, str], str]] = {("vllm", "flash"): "fa2"}
"""A kernel whose table gives no version: vLLM 0.14 runs FlashAttention-2 on Ampere."""
OWN_KERNELS: Final = frozenset({("vllm", "hopper", "cutlass"), ("sglang", "hopper", "cutlass")})
"""FlashInfer's CUTLASS experts on Hopper are another kernel: against the datasheet they take three to four times as
long as on Blackwell, at all sizes. TensorRT-LLM's do not differ so."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One device of a group.

    Parameters
    ----------
    hardware : HardwareProfile
        Its datasheet.
    samples, train, test : Samples
        Its rows, and those drawn of each side of the split.
    families : int
        Families in the train rows.
    """

    hardware: HardwareProfile
    samples: Samples
    train: Samples
    test: Samples
    families: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Devices that share one kind of kernel.

    Parameters
    ----------
    library, kind, variant : str
        What is shared.
    members : tuple of Member
        Who shares it.
    """

    library: str
    kind: str
    variant: str
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """Library, kind and variant."""
        return f"{self.library} {self.kind}.{self.variant}"

    def without(self, device: str) -> Group:
        """Return the group of the other devices."""
        return replace(self, members=tuple(member for member in self.members if member.hardware.name != device))


def groups(measured: Iterable[tuple[HardwareProfile, Sequence[Samples]]], *, is_test: IsTest, seed: int) -> list[Group]:
    """Return the kernels that devices share, all-reduces of NCCL before those that need them.

    Parameters
    ----------
    measured : iterable of pair
        Devices and their rows.
    is_test : callable
        The split.
    seed : int
        Of the rows that are drawn.
    """
    found: dict[tuple[str, str, str], list[tuple[HardwareProfile, Samples]]] = {}
    for hardware, tables in measured:
        for samples in tables:
            key = samples.library, samples.kind, family(samples, hardware)
            found.setdefault(key, []).append((hardware, samples))
    made = []
    for (library, kind, variant), pairs in found.items():
        most = ROWS_A_DEVICE if len(pairs) > 1 else MOST_TRAIN
        members = [_member(hardware, samples, is_test, most, seed) for hardware, samples in pairs]
        kept = tuple(member for member in members if len(member.train.measured_s) >= FEWEST_TRAIN)
        if kept:
            made.append(Group(library, kind, variant, kept))
    return sorted(made, key=lambda group: (group.kind, group.library != "nccl", group.library, group.variant))


def family(samples: Samples, hardware: HardwareProfile) -> str:
    """Return the name that the kernels of samples have among devices: by kernel, and of collectives by link."""
    if samples.kind == "collective":
        return f"{samples.variant}.{link_class(hardware, int(samples.work['ranks'].max()))}"
    head, dot, kernel = samples.variant.rpartition(".")
    if samples.kind.endswith("attention"):
        kernel = SAME_KERNELS.get((samples.library, kernel), kernel)
    if (samples.library, hardware.generation, kernel) in OWN_KERNELS:
        kernel = f"{kernel}_{hardware.generation}"
    return f"{head}{dot}{kernel}"


def _member(hardware: HardwareProfile, samples: Samples, is_test: IsTest, most: int, seed: int) -> Member:
    families, verdicts = families_of(samples, recipe_of(samples, {}), is_test)
    held_out = verdicts[families]
    train, test = drawn(samples, ~held_out, most, seed), drawn(samples, held_out, MOST_TEST, seed)
    return Member(hardware, samples, samples.take(train), samples.take(test), len(np.unique(families[train])))
