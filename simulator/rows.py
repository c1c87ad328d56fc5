"""A row a request, as CSV or Parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from simulator.request import State
from simulator.trace import Trace

PIECE = 4096
"""Rows that are turned into text at once."""
TIMES: Final = ("arrival_s", "encoded_s", "queued_s", "scheduled_s", "first_token_s", "joined_s", "finish_s")


def columns(trace: Trace) -> dict[str, NDArray[Any]]:
    """Return the columns of the table, one row a request."""
    names = np.array([state.name.lower() for state in State])
    held = trace.columns
    reasons = np.array([trace.reasons.get(request, "") for request in range(len(trace))])
    return {
        "request": np.arange(len(trace)),
        "state": names[held["state"].astype(int)],
        "reason": reasons,
        "worker": held["worker"],
        "decode_worker": held["decode_worker"],
        "text_tokens": trace.requests.text_tokens,
        "items": trace.requests.n_items,
        "prompt_tokens": trace.prompt_tokens,
        "cached_tokens": held["cached_tokens"],
        "output_tokens": trace.output_tokens,
        "preemptions": held["preemptions"],
        "retries": held["retries"],
        **{name: held[name] for name in TIMES},
        "preprocess_s": np.nan_to_num(held["preprocess_s"]),
        "ttft_s": trace.ttft_s,
        "tpot_s": trace.tpot_s,
        "e2e_s": trace.e2e_s,
    }


def write_rows(trace: Trace, path: str | Path) -> None:
    """Write the table to a file, as Parquet if the name ends so, else as CSV; what did not happen is left empty.

    Raises
    ------
    ModuleNotFoundError
        If Parquet is asked for and polars, the extra `data`, is not installed.
    """
    held = columns(trace)
    if str(path).endswith(".parquet"):
        try:
            import polars as pl
        except ModuleNotFoundError:
            message = "Parquet needs polars: pip install 'lvlm-sim[data]', or give a name that ends in .csv"
            raise ModuleNotFoundError(message) from None
        pl.DataFrame(held).fill_nan(None).write_parquet(path)
        return
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(held)
        for start in range(0, len(trace), PIECE):
            parts = [column[start : start + PIECE].tolist() for column in held.values()]
            writer.writerows([("" if v != v else v) for v in row] for row in zip(*parts, strict=True))  # noqa: PLR0124
