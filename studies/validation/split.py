"""The fixed split of measured rows into train and test, by shape family.

A family is what neighbours share: (n, k) of a product, (heads, kv_heads, head_dim) of an attention, (ranks, algorithm)
of a collective, (experts, top_k, hidden, inter) of a mixture of experts, (operator, width) of an element-wise one. All
rows of a family lie on one side, for every device, library and precision, so that no neighbour of a test row is fitted.
The rule is pure and was fixed before any fit; `split.json` states it for other programs.

Collectives have three families an algorithm (2, 4 and 8 ranks), so a hash may leave nothing to fit or to test. The
salt is the first whole number for which every algorithm has one test and two train families, and both all-reduces hold
out 4 ranks, so that the fit sees both ends of the range. No measured time was looked at.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

SALT: Final = 468
PER_MILLE: Final = 1000
TEST_PER_MILLE: Final = 300
COLUMNS: Final = {
    "gemm": ("n", "k"),
    "attention": ("heads", "kv_heads", "head_dim"),
    "collective": ("ranks", "algorithm"),
    "moe": ("experts", "top_k", "hidden", "inter"),
    "elementwise": ("operator", "width"),
}
"""The columns that make a family, by group of operators."""


def is_test(group: str, family: Sequence[int | str]) -> bool:
    """Return whether a family is held out.

    Parameters
    ----------
    group : str
        A key of `COLUMNS`.
    family : sequence of int or str
        Its values in the order of `COLUMNS`.

    Raises
    ------
    ValueError
        If the family has not the columns of its group.
    """
    if len(family) != len(COLUMNS[group]):
        raise ValueError(f"family {tuple(family)} of {group} must give {', '.join(COLUMNS[group])}")
    text = f"{SALT}:{group}:" + ",".join(str(value) for value in family)
    return zlib.crc32(text.encode()) % PER_MILLE < TEST_PER_MILLE


def rule() -> dict[str, object]:
    """Return the rule as `split.json` states it."""
    return {
        "hash": "crc32 of '<salt>:<group>:<values joined by commas>' in UTF-8, modulo 1000",
        "salt": SALT,
        "test_if_below": TEST_PER_MILLE,
        "families": {group: list(columns) for group, columns in COLUMNS.items()},
    }


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(json.dumps(rule(), indent=1) + "\n", encoding="utf-8")
