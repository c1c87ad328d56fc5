"""Read measured kernel times: the CSV files of Vidur and of LLMCompass.

Vidur times the operators of a transformer layer one by one, in ms; collectives are taken within one node. LLMCompass
gives products in ms and the other operators in 1e9 elements a second, measured without CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.errors import first_line
from runtime.tables import MS, Samples, checked

if TYPE_CHECKING:
    from polars import DataFrame

HALF: Final = 2
MLP_COLUMNS: Final = (
    "n_head",
    "n_kv_head",
    "n_embd",
    "n_expanded_embd",
    "use_gated_mlp",
    "num_tokens",
    "num_tensor_parallel_workers",
)
VALUES_AN_ELEMENT: Final = {"softmax": 2, "layernorm": 2, "gelu": 2}
"""Read once and written once."""
Columns = Mapping[str, NDArray[Any]]


def read_vidur(folder: Path) -> Iterator[Samples]:
    """Yield the kernels of Vidur's profiles under a folder of one device.

    Raises
    ------
    ValueError
        If a file is not what its name says, or the folder holds more than one device.
    """
    tables = sorted(folder.rglob("mlp.csv"))
    devices = {path.parents[2].name for path in tables}
    if len(devices) > 1:
        raise ValueError(f"{folder} holds the devices {', '.join(sorted(devices))}; give the folder of one")
    if tables:
        yield from _operators(tables)
    for algorithm in ("all_reduce", "send_recv"):
        paths = sorted(folder.rglob(f"{algorithm}.csv"))
        if len(paths) > 1:
            raise ValueError(f"{folder} holds {len(paths)} files {algorithm}.csv; give the folder of one node")
        for path in paths:
            yield _collective(path, algorithm)


def _read_csv(path: Path, columns: tuple[str, ...], time: str) -> DataFrame:
    import polars as pl

    try:
        frame = pl.read_csv(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path} is no CSV file that can be read: {first_line(error)}") from None
    return checked(frame, path, columns, time)


def _time(operator: str) -> str:
    return f"time_stats.{operator}.median"


def _operators(paths: list[Path]) -> Iterator[Samples]:
    """Yield products, and each kind of element-wise operator, of all models together."""
    found: dict[str, list[tuple[Columns, Array]]] = {}
    for path in paths:
        frame = _read_csv(path, MLP_COLUMNS, _time("mlp_up_proj"))
        column = {name: frame[name].cast(int).to_numpy() for name in MLP_COLUMNS}
        parallel = _time("post_attention_layernorm") not in frame.columns
        for operator, work in {**_products(column), **_elementwise(column, parallel=parallel)}.items():
            if parallel and operator == "post_attention_layernorm":
                continue
            checked(frame, path, (), _time(operator))
            name = "gemm.fp16" if "m" in work else f"elementwise.{work['operator'][0]}"
            found.setdefault(name, []).append((work, frame[_time(operator)].to_numpy() * MS))
    for name, parts in found.items():
        kind, _, variant = name.partition(".")
        work = {key: np.concatenate([part[key] for part, _ in parts]) for key in parts[0][0]}
        measured = np.concatenate([times for _, times in parts])
        yield Samples(kind, variant, "vidur", "", ("mlp.csv",), work, measured)


def _products(column: Columns) -> dict[str, Columns]:
    """Return the shapes of the products of a layer, by operator."""
    tokens, shares, width = column["num_tokens"], column["num_tensor_parallel_workers"], column["n_embd"]
    head = width // column["n_head"]
    heads = column["n_head"] // shares
    inter = column["n_expanded_embd"] // shares
    kv_heads = np.maximum(column["n_kv_head"] // shares, 1)
    return {
        "attn_pre_proj": {"m": tokens, "n": (heads + 2 * kv_heads) * head, "k": width},
        "attn_post_proj": {"m": tokens, "n": width, "k": heads * head},
        "mlp_up_proj": {"m": tokens, "n": inter * (1 + column["use_gated_mlp"]), "k": width},
        "mlp_down_proj": {"m": tokens, "n": width, "k": inter},
    }


def _elementwise(column: Columns, *, parallel: bool) -> dict[str, Columns]:
    """Return the traffic of the other operators of a layer, by operator.

    A layer whose attention and feed-forward run in parallel has one norm and adds both to its input.
    """
    tokens, shares, width = column["num_tokens"], column["num_tensor_parallel_workers"], column["n_embd"]
    rotated = (column["n_head"] + column["n_kv_head"]) // shares * (width // column["n_head"])
    inter = column["n_expanded_embd"] // shares
    return {
        "input_layernorm": _moved("norm", tokens, width, 2),
        "post_attention_layernorm": _moved("norm", tokens, width, 2),
        "attn_rope": _moved("rope", tokens, rotated, 2),
        "mlp_act": _moved("activation", tokens, inter, 2 + column["use_gated_mlp"]),
        "add": _moved("add", tokens, width, 6 if parallel else 3),
        "emb": _moved("embedding", tokens, width, 2),
    }


def _moved(operator: str, rows: NDArray[Any], width: NDArray[Any], values: NDArray[Any] | int) -> Columns:
    """Return an operator that moves so many 16-bit values an element."""
    traffic = rows * width * values * HALF
    return {"operator": np.full(len(rows), operator), "width": width, "traffic_bytes": traffic.astype(float)}


def _collective(path: Path, algorithm: str) -> Samples:
    import polars as pl

    time = _time(algorithm)
    frame = _read_csv(path, ("num_workers", "size", "devices_per_node"), time)
    frame = frame.filter(pl.col("devices_per_node") == pl.col("num_workers"))
    size = frame["size"].to_numpy()
    work = {"message_bytes": size, "ranks": frame["num_workers"].to_numpy()}
    work["algorithm"] = np.full(len(size), algorithm)
    return Samples("collective", algorithm, "vidur", "", (path.name,), work, frame[time].to_numpy() * MS)


def read_llmcompass(folder: Path, device: str) -> Iterator[Samples]:
    """Yield the operators of LLMCompass that were measured on one device.

    Parameters
    ----------
    folder : Path
        Where files such as `matmul_A100.csv` are.
    device : str
        Name of the device; files name its chip.

    Raises
    ------
    ValueError
        If a file is not what its name says.
    """
    parts: list[Columns] = []
    times: list[Array] = []
    for path in sorted(folder.rglob("*_*.csv")):
        operator, _, chip = path.stem.partition("_")
        if not device.startswith(chip.lower()):
            continue
        if operator == "matmul":
            rows = _numbers(path, 4)
            work = {"m": rows[:, 0], "n": rows[:, 1], "k": rows[:, 2]}
            yield Samples("gemm", "fp16", "llmcompass", "", (path.name,), _whole(work), rows[:, 3] * MS)
        elif operator in VALUES_AN_ELEMENT:
            rows = _numbers(path, 2 if operator == "gelu" else 3)
            elements = rows[:, :-1].prod(axis=1)
            width = _whole({"width": rows[:, -2]})["width"]
            parts.append(_moved(operator, _whole({"n": elements})["n"] // width, width, VALUES_AN_ELEMENT[operator]))
            times.append(elements / (rows[:, -1] * 1e9))
    if parts:
        together = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        yield Samples("elementwise", "eager", "llmcompass", "", ("*.csv",), together, np.concatenate(times))


def _whole(work: Mapping[str, Array]) -> dict[str, NDArray[np.int64]]:
    return {key: column.astype(np.int64) for key, column in work.items()}


def _numbers(path: Path, columns: int) -> Array:
    """Return the leading numbers of every line of a file without a header; units behind them are dropped."""
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        cells = [cell.strip().removesuffix("ms") for cell in line.split(",")][:columns]
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            row = []
        if len(row) < columns or not all(np.isfinite(row)) or min(row) <= 0:
            raise ValueError(f"{path} line {i} must hold {columns} numbers above zero; it reads {line[:60]!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return np.array(rows)
