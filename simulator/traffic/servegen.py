"""ServeGen folders: by client, how often requests come in every ten minutes, and how they are spread over six hours.

A client has two files [1]_. `chunk-<i>-trace.csv` has a row a window and no head: its begin [s], the rate [1/s], the
coefficient of variation of the gaps, the family fitted to them (Gamma, Weibull, or nothing where nobody came), its
shape and its scale. `chunk-<i>-dataset.json` has, by the second from which on it holds, how often every count of tokens
of text, of a picture and of the answer occurs, and every number of pictures. These are fits, so requests are drawn.

References
----------
.. [1] https://github.com/alibaba/ServeGen, README; Y. Xiang et al., NSDI 2026.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from costmodel.base import Array
from costmodel.errors import Unsupported, shown, unknown
from simulator.request import Ints, Items, Requests, requests_of
from simulator.traffic.fields import ENCODING, Row, json_object
from simulator.traffic.shapes import Generator, pictures, pictures_of_tokens

ABOUT = (
    "ServeGen folders (chunk-*-trace.csv, chunk-*-dataset.json: distributions by client, from which requests are drawn)"
)
WINDOW_S: Final = 600.0
"""A row of a client's trace."""
COLUMNS: Final = ("begin", "rate", "cv", "family", "shape", "scale")
NAME: Final = re.compile(r"chunk-(\d+)-trace\.csv")
SUM_TOLERANCE: Final = 1e-3
"""How far the probabilities of a count may miss 1 in sum."""
UNMODELLED: Final = ("audio_count", "video_count")

GAPS: Final[Mapping[str, Callable[[Generator, float, int], Array]]] = {
    "Gamma": lambda rng, shape, n: rng.gamma(shape, 1.0, n),
    "Weibull": lambda rng, shape, n: rng.weibull(shape, n),
}
"""Families of gaps between the requests of a client; their scale follows from the rate."""

Histogram = tuple[Ints, Array]
"""Values, and how likely each is."""


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """One client of the folder.

    Parameters
    ----------
    rates, shapes : ndarray
        By window, the rate [1/s] and the shape of the gaps.
    families : tuple of str
        By window.
    begins : ndarray of int
        From which second on each of the `spreads` holds [s].
    spreads : tuple of Row
    """

    rates: Array
    shapes: Array
    families: tuple[str, ...]
    begins: Ints
    spreads: tuple[Row, ...]


def matches(head: str) -> bool:
    """Return whether the names in a folder are those of this format."""
    return any(NAME.fullmatch(name) for name in head.splitlines())


def load(
    path: str | Path, n: int | None = None, *, seed: int = 0, rate: float | None = None, start: float | str = 0.0
) -> Requests:
    """Return requests drawn from the clients of a folder.

    Parameters
    ----------
    path : str or Path
        The folder.
    n : int, optional
        Requests; by default all until the traces end.
    seed : int
        Equal seeds give equal requests.
    rate : float, optional
        Mean requests a second over the whole trace to which all clients are scaled; windows keep their length.
    start : float
        Second of the trace at which to begin.
    """
    clients = _clients(Path(path))
    rng = np.random.default_rng(seed)
    rates = np.stack([client.rates for client in clients])
    if not rates.any():
        raise ValueError(f"{Path(path).name} holds no requests, its rates are all 0; give another folder")
    factor = 1.0 if rate is None else rate / float(rates.sum(axis=0).mean())
    expected = rates * factor * WINDOW_S
    counts = np.floor(expected + rng.random(expected.shape)).astype(np.int64)
    first = _first_window(start, rates.shape[1])
    counts[:, :first] = 0
    if n is not None:  # what comes after the window in which the last one falls needs no drawing
        enough = int(np.searchsorted(np.cumsum(counts.sum(axis=0)), n))
        counts[:, enough + 1 :] = 0
    drawn = [_draw(client, row, rng) for client, row in zip(clients, counts, strict=True)]
    times, text, output, images, tokens = (np.concatenate(column) for column in zip(*drawn, strict=True))
    if not len(times):
        raise ValueError(f"start={start} leaves no requests; begin earlier, or raise the rate")
    order = np.argsort(times, kind="stable")[:n]
    items = _items(images, tokens, order) if images.any() else None
    at = times[order] - first * WINDOW_S
    return requests_of(at, text[order], output[order], items=items, name=Path(path).resolve().name)


def _first_window(start: float | str, windows: int) -> int:
    try:
        found = float(start)
    except ValueError:
        found = -1.0
    if not 0 <= found < windows * WINDOW_S:
        raise ValueError(f"start={start} must lie in the trace, from 0 to {windows * WINDOW_S:g} seconds; change it")
    return int(found // WINDOW_S)


def _items(images: Ints, tokens: Ints, order: Ints) -> Items:
    """Return the pictures of the requests in their new order."""
    first = np.concatenate([[0], np.cumsum(images)])
    counts = images[order]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    kind, sizes = pictures_of_tokens(tokens[np.repeat(first[order], counts) + within])
    return pictures(counts, kind, sizes)


def _draw(client: Client, counts: Ints, rng: Generator) -> tuple[Array, Ints, Ints, Ints, Ints]:
    """Return times [s], text, answers and pictures of one client's requests, and the tokens of the pictures."""
    times = [
        (window + _within(client.families[window], client.shapes[window], counts[window], rng)) * WINDOW_S
        for window in np.flatnonzero(counts).tolist()
    ]
    windows = np.repeat(np.arange(len(counts)), counts)
    which = np.maximum(np.searchsorted(client.begins, windows * WINDOW_S, side="right") - 1, 0)
    n = len(windows)
    text, output, images = (np.ones(n, dtype=np.int64), np.ones(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
    tokens = []
    for index in np.unique(which).tolist():
        spread, here = client.spreads[index], which == index
        many = int(here.sum())
        text[here] = np.maximum(
            1, _choose(spread, "text_tokens" if spread.has("text_tokens") else "input_tokens", many, rng)
        )
        output[here] = np.maximum(1, _choose(spread, "output_tokens", many, rng))
        _refuse(spread)
        if spread.has("image_count"):
            images[here] = _choose(spread, "image_count", many, rng)
        pictured = int(images[here].sum())
        tokens.append(np.maximum(1, _choose(spread, "image_tokens", pictured, rng)) if pictured else _NO_TOKENS)
    at = np.concatenate(times) if times else np.zeros(0)
    return at, text, output, images, np.concatenate(tokens) if tokens else _NO_TOKENS


_NO_TOKENS: Final = np.zeros(0, dtype=np.int64)


def _within(family: str, shape: float, count: int, rng: Generator) -> Array:
    """Return when so many requests come in a window of length 1: gaps of the family, stretched to fill it.

    Filling it keeps the rate exact; gaps of their own scale would begin anew in every window and bring too many.
    """
    gaps = GAPS[family](rng, float(shape), int(count) + 1)
    total = float(gaps.sum())
    begin = rng.random()  # where in the window the row of gaps begins, so that no edge is special
    found: Array = np.sort((np.cumsum(gaps)[:-1] / total + begin) % 1.0) if total else np.sort(rng.random(count))
    return found


def _choose(spread: Row, key: str, n: int, rng: Generator) -> Ints:
    values, shares = _histogram(spread, key)
    found: Ints = rng.choice(values, size=n, p=shares)
    return found


def _histogram(spread: Row, key: str) -> Histogram:
    """Return how often each value occurs; the files write it as a Python mapping inside a text."""
    text = spread.text(key)
    try:
        held = dict(ast.literal_eval(text))
        values = np.array([int(value) for value in held], dtype=np.int64)
        shares = np.array([float(share) for share in held.values()])
    except (ValueError, SyntaxError, TypeError):
        raise spread.wrong(key, "must be a mapping of counts to probabilities in a text") from None
    if not len(values) or values.min() < 0 or shares.min() < 0 or abs(shares.sum() - 1) > SUM_TOLERANCE:
        raise spread.wrong(key, "must map counts of 0 or more to probabilities that add up to 1")
    return values, shares / shares.sum()


def _refuse(spread: Row) -> None:
    for key in UNMODELLED:
        if spread.has(key) and _histogram(spread, key)[0].any():
            raise Unsupported(
                f"{spread.where}: {key}={shown(spread.values[key])} is not modelled; use the image folders"
            )


def _clients(folder: Path) -> list[Client]:
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    clients = [_client(path) for _, path in sorted(found)]
    windows = {len(client.rates) for client in clients}
    if len(windows) > 1:
        raise ValueError(f"{folder.name}: clients have {sorted(windows)} windows; give traces of one length")
    return clients


def _client(path: Path) -> Client:
    rows = _windows(path)
    beside = path.with_name(path.name.replace("-trace.csv", "-dataset.json"))
    if not beside.exists():
        raise ValueError(f"{path.name} has no {beside.name} beside it; the format needs both")
    held = json_object(beside)
    begins = sorted(held.values, key=lambda key: int(key) if key.isdigit() else -1)
    if not begins or not begins[0].isdigit():
        raise ValueError(
            f"{beside.name}: {shown(begins[0] if begins else {})} must be a second of the trace; correct it"
        )
    return Client(
        rates=np.array([row.number("rate") for row in rows]),
        shapes=np.array([row.number("shape") for row in rows]),
        families=tuple(_family(row) for row in rows),
        begins=np.array([int(key) for key in begins], dtype=np.int64),
        spreads=tuple(held.part(key) for key in begins),
    )


def _windows(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding=ENCODING, newline="") as file:
        reader = csv.reader(file)
        for cells in filter(None, reader):
            where = f"{path.name}, line {reader.line_num}"
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{where}: {len(cells)} columns must be {', '.join(COLUMNS)}; correct the file")
            row = Row(where, dict(zip(COLUMNS, cells, strict=True)))
            if row.number("begin") != len(rows) * WINDOW_S:
                raise row.wrong("begin", f"must be {len(rows) * WINDOW_S:g}, windows of {WINDOW_S:g} s in order")
            rows.append(row)
    return rows


def _family(row: Row) -> str:
    if row.number("rate") == 0:
        return ""
    if row.values["family"] not in GAPS:
        raise ValueError(f"{row.where}: {unknown('family of gaps', row.values['family'], GAPS)}")
    if row.number("shape") == 0:
        raise row.wrong("shape", "must be more than 0")
    return row.text("family")
