"""Co-design: techniques, widths of numbers and a device for each stage of one workload.

Qwen2.5-VL-7B answers a question about a video. Encoding, prefill and decoding each run on a pool of one kind of device;
embeddings and cache go from pool to pool over a stated link. Everything runs on one kind, with one copy of the weights,
for comparison. Nothing queues: pools are as large as their load, and all times are those of a request that never waits.

    python -m studies.frontiers.codesign
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

from costmodel import Precision, load_hardware, technique
from costmodel.hardware import HardwareProfile
from costmodel.quality import quality_dict
from costmodel.techniques import Technique
from studies.frontiers.common import Numbers, markdown, panels, write
from studies.frontiers.pools import ENGINE, MODEL, OUTPUT_TOKENS, TPOT_S, Stages, apart, together, usd
from studies.frontiers.texts import CODESIGN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEVICES: Final = ("l40s-48gb", "a100-sxm4-80gb", "h100-sxm5-80gb", "h200-sxm-141gb")
"""Devices with both measured kernels and a public price."""
SMOKE_DEVICES: Final = ("l40s-48gb", "h100-sxm5-80gb")
LINKS: Final[Mapping[str, float]] = {"RDMA": 20e9, "TCP": 912 * 2.0**20}
"""Bytes a second: 500 MB of embeddings in 25 ms (SGLang, pull request 19575), and reads of the Mooncake store over TCP
(its pull request 47302)."""
TTFT_S: Final = 1.5
"""Target, assumed: without the host's part, which is the same everywhere [s]."""
PREFILL_WIDTHS: Final = {"16 bits": Precision(), "8 bits": Precision(weight_bits=8, activation_bits=8)}
DECODE_WIDTHS: Final = {"16 bits": Precision(), "4-bit weights": Precision(weight_bits=4)}
EVERY_WIDTH: Final = {**PREFILL_WIDTHS, **DECODE_WIDTHS}


def sets() -> Mapping[str, list[Technique]]:
    """Return the sets of techniques: none, one by each stage that it relieves, and together."""
    half, dropped = technique("resize", pixels=0.5), technique("timechat")
    cache = technique("hybridkv")
    return {
        "none": [],
        "half the pixels": [half],
        "TimeChat-Online": [dropped],
        "HybridKV 20 %": [cache],
        "TimeChat-Online, HybridKV": [dropped, cache],
        "all three": [half, dropped, cache],
    }


def tables(devices: Sequence[HardwareProfile]) -> dict[tuple[str, str, str], Stages]:
    """Return every set on every device at every width that the device has."""
    found = {}
    for (name, given), device, (width, precision) in product(sets().items(), devices, EVERY_WIDTH.items()):
        if precision.activation_bits >= 16 or device.peak_flops_per_s.keys() & {"fp8", "int8"}:  # noqa: PLR2004
            found[name, device.name, width] = Stages.of(device, given, precision)
    return found


def plans(found: Mapping[tuple[str, str, str], Stages], devices: Sequence[str], link: str) -> Iterator[Numbers]:
    """Yield every plan, on one kind of device and apart."""
    for name in sets():
        for device, width in product(devices, EVERY_WIDTH):
            whole = together(found[name, device, width])
            if whole:
                yield {"set": name, "kind": "together", "devices": [device] * 3, "widths": [width] * 2, **whole}
        for (e, p, d), wide, narrow in product(product(devices, repeat=3), PREFILL_WIDTHS, DECODE_WIDTHS):
            parts = (found[name, e, "16 bits"], found[name, p, wide], found[name, d, narrow])
            plan = apart(*parts, LINKS[link])
            if plan:
                yield {"set": name, "kind": "apart", "devices": [e, p, d], "widths": [wide, narrow], **plan}


def cheapest(plans: Iterable[Numbers], *, ttft_s: float = math.inf) -> Numbers | None:
    """Return the plan that costs least among those that answer in time."""
    return min((p for p in plans if p["ttft_s"] <= ttft_s), key=lambda p: p["usd"], default=None)


def numbers(smoke: bool) -> Numbers:  # noqa: FBT001 - the size, as the command line has it
    """Return the best plans of every set, together and apart, and what a slower link does to them."""
    names = SMOKE_DEVICES if smoke else DEVICES
    stages = tables([load_hardware(name) for name in names])
    every = {link: list(plans(stages, names, link)) for link in LINKS}
    best = []
    for name, link in product(sets(), LINKS):
        mine = [p for p in every[link] if p["set"] == name]
        for kind in ("together", "apart"):
            for target in (math.inf, TTFT_S):
                found = cheapest((p for p in mine if p["kind"] == kind), ttft_s=target)
                best.append({"set": name, "link": link, "kind": kind, "target_ttft_s": target, "plan": found})
    host_s = stages["none", names[0], "16 bits"].seconds("preprocess")
    quality = {n: (quality_dict(given) or {"retention": 1.0})["retention"] for n, given in sets().items()}
    scatter = [{k: p[k] for k in ("set", "kind", "ttft_s", "usd")} for p in pareto(every["RDMA"])]
    tokens = stages["none", names[0], "16 bits"].one.tokens
    return {"tokens": tokens, "host_s": host_s, "quality": quality, "best": best, "frontier": scatter} | {
        "devices": {n: stage_row(stages["none", n, "16 bits"], stages["none", n, "4-bit weights"]) for n in names}
    }


def stage_row(wide: Stages, narrow: Stages) -> Numbers:
    """Return what each stage takes and costs on a device, without techniques."""
    found: Numbers = {"encode_s": wide.seconds("encode", "adapt"), "prefill_s": wide.seconds("prefill")}
    found |= {f"{stage}_usd": usd(wide.device, found[f"{stage}_s"]) for stage in ("encode", "prefill")}
    for name, stages in (("decode", wide), ("decode_4_bit", narrow)):
        batch = stages.batch(alone=True)
        steps_s = (OUTPUT_TOKENS - 1) * stages.token_s(batch) if batch else math.inf
        found |= {f"{name}_batch": batch, f"{name}_usd": usd(stages.device, steps_s / max(batch, 1))}
    return found


def pareto(plans: Iterable[Numbers]) -> list[Numbers]:
    """Return the plans that no other one of their kind and set beats in both TTFT and cost, by TTFT."""
    kept: list[Numbers] = []
    least: dict[tuple[str, str], float] = {}
    for plan in sorted(plans, key=lambda p: (p["ttft_s"], p["usd"])):
        key = (plan["set"], plan["kind"])
        if plan["usd"] < least.get(key, math.inf):
            least[key] = plan["usd"]
            kept.append(plan)
    return kept


def short(name: str) -> str:
    """Return a device without the size of its memory."""
    return name.split("-", maxsplit=1)[0].upper()


def best_table(found: Numbers, link: str) -> str:
    """Return the cheapest plans by set."""
    rows = []
    for b in found["best"]:
        if b["link"] == link and not (link == "TCP" and b["kind"] == "together"):
            target = "any" if b["target_ttft_s"] is None else f"{b['target_ttft_s']:g} s"
            plan, kept = b["plan"], found["quality"][b["set"]]
            head = (b["set"], "unknown" if kept is None else f"{kept:.3f}", target, b["kind"])
            rows.append((*head, *(plan_cells(plan) if plan else ["none"] + ["-"] * 6)))
    columns = ("techniques", "quality kept", "TTFT", "stages", "encode, prefill, decode", "widths, prefill / decode")
    return markdown((*columns, "TTFT s", "TPOT ms", "batch", "to second token ms", "USD for 1,000"), rows)


def plan_cells(plan: Numbers) -> list[str]:
    """Return a plan as cells."""
    where = ", ".join(dict.fromkeys(map(short, plan["devices"]))) if plan["kind"] == "together" else None
    times = [f"{plan['ttft_s']:.2f}", f"{plan['tpot_s'] * 1e3:.1f}", f"{plan['batch']}"]
    names = where or ", ".join(map(short, plan["devices"]))
    ends = [f"{plan['second_token_s'] * 1e3:.0f}", f"{plan['usd'] * 1e3:.3f}"]
    return [names, " / ".join(plan["widths"]), *times, *ends]


def stage_table(found: Numbers) -> str:
    """Return what stages take and cost by device."""
    rows = []
    for name, r in found["devices"].items():
        prices = (r["encode_usd"], r["prefill_usd"], r["decode_usd"], r["decode_4_bit_usd"])
        cells = ["-" if price is None else f"{price * 1e3:.3f}" for price in prices]
        batches = f"{r['decode_batch']} / {r['decode_4_bit_batch']}"
        rows.append((short(name), f"{r['encode_s']:.2f}", f"{r['prefill_s']:.2f}", batches, *cells))
    columns = ("device", "encode s", "prefill s", "decoding batch, 16 / 4 bits", "USD for 1,000: encode", "prefill")
    return markdown((*columns, "decode", "decode, 4-bit weights"), rows)


def report(found: Numbers) -> str:
    """Return the page."""
    return CODESIGN.format(
        model=MODEL,
        engine=ENGINE,
        tokens=found["tokens"]["visual"],
        output=OUTPUT_TOKENS,
        host=found["host_s"],
        tpot=TPOT_S * 1e3,
        stages=stage_table(found),
        rdma=best_table(found, "RDMA"),
        tcp=best_table(found, "TCP"),
        rdma_gb=LINKS["RDMA"] / 1e9,
        tcp_gb=LINKS["TCP"] / 1e9,
    )


def draw(found: Numbers, path: Path) -> None:
    """Draw the frontiers of TTFT and cost."""

    def paint(axes: Sequence[Axes]) -> None:
        for one, kind in zip(axes, ("together", "apart"), strict=True):
            for name, marker in zip(found["quality"], "osv^xd", strict=True):
                line = [p for p in found["frontier"] if (p["set"], p["kind"]) == (name, kind)]
                one.plot([p["ttft_s"] for p in line], [p["usd"] * 1e3 for p in line], marker=marker, ms=4, label=name)
            one.set(xlabel="TTFT without the host [s]", ylabel="USD for 1,000 requests", title=f"stages {kind}")
            one.set(xlim=(0.0, most("ttft_s")), ylim=(0.0, most("usd") * 1e3))
            one.grid(visible=True, color="0.92")
        axes[0].legend(fontsize=7)

    def most(key: str) -> float:
        return 1.05 * max(float(p[key]) for p in found["frontier"])

    panels(path, 2, paint)


if __name__ == "__main__":
    write("codesign", numbers, report, draw)
