"""BurstGPT traces: `Timestamp,Model,Request tokens,Response tokens,…`, times in seconds.

Release 2 adds `Session ID` and `Elapsed time` [1]_. Requests of one session are then turns of a conversation: a turn
comes so long after the answer before it as it did in the trace. That a prompt holds the earlier turns is taken from its
length: it does if it has at least the tokens of the prompt and the answer before it.

References
----------
.. [1] https://github.com/HPMLL/BurstGPT, README and BurstGPT_3.csv of release v2.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simulator.request import Requests, requests_of
from simulator.traffic.fields import at_least_one, csv_rows, requests
from simulator.traffic.sessions import turns_of

ABOUT = "BurstGPT traces (CSV with Timestamp, Request tokens, Response tokens; optional Session ID, Elapsed time)"
NEEDED = ("Timestamp", "Request tokens", "Response tokens")


def matches(head: str) -> bool:
    """Return whether a file begins like this format."""
    first = head.splitlines()[0] if head else ""
    return "Request tokens" in first and "Response tokens" in first


def load(path: str | Path, n: int | None = None) -> Requests:
    """Return the requests of a file; rows without an answer, which failed, are left out, as a note says."""
    rows = csv_rows(path, NEEDED, n)
    kept = [row for row in rows if row.whole("Response tokens") > 0]
    notes = [f"{requests(len(rows) - len(kept))} without response tokens, which failed: left out"]
    if not kept:
        raise ValueError(f"{Path(path).name} holds failed requests alone, without response tokens; give another")
    begin = np.array([row.number("Timestamp") for row in kept])
    order = np.argsort(begin, kind="stable")
    kept, begin = [kept[i] for i in order], begin[order] - begin.min()
    notes = notes if len(kept) < len(rows) else []
    text = at_least_one([row.whole("Request tokens") for row in kept], "input", notes)
    output = np.array([row.whole("Response tokens") for row in kept], dtype=np.int64)
    elapsed = np.array([row.number("Elapsed time") if row.has("Elapsed time") else 0.0 for row in kept])
    session = [str(row.values.get("Session ID") or "") for row in kept]
    arrival_s, links = turns_of(session, begin, begin + elapsed, text, output)
    return requests_of(arrival_s, text, output, name="burstgpt", links=links, notes=notes)
