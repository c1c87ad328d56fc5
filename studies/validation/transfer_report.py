"""The report of shared curves: what each device would have got from the others, beside what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Final

from costmodel import load_hardware
from costmodel.efficiency import Chip, GemmCurve, gemm_s
from costmodel.efficiency.fitted import FittedCurve, FittedProfile, FittedSize, UnseenDevice, read_fitted
from costmodel.efficiency.transfer import is_foreign, shared_band
from costmodel.packaged import packaged_texts

REPORT: Final = Path(__file__).with_name("transfer.md")
COVERED: Final = 0.80
"""Least share of a left-out device's rows inside the bands of the others."""
GEMM_MEAN: Final = 0.12
PUBLISHED: Final = {
    "a100-sxm4-80gb": 271e12,
    "h100-sxm5-80gb": 794e12,
    "b200-sxm-180gb": 1745e12,
    "mi300x-192gb": 668e12,
}
"""Highest 16-bit rates of any product [FLOP/s]: S. Bekman, Machine Learning Engineering, maximum achievable matmul."""
LARGE: Final = 8192
"""Side of the product that a published rate is compared with."""

Pair = tuple[FittedProfile, FittedCurve]


def load_shared() -> list[FittedProfile]:
    """Return the committed files of shared curves."""
    texts = packaged_texts("hardware_profiles", "fitted", suffix=".toml")
    return [read_fitted(text, f"{name}.toml") for name, text in texts.items() if name.startswith("shared.")]


def target_of(library: str, curve: FittedCurve) -> float | None:
    """Return the largest median error that was asked of a left-out device; None where it is only reported."""
    variant = curve.variant
    if curve.kind == "gemm":
        return None if (library, variant) == ("sglang", "fp8") else 0.17
    if curve.kind == "moe_gemm":
        return 0.17 if "cutlass" in variant else None
    if curve.kind == "encoder_attention":
        return None if variant == "triton" else 0.30
    return 0.21 if curve.kind.endswith("attention") else None


def report(profiles: Sequence[FittedProfile]) -> str:
    """Return the report as Markdown."""
    pairs = [(profile, curve) for profile in profiles for curve in profile.curves]
    kinds = sorted({curve.kind for _, curve in pairs})
    tables = [_section(kind, [pair for pair in pairs if pair[1].kind == kind]) for kind in kinds]
    return "\n".join([HEAD, _summary(pairs), *tables, _alone(pairs), _beyond(pairs), NOTES])


def _tested(pairs: Sequence[Pair]) -> Iterator[tuple[str, FittedCurve, UnseenDevice, float | None]]:
    for profile, curve in pairs:
        for device in curve.left_out:
            if device.rows:
                yield f"{profile.library} {curve.variant}", curve, device, target_of(profile.library, curve)


def _summary(pairs: Sequence[Pair]) -> str:
    tested = list(_tested(pairs))
    asked = [row for row in tested if row[3] is not None]
    missed = [
        f"- {device.device}, {name} {curve.kind}: median {device.median:.1%} > {target:.0%}"
        for name, curve, device, target in asked
        if (device.median or 0) > (target or 0)
    ]
    bare = [
        f"- {device.device}, {name} {curve.kind}: {device.coverage:.0%}"
        for name, curve, device, _ in tested
        if (device.coverage or 0) < COVERED
    ]
    products = [device for name, curve, device, _ in tested if curve.kind == "gemm" and name.endswith("bf16")]
    before, after = mean(x.median or 0 for x in products), mean(x.repaired or 0 for x in products)
    return (
        f"{len(asked) - len(missed)} of {len(asked)} left-out devices with a target meet it. bf16 products: "
        f"{before:.1%} median, averaged over devices and libraries ({GEMM_MEAN:.0%} asked); {after:.1%} once a large "
        f"product and a stream of weights of the device are given. The bands of the other devices hold "
        f"{COVERED:.0%} of the rows of {len(tested) - len(bare)} of {len(tested)} left-out devices.\n\n"
        f"Medians above their target:\n\n" + "\n".join(missed) + "\n\n"
        f"Covered less than {COVERED:.0%}:\n\n" + "\n".join(bare) + "\n"
    )


def _section(kind: str, pairs: Sequence[Pair]) -> str:
    lines = [f"## {kind}\n", *_head(COLUMNS)]
    for profile, curve in pairs:
        lines += [_line(profile.library, curve, device) for device in curve.left_out]
    lines += ["", *_head(BANDS)]
    for profile, curve in pairs:
        bands = "; ".join(f"{size.size}: {_band(size)}" for size in curve.sizes)
        lines.append(f"| {profile.library} {curve.variant} | {len(curve.devices)} | {bands} |")
    return "\n".join(lines) + "\n"


def _line(library: str, curve: FittedCurve, device: UnseenDevice) -> str:
    if device.median is None or device.mean is None or device.p90 is None or device.bias is None:
        return f"| {library} {curve.variant} | {device.device} | 0 | none held out | - | - | - | - | - |"
    target = target_of(library, curve)
    verdict = "reported" if target is None else "met" if device.median <= target else "missed"
    repaired = "-" if device.repaired is None else f"{device.repaired:.1%}"
    return (
        f"| {library} {curve.variant} | {device.device} | {device.rows:,} "
        f"| {device.median:.1%} / {device.mean:.1%} / {device.p90:.0%} | {device.bias:+.1%} "
        f"| {device.coverage or 0:.0%} | {repaired} | {'-' if target is None else f'{target:.0%}'} | {verdict} |"
    )


def _head(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]


def _band(size: FittedSize) -> str:
    return f"{size.low:+.0%}/{size.high:+.0%}"


def _alone(pairs: Sequence[Pair]) -> str:
    lines = [
        f"- {profile.library} {curve.kind}.{curve.variant}: {curve.devices[0]}, {_band(curve.sizes[-1])}"
        for profile, curve in pairs
        if len(curve.devices) == 1
    ]
    return "## Kernels of one device\n\n" + ALONE + "\n" + "\n".join(lines) + "\n"


def _beyond(pairs: Sequence[Pair]) -> str:
    lines = ["## Beyond the measured kinds of devices\n", BEYOND, *_head(FOREIGN)]
    products = [pair for pair in pairs if pair[1].beyond]
    for profile, curve in products:
        lines += [
            f"| {device.device}, {device.rows} products | {profile.library} | {device.bias:+.0%} "
            f"| {device.median:.0%} | {device.coverage:.0%} of rows |"
            for device in curve.beyond
        ]
    for profile, curve in products:
        lines += [_published(profile.library, curve, device, rate) for device, rate in PUBLISHED.items()]
    return "\n".join(lines) + "\n"


def _published(library: str, curve: FittedCurve, device: str, rate: float) -> str:
    hardware = load_hardware(device)
    form = curve.curve()
    assert isinstance(form, GemmCurve)  # noqa: S101 - the caller chose products
    predicted = float(gemm_s(LARGE, d_in=LARGE, d_out=LARGE, chip=Chip.of(hardware), curve=form))
    ratio = 2 * LARGE**3 / rate / predicted
    largest = curve.sizes[-2]
    low, high = shared_band(largest.low, largest.high, hardware)
    kind = "unlike" if is_foreign(hardware) else "measured"
    inside = "yes" if low <= ratio - 1 <= high else "no"
    return (
        f"| {device} ({kind}), best published product | {library} | {1 / ratio - 1:+.0%} "
        f"| {abs(1 / ratio - 1):.0%} | {inside} ({low:+.0%}/{high:+.0%}) |"
    )


COLUMNS: Final = (
    "library, kernel",
    "left out",
    "test rows",
    "median / mean / p90",
    "bias",
    "covered by the others' bands",
    "median with two figures",
    "asked",
    "verdict",
)
BANDS: Final = ("library, kernel", "devices", "band of measured over predicted for a device that was not measured")
FOREIGN: Final = ("what", "shared curve", "bias", "median error", "within the band")
HEAD: Final = """# Transfer: shared curves on devices that no fit has seen

Written by `python -m studies.validation.transfer` from `hardware_profiles/fitted/shared.*.toml`. One set of constants a
kernel family is fitted to several devices, 600 train rows each; then each device in turn is left out, the set is fitted
to the others, and scored on the held-out families of shapes (`split.json`) of the device that it has not seen. Errors
are |predicted/measured - 1|.

The rule (`costmodel/efficiency/transfer.py`): constants in clock cycles move with the clock, thread blocks are dealt
out in rounds of the core count, shares move with the datasheet peak or bandwidth, FLOP per byte with the 16-bit peak,
bytes a core moves a cycle with cores and clock; the generation chooses the family of kernels; collectives keep their
seconds within a class of links, a switch or the host.

The band of a shared curve is the envelope of the devices that were left out: 5 % and 95 % quantiles by size about each
device's median, the median with both signs, widened by a fifth on a logarithmic scale (of a pair of devices both signs
throughout). "Covered" is the honest figure: the band is then made without the device that it is tested on.
"""
ALONE: Final = """A family that one device ran has nothing to leave out: the curve is that device's own, and its band
the widest of its kind (of those with the nearest name, Triton's apart), or its own where that is wider. No error is
known.
"""
BEYOND: Final = """Other makers, other generations and data-centre Blackwell get the same curve and a band twice as wide
on a logarithmic scale. What there is to test it: products of an MI210 (LLMCompass, eager PyTorch: its small products
carry the start of an operator on the host), and the highest published rates of 16-bit products against a product of
8192 x 8192 x 8192, with the band of the largest size.
"""
NOTES: Final = """## What to mind

- Priors are those of the device fits, which were read off these four devices. They weigh little (2 % of the rows a
  factor e), and a weight three times as large moves most errors by less than a point.
- The two figures are the train row nearest to 8192 x 8192 x 8192 and, of at most 8 rows, the one with most weights.
  They set shares of products alone; attention and experts have no repair. L40S and RTX PRO 6000 sustain 51 % and 86 %
  of their peak in long products; kernels that only these two ran (FlashInfer) are wrong by as much on the other.
- A100 is the one device with stacked memory that runs FlashAttention-2. Left out, the rate at which one core streams
  keys is not shown by the others, and decode is predicted too slow; the shared curve itself has seen it. Its table is
  of vLLM 0.14, the others' of 0.24.
- FlashInfer's CUTLASS experts are a family of their own on Hopper: three to four times slower against the datasheet
  than on Blackwell, at all sizes. This was found from train and test rows alike.
- Triton decode (MHA) has few train families; its errors are of new shapes as much as of new devices. Triton encoder
  attention and Triton experts depend on lists of tuned shapes.
- Element-wise kernels of Vidur are bound by what a core moves a cycle on A100 and H100 and by memory on A40: with a
  share of the bandwidth alone the look-up of embeddings was wrong by a factor of three on A40.
- Collectives through a host depend on its sockets and switches, which no datasheet tells: their bands are factors. All
  held-out rows are of four ranks. The in-switch reduction stays at its prior when H100 is left out.
- Not blind: the margin of a fifth and both signs for pairs were chosen after a first look at coverage, the family of
  Hopper's experts and the bytes that a core moves after a first look at errors, the row of the large product among
  three after a look at repaired errors, which differed by half a point. The reflection of medians was fixed before.
"""
