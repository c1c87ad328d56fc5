"""Read measured kernel times: the Parquet tables of aiconfigurator.

Times become seconds and messages bytes. Rows that say nothing about a kernel are left out: launches without a CUDA
graph, weights that were never set, windows, caches of another width than the inputs. Of a library's versions the
latest is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.errors import first_line

if TYPE_CHECKING:
    from polars import DataFrame

MS: Final = 1e-3
HALF_BYTES: Final = 2
LIBRARIES: Final = {"SGLang": "sglang", "TRTLLM": "trtllm", "VLLM": "vllm", "vLLM": "vllm"}
GEMM_PRECISIONS: Final = {"bfloat16": "bf16", "fp8": "fp8"}
WIDEST_HEAD: Final = 256
MOST_GROUPED: Final = 32
"""TensorRT-LLM leaves its decode kernel for groups with more query heads."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Measured times of one kind of kernel of one library.

    Parameters
    ----------
    kind, variant : str
        What was measured, such as gemm and bf16.
    library, version : str
        Who wrote the kernel.
    files : tuple of str
        Where the rows are from.
    work : mapping of str to ndarray, shape (n,)
        Columns of the shape.
    measured_s : ndarray, shape (n,)
        What it took [s].
    origins : tuple of Path
        Folders or files of measurement lines that were read.
    """

    kind: str
    variant: str
    library: str
    version: str
    files: tuple[str, ...]
    work: Mapping[str, NDArray[Any]]
    measured_s: Array
    origins: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Kind and variant."""
        return f"{self.kind}.{self.variant}"

    def take(self, chosen: NDArray[Any]) -> Samples:
        """Return some of the rows."""
        work = {key: column[chosen] for key, column in self.work.items()}
        return replace(self, work=work, measured_s=self.measured_s[chosen])


def read_parquet(path: Path, columns: Sequence[str]) -> DataFrame:
    """Return the rows of a table that must have these columns, `latency` in ms among them.

    Raises
    ------
    ValueError
        If it is no such table, or holds a time that is none.
    """
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {first_line(error)}") from None
    return checked(frame, path, columns, "latency")


def checked(frame: DataFrame, path: Path, columns: Sequence[str], time: str) -> DataFrame:
    """Return a table whose columns and times have been checked.

    Raises
    ------
    ValueError
        If a column is missing or of another type, or a time is no positive number.
    """
    import polars as pl

    missing = [name for name in (*columns, time) if name not in frame.columns]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(frame.columns[:20])}")
    if not frame.schema[time].is_numeric():
        raise ValueError(f"{path} has text in its column {time!r}; times must be numbers")
    times = frame[time].cast(pl.Float64).to_numpy()
    wrong = np.flatnonzero(~(np.isfinite(times) & (times > 0)))
    if wrong.size:
        raise ValueError(f"{path} has {time}={times[wrong[0]]} in row {wrong[0] + 1}; times must be above zero")
    return frame


def newest(paths: Sequence[Path]) -> Path:
    """Return the file in the folder with the highest version: 0.14.0 is above 0.9.1, 1.3.0 above 1.3.0rc20."""

    def rank(path: Path) -> tuple[tuple[int, ...], bool]:
        release, _, candidate = path.parent.name.partition("rc")
        return tuple(int(digits) for digits in re.findall(r"\d+", release)), not candidate

    return max(paths, key=rank)


def columns(frame: DataFrame, **names: str) -> dict[str, NDArray[Any]]:
    """Return columns under our names."""
    return {ours: frame[theirs].to_numpy() for ours, theirs in names.items()}


def _samples(frame: DataFrame, path: Path, kind: str, variant: str, **names: str) -> Samples:
    library = LIBRARIES.get(path.parent.parent.name, path.parent.parent.name)
    if "framework" in frame.columns and path.parent.parent.name != "nccl":
        library = LIBRARIES.get(str(frame["framework"][0]), library)
    measured = frame["latency"].to_numpy() * MS
    return Samples(kind, variant, library, path.parent.name, (path.name,), columns(frame, **names), measured)


def _read_gemm(path: Path) -> Iterator[Samples]:
    frame = read_parquet(path, ("framework", "gemm_dtype", "m", "n", "k"))
    for theirs, ours in GEMM_PRECISIONS.items():
        rows = frame.filter(frame["gemm_dtype"] == theirs)
        if len(rows) and str(rows["framework"][0]).lower() != "vllm":  # its weights were never set
            yield _samples(rows, path, "gemm", ours, m="m", n="n", k="k")


ATTENTION: Final = ("batch_size", "isl", "num_heads", "head_dim", "kernel_source", "attn_dtype")


def _attention_rows(path: Path) -> DataFrame:
    """Return the rows with 16-bit inputs and cache, the whole context, and no wider head than 256."""
    import polars as pl

    wanted = (*ATTENTION, "num_key_value_heads", "kv_cache_dtype", "step")
    frame = read_parquet(path, wanted)
    keep = (pl.col("attn_dtype") == "bfloat16") & (pl.col("kv_cache_dtype") == "bfloat16")
    keep &= pl.col("head_dim") <= WIDEST_HEAD
    if "window_size" in frame.columns:
        keep &= pl.col("window_size") == 0
    heads, kv_heads = pl.col("num_heads"), pl.col("num_key_value_heads")
    kv = pl.when(kv_heads > 0).then(kv_heads).otherwise(heads).alias("num_key_value_heads")
    return frame.filter(keep).with_columns(kv)


def _read_prefill(path: Path) -> Iterator[Samples]:
    for (source,), rows in _attention_rows(path).group_by(["kernel_source"], maintain_order=True):
        names = {"s": "isl", "b": "batch_size", "heads": "num_heads", "kv_heads": "num_key_value_heads"}
        yield _samples(rows, path, "prefill_attention", kernel(str(source)), **names, head_dim="head_dim")


def _read_decode(path: Path) -> Iterator[Samples]:
    import polars as pl

    group = pl.col("num_heads") / pl.col("num_key_value_heads")
    frame = _attention_rows(path).with_columns((pl.col("isl") + pl.col("step")).alias("context"))
    for (source,), rows in frame.group_by(["kernel_source"], maintain_order=True):
        for heads, chosen in (("mha", group == 1), ("gqa", (group > 1) & (group <= MOST_GROUPED))):
            some = rows.filter(chosen)
            names = {"context": "context", "b": "batch_size", "heads": "num_heads"}
            names |= {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
            if len(some):
                yield _samples(some, path, "decode_attention", f"{heads}.{kernel(str(source))}", **names)


def _read_encoder(path: Path) -> Iterator[Samples]:
    frame = read_parquet(path, ATTENTION)
    frame = frame.filter(frame["attn_dtype"] == "bfloat16")
    for (source,), rows in frame.group_by(["kernel_source"], maintain_order=True):
        names = {"s": "isl", "b": "batch_size", "heads": "num_heads", "kv_heads": "num_heads", "head_dim": "head_dim"}
        yield _samples(rows, path, "encoder_attention", kernel(str(source)), **names)


def kernel(source: str) -> str:
    """Return the family of a kernel from the name that its library has for it."""
    known = {"fa2": "fa2", "fa3": "fa3", "v3": "fa3", "fa4": "fa4", "flashinfer": "flashinfer", "triton": "triton"}
    return next((ours for theirs, ours in known.items() if theirs in source), "flash")


def _read_moe(path: Path) -> Iterator[Samples]:
    names = {"tokens": "num_tokens", "hidden": "hidden_size", "inter": "inter_size", "top_k": "topk"}
    names |= {"experts": "num_experts", "tp": "moe_tp_size", "ep": "moe_ep_size", "routing": "distribution"}
    frame = read_parquet(path, ("kernel_source", "moe_dtype", *names.values()))
    triton = frame["kernel_source"].str.contains("triton|fused_moe$")
    other = frame["kernel_source"].str.contains("marlin")
    for theirs, ours in GEMM_PRECISIONS.items():
        for family, chosen in (("cutlass", ~triton), ("triton", triton)):
            rows = frame.filter((frame["moe_dtype"] == theirs) & chosen & ~other)
            if len(rows):
                found = _samples(rows, path, "moe_gemm", f"{ours}.{family}", **names)
                plain = rows["kernel_source"].str.contains("nongated").to_numpy() | (rows["topk"] == 22).to_numpy()  # noqa: PLR2004 - the models with 22 experts a token have no gate
                found.work["matrices"] = np.where(plain, 2, 3)  # type: ignore[index]
                yield found


def _read_nccl(path: Path) -> Iterator[Samples]:
    frame = read_parquet(path, ("op_name", "nccl_dtype", "num_gpus", "message_size"))
    frame = frame.filter(frame["nccl_dtype"] == "half")
    for (name,), rows in frame.group_by(["op_name"], maintain_order=True):
        yield _collective(rows, path, str(name))


def _read_custom(path: Path) -> Iterator[Samples]:
    frame = read_parquet(path, ("kernel_source", "allreduce_dtype", "num_gpus", "message_size"))
    eager = frame["kernel_source"].str.contains("eager")
    rows = frame.filter(~eager & (frame["allreduce_dtype"] == "bfloat16"))
    if len(rows):
        yield _collective(rows, path, "custom_all_reduce")


def _collective(rows: DataFrame, path: Path, algorithm: str) -> Samples:
    found = _samples(rows, path, "collective", algorithm, message_bytes="message_size", ranks="num_gpus")
    sized = {"message_bytes": found.work["message_bytes"] * HALF_BYTES}  # elements of 16 bits
    return replace(found, work={**found.work, **sized, "algorithm": np.full(len(rows), algorithm)})


READERS: Final[Mapping[str, Callable[[Path], Iterator[Samples]]]] = {
    "gemm_perf.parquet": _read_gemm,
    "context_attention_perf.parquet": _read_prefill,
    "generation_attention_perf.parquet": _read_decode,
    "encoder_attention_perf.parquet": _read_encoder,
    "moe_perf.parquet": _read_moe,
    "nccl_perf.parquet": _read_nccl,
    "custom_allreduce_perf.parquet": _read_custom,
}


def read_aiconfigurator(folder: Path) -> Iterator[Samples]:
    """Yield every kind of kernel under a folder of aiconfigurator's tables, the latest version of each library.

    Raises
    ------
    ValueError
        If the folder holds more than one device.
    """
    devices = {path.parents[3].name for name in READERS for path in folder.rglob(name)}
    if len(devices) > 1:
        raise ValueError(f"{folder} holds the devices {', '.join(sorted(devices))}; give the folder of one")
    for name, reader in READERS.items():
        by_library: dict[Path, list[Path]] = {}
        for path in sorted(folder.rglob(name)):
            by_library.setdefault(path.parent.parent, []).append(path)
        for paths in by_library.values():
            yield from reader(newest(paths))
