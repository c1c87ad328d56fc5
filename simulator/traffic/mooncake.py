"""Mooncake traces: JSON lines with timestamp [ms], input_length, output_length and the ids of blocks of 512 tokens.

The last block of a prompt may be shorter, and has an id of its own [1]_.

References
----------
.. [1] https://github.com/kvcache-ai/Mooncake, FAST25-release/README.md.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from costmodel.base import Array
from simulator.request import NONE, Ints, Requests, requests_of
from simulator.resolve import resolve
from simulator.service import Service
from simulator.traffic.fields import Row, at_least_one, json_lines

ABOUT = "Mooncake traces (JSON lines with timestamp, input_length, output_length, hash_ids)"
BLOCK_TOKENS = 512
MILLI = 1e-3
DIGITS = 3
"""Decimals of a timestamp [ms] that is no whole number: microseconds."""


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return first.startswith("{") and '"input_length"' in first and '"hash_ids"' in head


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file.

    Notes
    -----
    An id stands for a block and all before it, so the last id that an earlier request had says how much is shared.
    """
    rows = json_lines(path, n)
    timed = sorted(((row.number("timestamp") * MILLI, row) for row in rows), key=lambda pair: pair[0])
    rows, times = [row for _, row in timed], np.array([time for time, _ in timed])
    notes: list[str] = []
    text = at_least_one([row.whole("input_length") for row in rows], "input", notes)
    output = at_least_one([row.whole("output_length") for row in rows], "output", notes)
    parent, shared = _shared([_blocks(row) for row in rows], text)
    links = {"parent": parent, "shared_text_tokens": shared}
    return requests_of(times - times[0], text, output, links=links, name="mooncake", notes=notes)


def _blocks(row: Row) -> list[int]:
    ids = row.sequence("hash_ids")
    if not all(isinstance(block, int) for block in ids):
        raise row.wrong("hash_ids", "must be a list of whole numbers")
    if len(ids) > -(-row.whole("input_length") // BLOCK_TOKENS):
        raise row.wrong("hash_ids", f"has more than a block for every {BLOCK_TOKENS} tokens of input_length")
    return ids


def _shared(blocks: list[list[int]], text: Ints) -> tuple[Ints, Ints]:
    """Return whose prompt each prompt starts like, and for how many tokens."""
    parent, shared = np.full(len(blocks), NONE), np.zeros(len(blocks), dtype=np.int64)
    seen: dict[int, int] = {}
    for index, ids in enumerate(blocks):
        known = list(itertools.takewhile(seen.__contains__, ids))
        if known:
            parent[index] = seen[known[-1]]
            shared[index] = min(len(known) * BLOCK_TOKENS, text[index])
        for block in ids:
            seen.setdefault(block, index)
    return parent, shared


def write(
    requests: Requests,
    path: str | Path,
    service: Service | None = None,
    *,
    arrival_s: Array | None = None,
    prompt_tokens: Ints | None = None,
) -> None:
    """Write requests as lines of this format; blocks that prompts share have equal ids.

    Parameters
    ----------
    requests : Requests
    path : str or Path
    service : Service, optional
        What says how many tokens a picture is; needed where prompts share pictures.
    arrival_s : ndarray, optional
        When each came, from a run; needed where requests follow on answers [s].
    prompt_tokens : ndarray of int, optional
        Of each prompt, pictures included, from a run; this or a service is needed where there are pictures.

    Raises
    ------
    ValueError
        If there are pictures and nothing says their tokens, or requests that follow on answers and no times of a run.

    Notes
    -----
    Ids stand for whole blocks, so what prompts share is rounded down to blocks of 512 tokens, and an answer that the
    next turn holds shows only from the turn after that on. Pictures become tokens of the prompt.
    """
    if arrival_s is None and (requests.after >= 0).any():
        raise ValueError("requests that follow on answers have no times; simulate them, and write the run")
    known = prompt_tokens is not None and not requests.shared_items.any()
    if requests.n_items.any() and service is None and not known:
        raise ValueError("a picture is no tokens without a model; give a service, or simulate, and write the run")
    times = requests.arrival_s if arrival_s is None else arrival_s
    came = np.flatnonzero(~np.isnan(times))
    if len(came) < len(requests):
        raise ValueError(f"{len(requests) - len(came):,} requests never came, and have no times; write the run as .csv")
    prompt = requests.text_tokens if prompt_tokens is None else prompt_tokens
    shared = requests.shared_text_tokens
    if service is not None:
        resolved = resolve(requests, service)
        prompt, shared = np.array(resolved.prompt_tokens, dtype=np.int64), resolved.shared_tokens
    ids = list(_ids(requests, prompt, np.minimum(shared, prompt)))
    order = np.argsort(times, kind="stable")
    with Path(path).open("w", encoding="utf-8") as file:
        for index in order.tolist():
            line = {
                "timestamp": _milliseconds(float(times[index])),
                "input_length": int(prompt[index]),
                "output_length": int(requests.output_tokens[index]),
                "hash_ids": ids[index],
            }
            file.write(json.dumps(line) + "\n")


def _milliseconds(time_s: float) -> float:
    found = round(time_s / MILLI, DIGITS)
    return int(found) if found == int(found) else found


def _ids(requests: Requests, prompt: Ints, shared: Ints) -> Iterator[list[int]]:
    """Return the ids of the blocks of each prompt; those of its answer follow for the turns that hold it."""
    fresh = itertools.count()
    whole: list[list[int]] = []  # by request, the full blocks of its prompt and answer
    lines: list[list[int]] = []
    for index, parent in enumerate(requests.parent.tolist()):
        length = int(prompt[index])
        full, rest = divmod(length, BLOCK_TOKENS)
        same = min(int(shared[index]) // BLOCK_TOKENS, full) if parent != NONE else 0
        held = whole[parent][:same] if parent != NONE else []
        held = held + list(itertools.islice(fresh, full - len(held)))
        ends_alike = parent != NONE and shared[index] == length == prompt[parent]
        tail = [] if not rest else [lines[parent][full]] if ends_alike else [next(fresh)]
        lines.append(held + tail)
        reach = (length + int(requests.output_tokens[index])) // BLOCK_TOKENS
        whole.append(held + list(itertools.islice(fresh, reach - full)))
        yield lines[-1]
