"""Techniques for real: the primitives of `costmodel.techniques`, run on the reference model.

Each file runs one primitive and takes its dataclass as parameters, so that `technique("fastv")` sets both what is
priced and what is run. What does not run is refused in one line. PyTorch is imported by the files, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from costmodel.techniques import Technique

if TYPE_CHECKING:
    from runtime.generate import Prompt
    from runtime.model import Lvlm
    from runtime.techniques.session import Session

__all__ = ["open_session"]


def open_session(
    model: Lvlm, prompt: Prompt, techniques: Sequence[Technique] = (), *, draft: Lvlm | None = None, seed: int = 0
) -> Session:
    """Return a prompt under techniques, prefilled: see `runtime.techniques.session.Session`.

    Parameters
    ----------
    model : Lvlm
    prompt : Prompt
        One request.
    techniques : sequence of Technique
        As `costmodel.techniques.technique` makes them, in any order.
    draft : Lvlm, optional
        The model that proposes tokens, where a technique speculates with one.
    seed : int
        Of relaxed verification.

    Raises
    ------
    ValueError
        If techniques exclude each other.
    Unsupported
        If one of them, or a setting of it, does not run here.
    """
    from runtime.techniques.session import Session

    return Session.start(model, prompt, techniques, draft=draft, seed=seed)
