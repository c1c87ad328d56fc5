"""Hybrid compression: an operator for each group of heads or layers, at an equal budget of the cache.

One long video on Qwen2.5-VL-7B: the request of the survey's Table 8, whose full cache is 1.73 GB. A budget is the share
of the prompt's cache, in bytes, that a decode step reads. Pruning, quantising and retrieving meet the same budget,
alone or each in a group of its own: half of the key heads, halves or thirds of the layers.

    python -m studies.frontiers.hybrid_compression
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from costmodel import Prediction, Workload, predict, technique
from costmodel.quality import quality_of
from costmodel.query import KVEntry, Overhead, Query
from costmodel.techniques import Technique
from costmodel.techniques.applied import Published
from costmodel.techniques.kv_evict import KVEvict
from costmodel.techniques.kv_quantize import KVQuantize
from costmodel.techniques.kv_retrieve import KVRetrieve
from costmodel.units import BITS_PER_BYTE
from studies.frontiers.common import Numbers, markdown, panels, write
from studies.frontiers.texts import HYBRID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODEL: Final = "qwen2.5-vl-7b"
DEVICES: Final = ("l40s-48gb", "h100-sxm5-80gb")
ENGINES: Final = ("hf-eager", "vllm")
REQUEST: Final = Workload(visual_tokens=30_104.0, text_tokens=64, output_tokens=128)
"""1.73 GB over 57,344 bytes a token, less 64 of text (assumed); 128 tokens of output as printed."""
BUDGETS: Final = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
TABLED: Final = (0.05, 0.1, 0.2, 0.5)
SHOWN: Final = 0.2
SMOKE: Final = (0.2, 1.0)
GROUP: Final = 32.0
"""Numbers that share a scale and a zero point, as VidKV has it (arXiv:2503.16257)."""
SCALE_BITS: Final = 32.0 / GROUP
FULL_BITS: Final = 16.0
FLOOR: Final = (1.0 + SCALE_BITS) / FULL_BITS
"""Least budget that quantising alone reaches: one bit and its share of the scales."""
CLOSE: Final = 0.01
"""Relative distance from the best within which an operator wins too."""
METRICS: Final = ("kv_gb", "ttft_s", "tpot_ms", "max_batch", "tokens_per_s")
MORE_IS_BETTER: Final = ("max_batch", "tokens_per_s")
CODES: Final = {
    "prune": "P",
    "quantise": "Q",
    "retrieve, device": "Rd",
    "retrieve, host": "Rh",
    "retrieve, host, each step": "Rs",
    "heads: prune + retrieve": "P/Rh",
    "layers: quantise + prune": "Q/P",
    "layers: all three": "Q/P/Rh",
}
NAMES: Final = {
    "kv_gb": "cache on the device",
    "ttft_s": "TTFT",
    "tpot_ms": "TPOT",
    "max_batch": "largest batch",
    "tokens_per_s": "tokens/s at that batch",
}
TABLE_8: Final = {1.0: (1.73, 58.94), 0.2: (0.40, 42.08), 0.1: (0.22, 38.65)}
"""Survey, Table 8 (L40S, Hugging Face with FlashAttention): cache [GB] and ms a token by budget."""
Place: TypeAlias = Literal["layer", "head"]


@dataclass(frozen=True, slots=True, eq=False)
class ByGroup:
    """A technique of its own for each group of the cache: of the layers, or of the key heads of every layer.

    Parameters
    ----------
    by : {"layer", "head"}
        What the groups are made of.
    rewrites : tuple of Technique
        One a group; groups are as equal as layers or heads allow.
    """

    by: Place
    rewrites: tuple[Technique, ...]
    name: str = "by_group"
    slot: str = "kv tokens"
    stages: str = "kv"
    needs_attention_map: Literal["none", "rows", "full"] = "rows"

    def apply(self, query: Query) -> Query:
        """Return the query whose groups were rewritten one by one."""
        kv: list[KVEntry] = []
        added: list[Overhead] = []
        for entries, part in zip(split(query.kv, self.by, len(self.rewrites)), self.rewrites, strict=True):
            rewritten = part.apply(replace(query, kv=entries, overheads=()))
            kv += rewritten.kv
            added += rewritten.overheads
        return replace(query, kv=tuple(kv), overheads=(*query.overheads, *added))


def split(entries: tuple[KVEntry, ...], by: Place, groups: int) -> list[tuple[KVEntry, ...]]:
    """Return the cache in groups that add up to it, for layers of one kind."""
    (entry,) = entries
    mixer: Any = entry.mixer
    whole = entry.n_layers if by == "layer" else mixer.kv_heads
    counts = [whole // groups + (i < whole % groups) for i in range(groups)]
    if by == "layer":
        return [(replace(entry, n_layers=n),) for n in counts]
    each = mixer.heads // mixer.kv_heads
    return [(replace(entry, mixer=replace(mixer, heads=n * each, kv_heads=n)),) for n in counts]


def prune(budget: float) -> Technique:
    """Return eviction of all but a share of the tokens, scored by 32 rows as SnapKV and SparseMM do."""
    return KVEvict(keep=budget, score="rows")


def quantise(budget: float, engine: str) -> Technique:
    """Return bits that take a share of 16; the cache class of the eager engine writes a wide copy in every step."""
    bits = budget * FULL_BITS
    if bits < BITS_PER_BYTE:  # from eight bits on there are no scales to keep
        bits -= SCALE_BITS
    bits = min(max(bits, 1.0), FULL_BITS)
    return KVQuantize(key_bits=bits, value_bits=bits, group=GROUP, fused=engine != "hf-eager")


def retrieve(budget: float, **how: Any) -> Technique:  # noqa: ANN401 - fields of the primitive
    """Return retrieval of a share of the visual tokens."""
    return KVRetrieve(read=budget, **how)


def operators(budget: float, engine: str) -> dict[str, list[Technique]]:
    """Return what meets a budget, by name; where quantising cannot go so low, a group beside it takes less."""
    quantised = max(budget, FLOOR)
    half, third = 2.0 * budget - quantised, (3.0 * budget - quantised) / 2.0
    host = retrieve(budget, placement="host")
    found: dict[str, list[Technique]] = {
        "prune": [prune(budget)],
        "retrieve, device": [retrieve(budget)],
        "retrieve, host": [host],
        "retrieve, host, each step": [retrieve(budget, placement="host", each="step")],
        "heads: prune + retrieve": [ByGroup("head", (prune(budget), host))],
    }
    if budget >= FLOOR:
        found["quantise"] = [quantise(budget, engine)]
    if half > 0:
        found["layers: quantise + prune"] = [ByGroup("layer", (quantise(quantised, engine), prune(half)))]
    if third > 0:
        parts = (quantise(quantised, engine), prune(third), retrieve(third, placement="host"))
        found["layers: all three"] = [ByGroup("layer", parts)]
    return found


def row(device: str, engine: str, budget: float, name: str, techniques: Sequence[Technique]) -> Numbers:
    """Return one point."""
    p = predict(MODEL, device, REQUEST, techniques=techniques, engine=engine)
    full = predict(MODEL, device, REQUEST, techniques=techniques, engine=engine, batch=float(max(p.max_batch, 1)))
    return {
        "device": device,
        "engine": engine,
        "operator": name,
        "budget": budget,
        "kv_gb": p.memory.kv_bytes / 1e9,
        "host_kv_gb": p.memory.host_kv_bytes / 1e9,
        "ttft_s": float(p.ttft_s),
        "tpot_ms": float(p.tpot_s) * 1e3,
        "max_batch": p.max_batch,
        "tokens_per_s": decode_rate(full),
        "quality": quality(budget) if name.startswith("heads") else (None if techniques else 1.0),
    }


def decode_rate(prediction: Prediction) -> float:
    """Return the tokens a second of a batch while it decodes."""
    return float(prediction.query.batch) / float(prediction.tpot_s)


def quality(budget: float) -> float | None:
    """Return what is published of pruning and retrieving by head; None where nothing is."""
    method = technique("hybridkv", keep=budget)
    assert isinstance(method, Published)  # noqa: S101 - it is a file of the catalogue
    return quality_of(method).retention


def numbers(smoke: bool) -> Numbers:  # noqa: FBT001 - the size, as the command line has it
    """Return all points, the uncompressed ones first, and the survey's beside ours."""
    rows = [row(d, e, 1.0, "none", []) for d in DEVICES for e in ENGINES]
    budgets = SMOKE if smoke else BUDGETS
    for device in DEVICES:
        for engine in ENGINES:
            for budget in budgets:
                rows += [row(device, engine, budget, n, t) for n, t in operators(budget, engine).items()]
    published = []
    for budget, (kv_gb, tpot_ms) in TABLE_8.items():
        name = "heads: prune + retrieve" if budget < 1.0 else "none"
        ours = row("l40s-48gb", "hf-eager", budget, name, operators(budget, "hf-eager").get(name, []))
        published.append({"budget": budget, "kv_gb": kv_gb, "tpot_ms": tpot_ms, "ours": ours})
    return {"model": MODEL, "rows": rows, "table_8": published, "winners": list(winners(rows))}


def winners(rows: Sequence[Numbers]) -> Iterator[Numbers]:
    """Yield the operators within `CLOSE` of the best, by device, engine, budget and number."""
    compressed = [r for r in rows if r["operator"] != "none" and r["budget"] < 1.0]
    for key, group in groupby(compressed, key=lambda r: (r["device"], r["engine"], r["budget"])):
        same = list(group)
        for metric in METRICS:
            best = (max if metric in MORE_IS_BETTER else min)(r[metric] for r in same)
            who = [r["operator"] for r in same if abs(r[metric] - best) <= CLOSE * best]
            spread = max(r[metric] for r in same) / min(r[metric] for r in same)
            where = dict(zip(("device", "engine", "budget"), key, strict=True))
            yield {**where, "metric": metric, "best": who, "among": len(same), "spread": spread}


def points(found: Numbers) -> str:
    """Return the table of chosen budgets."""
    columns = ("device", "engine", "budget", "operator", "device GB", "host GB", "TTFT s", "TPOT ms", "batch")
    rows = []
    for r in found["rows"]:
        if r["operator"] == "none" or r["budget"] == SHOWN:
            head = (r["device"], r["engine"], f"{r['budget']:.0%}", r["operator"])
            held = (f"{r['kv_gb']:.2f}", f"{r['host_kv_gb']:.2f}", f"{r['ttft_s']:.2f}", f"{r['tpot_ms']:.1f}")
            kept = "unknown" if r["quality"] is None else f"{r['quality']:.3f}"
            rows.append((*head, *held, f"{r['max_batch']}", f"{r['tokens_per_s']:.0f}", kept))
    return markdown((*columns, "tokens/s at it", "quality kept"), rows)


def winners_table(found: Numbers) -> str:
    """Return who wins, a row a device, engine and number."""
    tabled = [w for w in found["winners"] if w["budget"] in TABLED]
    cells: dict[tuple[str, ...], list[str]] = {}
    for w in tabled:
        who = "all" if len(w["best"]) == w["among"] else " ".join(CODES[name] for name in w["best"])
        cells.setdefault((w["device"], w["engine"], NAMES[w["metric"]]), []).append(f"{who} ({w['spread']:.2f}x)")
    budgets = [f"{b:.0%}" for b in sorted({w["budget"] for w in tabled})]
    return markdown(("device", "engine", "number", *budgets), [(*key, *row) for key, row in cells.items()])


def report(found: Numbers) -> str:
    """Return the page."""
    rows = {(r["device"], r["engine"], r["budget"], r["operator"]): r for r in found["rows"]}
    where = ("h100-sxm5-80gb", "vllm")
    low = min(r["budget"] for r in found["rows"])
    gain = 1.0 - rows[(*where, low, "prune")]["tpot_ms"] / rows[(*where, 1.0, "none")]["tpot_ms"]
    table_8 = [
        (f"{r['budget']:.0%}", f"{r['kv_gb']}", f"{o['kv_gb']:.2f}", f"{r['tpot_ms']}", f"{o['tpot_ms']:.1f}", error)
        for r in found["table_8"]
        for o, error in [(r["ours"], f"{r['ours']['tpot_ms'] / r['tpot_ms'] - 1:+.0%}")]
    ]
    columns = ("budget", "GB published", "GB ours", "ms/token published", "ms/token ours", "error")
    return HYBRID.format(
        model=MODEL,
        floor=FLOOR,
        group=GROUP,
        codes="; ".join(f"{code} {name}" for name, code in CODES.items()),
        close=CLOSE,
        points=points(found),
        winners=winners_table(found),
        table_8=markdown(columns, table_8),
        generated=int(REQUEST.output_tokens),
        gain=gain,
    )


def draw(found: Numbers, path: Path) -> None:
    """Draw TPOT and largest batch over the budget, with the published points."""

    def paint(axes: Sequence[Axes]) -> None:
        chosen = ("prune", "quantise", "retrieve, device", "retrieve, host, each step", "heads: prune + retrieve")
        kinds = (("l40s-48gb", "hf-eager", "tpot_ms"), ("h100-sxm5-80gb", "vllm", "tpot_ms"))
        for one, (device, engine, metric) in zip(axes, (*kinds, ("h100-sxm5-80gb", "vllm", "max_batch")), strict=True):
            for name, marker in zip(chosen, "osv^x", strict=True):
                line = [r for r in found["rows"] if (r["device"], r["engine"], r["operator"]) == (device, engine, name)]
                one.plot([r["budget"] for r in line], [r[metric] for r in line], marker=marker, ms=4, label=name)
            one.set(xlabel="budget read by a step", ylabel=metric.replace("_", " "), title=f"{device}, {engine}")
            one.grid(visible=True, color="0.92")
        shown = found["table_8"]
        axes[0].plot([r["budget"] for r in shown], [r["tpot_ms"] for r in shown], "k*", ms=10, label="survey, Table 8")
        axes[0].legend(fontsize=7)

    panels(path, 3, paint)


if __name__ == "__main__":
    write("hybrid_compression", numbers, report, draw)
