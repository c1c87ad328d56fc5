"""Prompts as arrays: tokens padded to one length, positions on three axes, and which tokens belong to one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.errors import shown
from runtime.grids import Grid

AXES = 3
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture is in a prompt: its visual tokens, and its grid of merged blocks if positions follow one."""

    tokens: int
    grid: Grid | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts of several sequences, padded behind.

    Parameters
    ----------
    tokens : ndarray of int, shape (batch, longest)
    lengths : ndarray of int, shape (batch,)
    positions : ndarray of int, shape (3, batch, longest)
        In time, row and column.
    blocks : ndarray of int, shape (batch, longest)
        Which picture a token belongs to, counted from 0; -1 for text.
    offsets : ndarray of int, shape (batch,)
        Position of the next token minus the length.
    """

    tokens: Integers
    lengths: Integers
    positions: Integers
    blocks: Integers
    offsets: Integers


def batch_of(
    prompts: Sequence[Sequence[int]], pictures: Sequence[Sequence[Picture]], *, image_token: int, vocabulary: int
) -> Batch:
    """Return prompts as one batch.

    Parameters
    ----------
    prompts : sequence of sequence of int
        Token ids, with as many image tokens as the pictures have.
    pictures : sequence of sequence of Picture
        Of each prompt, in order.
    image_token : int
        Id that stands for a visual token.
    vocabulary : int
        Known ids.

    Raises
    ------
    ValueError
        If a prompt is empty, holds an unknown id, or other numbers of image tokens than its pictures.
    """
    if not prompts or len(prompts) != len(pictures):
        raise ValueError(f"prompts={len(prompts)} must be at least one, with a list of pictures for each")
    longest = max(map(len, prompts))
    shape = (len(prompts), longest)
    tokens, blocks = np.zeros(shape, np.int64), np.full(shape, -1)
    positions = np.zeros((AXES, *shape), np.int64)
    for row, (prompt, some) in enumerate(zip(prompts, pictures, strict=True)):
        ids = np.asarray(prompt, np.int64)
        _check(ids, some, image_token, vocabulary)
        tokens[row, : len(ids)] = ids
        marks, places = _places(ids == image_token, some)
        blocks[row, : len(ids)], positions[:, row, : len(ids)] = marks, places
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = np.array([positions[:, row, :length].max() + 1 for row, length in enumerate(lengths)])
    return Batch(tokens, lengths, positions, blocks, ends - lengths)


def _check(ids: Integers, pictures: Sequence[Picture], image_token: int, vocabulary: int) -> None:
    if not ids.size:
        raise ValueError("prompt=[] must hold at least one token id")
    bad = ids[((ids < 0) | (ids >= vocabulary)) & (ids != image_token)]
    if bad.size:
        raise ValueError(f"token id={shown(int(bad[0]))} must be from 0 to {vocabulary - 1}; use the model's tokenizer")
    held, needed = int((ids == image_token).sum()), sum(picture.tokens for picture in pictures)
    if held != needed:
        raise ValueError(
            f"prompt holds {held} image tokens (id {image_token}), and its pictures make {needed}; repeat the token"
        )


def _places(is_visual: NDArray[np.bool_], pictures: Sequence[Picture]) -> tuple[Integers, Integers]:
    """Return the picture of every token, and its positions.

    Text counts on along all axes. A picture with a grid starts at the next number on each axis and takes as many as
    its longer side has blocks; one without is counted like text.
    """
    blocks = np.full(len(is_visual), -1)
    places = np.zeros((AXES, len(is_visual)), np.int64)
    at, start = 0, 0
    for number, picture in enumerate(pictures):
        first = at + int(np.argmax(is_visual[at:]))
        places[:, at:first] = start + np.arange(first - at)
        start += first - at
        end = first + picture.tokens
        if not is_visual[first:end].all():
            raise ValueError(f"image tokens of picture {number} must stand together; text cuts them apart")
        blocks[first:end] = number
        places[:, first:end] = start + _inside(picture)
        start += max(picture.grid[1:]) if picture.grid else picture.tokens
        at = end
    places[:, at:] = start + np.arange(len(is_visual) - at)
    return blocks, places


def _inside(picture: Picture) -> Integers:
    if picture.grid is None:
        return np.broadcast_to(np.arange(picture.tokens), (AXES, picture.tokens))
    return np.indices(picture.grid).reshape(AXES, -1)
