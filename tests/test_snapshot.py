"""A snapshot of about a hundred predictions: a change that moves one is made on purpose, or found here.

`python -m tests.test_snapshot --regenerate` from the root of the repository writes it anew; say why in CHANGELOG.md.
"""

import json
import sys

import pytest

from costmodel import (
    Image,
    Parallelism,
    Precision,
    Video,
    Workload,
    engine_names,
    hardware_names,
    model_names,
    predict,
)
from tests.helpers import GOLDENS

FILE = GOLDENS / "predictions.json"
REGENERATE = "python -m tests.test_snapshot --regenerate"
FIELDS = ("ttft_s", "tpot_s", "peak_bytes", "max_batch", "energy_j")
DIGITS, TOLERANCE = 9, 1e-6

WORKLOADS = {
    "text": Workload(text_tokens=500, output_tokens=200),
    "one image": Workload(images=[Image(1920, 1080)], text_tokens=64, output_tokens=150),
    "six photographs": Workload(images=[Image(4032, 3024)] * 6, text_tokens=32, output_tokens=10),
    "long text": Workload(images=[Image(640, 480)], text_tokens=30_000, output_tokens=1000),
    "video": Workload(videos=[Video(1280, 720, 30.0, 24.0)], text_tokens=64, output_tokens=128),
}
MODELS, DEVICES, ENGINES = model_names(), hardware_names(), engine_names()


def cases():
    """Return the settings of every prediction by its name in the file."""
    found = {}

    def add(model, device, engine, workload, **settings):
        words = [f"{key}={value}" for key, value in settings.items()]
        found[" | ".join([model, device, engine, workload, *words])] = (model, device, engine, workload, settings)

    for model in MODELS:
        for engine in ENGINES:
            add(model, "h100-sxm5-80gb", engine, "one image")
        add(model, "a100-sxm4-80gb", "fused", "six photographs")
        add(model, "a100-sxm4-80gb", "fused", "text", batch=32)
        add(model, "h200-sxm-141gb", "fused", "long text", batch=4)
        add(model, "h100-sxm5-80gb", "fused", "one image", tp=2)
        add(model, "h100-sxm5-80gb", "fused", "one image", tp=4, encoder_tp=1, batch=8)
        add(model, "h100-sxm5-80gb", "fused", "one image", bits="8-8-8")
        add(model, "a100-sxm4-80gb", "fused", "one image", bits="4-16-4", batch=16)
        if not model.startswith("llava"):
            add(model, "a100-sxm4-80gb", "fused", "video", batch=2)
    for device in DEVICES:
        for workload in ("one image", "text"):
            add("qwen2.5-vl-7b", device, "fused", workload)
            add("llava-1.5-7b", device, "fused", workload, batch=8)
    return found


CASES = cases()


def predicted(model, device, engine, workload, settings):
    """Return the numbers of one prediction."""
    bits = settings.get("bits", "16-16-16").split("-")
    p = predict(
        model,
        device,
        WORKLOADS[workload],
        engine=engine,
        batch=settings.get("batch", 1),
        precision=Precision(*map(int, bits)),
        parallelism=Parallelism(tp=settings.get("tp", 1), encoder_tp=settings.get("encoder_tp")),
    )
    return {
        "ttft_s": p.ttft_s,
        "tpot_s": p.tpot_s,
        "peak_bytes": p.memory.peak_bytes,
        "max_batch": p.max_batch,
        "energy_j": p.energy_j,
    }


def rounded(values):
    return {field: float(f"{values[field]:.{DIGITS}g}") for field in FIELDS}


def load_snapshot():
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def test_the_snapshot_has_every_case_and_no_other():
    assert sorted(load_snapshot()) == sorted(CASES), f"cases changed: {REGENERATE}, and say why in CHANGELOG.md"


@pytest.mark.parametrize("name", sorted(load_snapshot()))
def test_prediction_is_that_of_the_snapshot(name):
    if name not in CASES:
        pytest.fail(f"no such case any more: {REGENERATE}")
    kept, now = load_snapshot()[name], predicted(*CASES[name])
    moved = [
        f"{field} {kept[field]:.7g} -> {now[field]:.7g}"
        for field in FIELDS
        if now[field] != pytest.approx(kept[field], rel=TOLERANCE, abs=0.0)
    ]
    assert not moved, f"{'; '.join(moved)}. If this is meant: {REGENERATE}, and say why in CHANGELOG.md"


def main(arguments):
    """Write the snapshot anew, when told so in full."""
    if arguments != ["--regenerate"]:
        sys.exit(f"usage: {REGENERATE}")
    snapshot = {name: rounded(predicted(*case)) for name, case in CASES.items()}
    FILE.write_text(json.dumps(snapshot, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(snapshot)} predictions in {FILE}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
