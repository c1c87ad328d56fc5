"""Figure 4 of the survey: stage intensities on an A100 at FP16, ours beside the paper's.

The paper draws encode at about 1200, prefill at about 160 (512 tokens) and decode at about 1 FLOP/byte, against a ridge
of 153, and does not name the model. Here: LLaVA-1.5-7B, one 336x336 image, and 512 prompt tokens for prefill. Ours
counts every byte that the operators move; two simpler counts stand beside it, because they bracket the paper's values.

    python -m studies.paper.figure4 -o studies/paper
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from costmodel import Image, Prediction, Workload, load_hardware, predict
from costmodel.equations import decode_intensity_flops_per_byte, ridge_flops_per_byte

PAPER = {"encode": 1200.0, "prefill": 160.0, "decode": 1.0}
MODEL, DEVICE = "llava-1.5-7b", "a100-sxm4-80gb"
PROMPT_TOKENS = 512


def rows() -> list[dict[str, Any]]:
    """Return a row a stage: our intensity, its parts, and the paper's value."""
    image = Workload(images=[Image(336, 336)], text_tokens=1, output_tokens=2)
    text = Workload(text_tokens=PROMPT_TOKENS, output_tokens=2)
    encode = predict(MODEL, DEVICE, image, engine="ideal")
    prefill = predict(MODEL, DEVICE, text, engine="ideal")
    return [row("encode", encode), row("prefill", prefill), row("decode", prefill)]


def row(name: str, prediction: Prediction) -> dict[str, Any]:
    """Return one stage."""
    stage = prediction.stages[name]
    device = prediction.hardware
    ridge = ridge_flops_per_byte(device.peak_flops_per_s["bf16"], device.memory_bandwidth_bytes_per_s)
    ours = stage.intensity_flops_per_byte
    return {
        "stage": name,
        "ours_flops_per_byte": ours,
        "ours_weights_alone_flops_per_byte": stage.flops / stage.weight_bytes,
        "paper_flops_per_byte": PAPER[name],
        "ridge_flops_per_byte": ridge,
        "ours_bound": "compute" if ours > ridge else "memory",
        "paper_bound": "compute" if PAPER[name] > ridge else "memory",
    }


EXPLANATION = """
Same side of the ridge for every stage. The paper's values are approximate and its model is not named.

Encode: 577 rows read each two-byte weight once, so with weights alone the intensity is about the row count; the
activations that pass through memory between operators bring it down. 1200 is what about 1,200 rows over weights alone
would give: two such images in one pass.

Prefill: {rows} rows over two-byte weights give at most {rows} FLOP/byte; activations and the cache take their share.
160 would be the intensity of 160 rows over weights alone; it lies just above the ridge.

Decode: Eq. 11 gives {decode:g}; ours adds the cache and the activations of one row.
"""


def report(found: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown, the difference explained."""
    lines = [
        f"| {r['stage']} | {r['ours_flops_per_byte']:.1f} | {r['ours_weights_alone_flops_per_byte']:.1f} "
        f"| {r['paper_flops_per_byte']:g} | {r['ours_bound']} / {r['paper_bound']} |"
        for r in found
    ]
    title = f"# Figure 4: {MODEL} on {DEVICE}, FP16 [FLOP/byte], ridge {found[0]['ridge_flops_per_byte']:.1f}\n"
    head = "| stage | ours | ours, weights alone | paper | side of the ridge (ours / paper) |"
    decode = float(decode_intensity_flops_per_byte(1.0))
    return "\n".join([title, head, "| --- " * 5 + "|", *lines, EXPLANATION.format(rows=PROMPT_TOKENS, decode=decode)])


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the roofline with both sets of points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    device = load_hardware(DEVICE)
    peak, bandwidth = device.peak_flops_per_s["bf16"], device.memory_bandwidth_bytes_per_s
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    xs = [0.1, peak / bandwidth, 1e4]
    axes.loglog(xs, [min(peak, bandwidth * x) / 1e12 for x in xs], color="black", label="roof: 312 TFLOP/s, 2,039 GB/s")
    series = (("paper_flops_per_byte", "s", "paper, approximate"), ("ours_flops_per_byte", "o", "ours"))
    for key, marker, label in series:
        x = [r[key] for r in found]
        axes.loglog(x, [min(peak, bandwidth * v) / 1e12 for v in x], marker, markersize=9, label=label)
    for r in found:
        x = r["ours_flops_per_byte"]
        axes.annotate(r["stage"], (x, min(peak, bandwidth * x) / 1e12), xytext=(6, -14), textcoords="offset points")
    axes.axvline(peak / bandwidth, linestyle=":", color="grey")
    axes.annotate(f"ridge {peak / bandwidth:.1f}", (peak / bandwidth, 0.3), xytext=(4, 0), textcoords="offset points")
    axes.set(xlabel="intensity [FLOP/byte]", ylabel="attainable [TFLOP/s]", title=f"{MODEL} on {DEVICE}, FP16")
    axes.legend(loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Write figure4.svg, figure4.json and figure4.md into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("studies/paper"))
    output = parser.parse_args().output
    found = rows()
    output.mkdir(parents=True, exist_ok=True)
    (output / "figure4.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "figure4.md").write_text(report(found), encoding="utf-8")
    draw(found, output / "figure4.svg")
    print(report(found))


if __name__ == "__main__":
    main()
