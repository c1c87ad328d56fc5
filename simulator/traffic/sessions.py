"""Conversations: turns that start like the one before, pictures that come again, video that streams in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodel import Image, Video
from costmodel.base import Array
from simulator.request import NONE, Ints, Items
from simulator.traffic.shapes import Drawn, Generator, exponential_tokens

THINK_S = 10.0
"""Mean time between an answer and the next question; assumed [s]."""


def sliding_window_chat(n: int, rng: Generator, *, turns: int = 8, window: int = 5) -> Drawn:
    """Return chats in which every turn adds a picture and the prompt holds the last ones.

    Up to `window` turns, a prompt starts like the turn before and its answer. Then the first picture falls out, and
    with it everything cached behind the system prompt; the pictures themselves come again.
    """
    turn, session = np.arange(n) % turns, np.arange(n) // turns
    shown = np.minimum(turn + 1, window)
    question, answer, system = exponential_tokens(60, n, rng), exponential_tokens(150, n, rng), 40
    text = system + _running(question, turns, window) + _running(answer, turns, window) - answer
    counts = shown
    offsets = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(n), counts)
    place = np.arange(offsets[-1]) - offsets[owner]
    content = session[owner] * turns + (turn - shown + 1)[owner] + place
    # A picture stands before its question: behind the system prompt and the earlier turns that are shown.
    gone = np.concatenate([[0], np.cumsum(question + answer)])
    first = np.arange(n) - shown + 1
    before = system + gone[first[owner] + place] - gone[first[owner]]
    follows = turn > 0
    extends = follows & (turn < window)
    previous = np.arange(n) - 1
    links = {
        "after": np.where(follows, previous, NONE),
        "parent": np.where(follows, previous, NONE),
        "shared_text_tokens": np.where(extends, text[previous] + answer[previous], system),
        "shared_items": np.where(extends, shown[previous], 0),
    }
    size = (Image(1280, 960),)
    items = Items(offsets, np.zeros(len(owner), dtype=np.int64), content, before, size)
    return Drawn(text, answer, items, links, rng.exponential(THINK_S, n))


def _running(values: Ints, turns: int, window: int) -> Ints:
    """Return, by turn, the sum of a column over the turns that its prompt shows, its own included."""
    total = np.zeros_like(values)
    for back in range(window):
        shifted = np.roll(values, back)
        total += np.where(np.arange(len(values)) % turns >= back, shifted, 0)
    return total


def text_chat(n: int, rng: Generator, *, turns: int = 5, system: int = 800, groups: int = 4) -> Drawn:
    """Return chats of text under a few long system prompts, each turn behind all that was said."""
    turn, session = np.arange(n) % turns, np.arange(n) // turns
    question, answer = exponential_tokens(80, n, rng), exponential_tokens(200, n, rng)
    text = system + _running(question, turns, turns) + _running(answer, turns, turns) - answer
    previous = np.arange(n) - 1
    starter = (session - groups) * turns  # the latest chat under the same system prompt
    follows = turn > 0
    links = {
        "after": np.where(follows, previous, NONE),
        "parent": np.where(follows, previous, np.where(starter >= 0, starter, NONE)),
        "shared_text_tokens": np.where(follows, text[previous] + answer[previous], system),
        "shared_items": np.zeros(n, dtype=np.int64),
    }
    return Drawn(text, answer, None, links, rng.exponential(THINK_S, n))


def streaming_video(n: int, rng: Generator, *, pieces: int = 12, seconds: float = 4.0) -> Drawn:
    """Return streams that send a piece of video every few seconds and ask about all that was seen so far.

    A piece comes when the answer before it has ended and its own seconds have passed.
    """
    place = np.arange(n) % pieces
    question, answer = np.full(n, 12), np.full(n, 20)
    counts = place + 1
    text = 30 + counts * question + place * answer
    offsets = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(n), counts)
    index = np.arange(offsets[-1]) - offsets[owner]
    follows, previous = place > 0, np.arange(n) - 1
    links = {
        "after": np.where(follows, previous, NONE),
        "parent": np.where(follows, previous, NONE),
        "shared_text_tokens": np.where(follows, text[previous] + answer[previous], 0),
        "shared_items": np.where(follows, counts[previous], 0),
    }
    del rng
    clip = Video(width=640, height=360, seconds=seconds, fps=24.0, frames=8)
    content = (np.arange(n) // pieces * pieces)[owner] + index
    before = 30 + index * (question[0] + answer[0])
    items = Items(offsets, np.zeros(len(owner), dtype=np.int64), content, before, (clip,))
    return Drawn(text, answer, items, links, np.full(n, seconds))


def turns_of(
    session: Sequence[str], begin_s: Array, end_s: Array, text: Ints, output: Ints
) -> tuple[Array, dict[str, Ints]]:
    """Return the arrivals [s] and links of measured requests, those of one session being turns of a conversation.

    Parameters
    ----------
    session : sequence of str
        By request, what it belongs to; empty where it stands alone.
    begin_s, end_s : ndarray
        When it was sent, not decreasing, and when its answer had ended [s].
    text, output : ndarray of int
        Tokens.

    Notes
    -----
    A turn follows on the one before if that had ended, and then comes as long after it as it did. Its prompt holds the
    earlier turns if it is long enough to; nothing in such a trace says so.
    """
    n = len(session)
    arrival_s, after, shared = begin_s.copy(), np.full(n, NONE), np.zeros(n, dtype=np.int64)
    parent = np.full(n, NONE)
    last: dict[str, int] = {}
    for index, name in enumerate(session):
        before = last.get(name, NONE) if name else NONE
        last[name] = index
        if before == NONE or end_s[before] > begin_s[index]:
            continue
        after[index], arrival_s[index] = before, begin_s[index] - end_s[before]
        said = int(text[before] + output[before])
        if text[index] >= said:
            parent[index], shared[index] = before, said
    return arrival_s, {"after": after, "parent": parent, "shared_text_tokens": shared}
