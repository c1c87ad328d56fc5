"""A snapshot of some 150 predictions: a change that moves one is made on purpose, or found here.

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
    load_model,
    model_names,
    predict,
)
from tests.helpers import GOLDENS
from tests.kinds import CROSS, GROUPED, KINDS, MULTI_HEAD, TILED, WITH_EXPERTS

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
A100, H100, H200 = "a100-sxm4-80gb", "h100-sxm5-80gb", "h200-sxm-141gb"


def one_a_family():
    """Return a model of every family: one that the tests of kinds use, or else the first by name."""
    known = model_names()
    first = {load_model(name).family: name for name in reversed(known)}
    return sorted((first | {load_model(name).family: name for name in reversed(KINDS)}).values())


def cases():
    """Return the settings of every prediction by its name in the file."""
    found = {}

    def add(model, device, engine, workload, **settings):
        words = [f"{key}={value}" for key, value in settings.items()]
        found[" | ".join([model, device, engine, workload, *words])] = (model, device, engine, workload, settings)

    for model in one_a_family():
        add(model, H100, "fused", "one image" if load_model(model).media else "text")
        add(model, A100, "fused", "text", batch=32)
    for model in KINDS:
        for engine in sorted({*engine_names()} - {"fused"}):
            add(model, H100, engine, "one image")
        add(model, A100, "fused", "six photographs")
        add(model, H200, "fused", "long text", batch=4)
        add(model, H100, "fused", "one image", tp=2)
        add(model, H100, "fused", "one image", bits="8-8-8")
        add(model, A100, "fused", "one image", bits="4-16-4", batch=16)
    for device in hardware_names():
        add(GROUPED, device, "fused", "one image")
    for model in (GROUPED, TILED):
        add(model, A100, "fused", "video", batch=2)
    add_shared(add)
    return found


def add_shared(add):
    """Add models on several devices."""
    add(MULTI_HEAD, H100, "fused", "one image", tp=4, encoder_tp=1, batch=8)
    add(GROUPED, H100, "fused", "long text", pp=2, batch=4)
    add(GROUPED, H100, "fused", "one image", dp=2, batch=7)
    add(GROUPED, H100, "fused", "six photographs", tp=4, encoder_dp=4)
    add(CROSS, H100, "fused", "six photographs", tp=2, pp=2, encoder_tp=2, encoder_dp=2)
    add(GROUPED, "h100-nvl-94gb", "fused", "one image", tp=4)
    add(GROUPED, "mi300x-192gb", "fused", "one image", tp=2)
    for model in WITH_EXPERTS:
        add(model, H100, "fused", "one image", tp=4, ep=4, batch=8)
        add(model, H100, "fused", "one image", tp=2, dp=2, ep=4, batch=8)


CASES = cases()


def predicted(model, device, engine, workload, settings):
    """Return the numbers of one prediction."""
    bits = settings.get("bits", "16-16-16").split("-")
    degrees = {key: value for key, value in settings.items() if key not in ("bits", "batch")}
    p = predict(
        model,
        device,
        WORKLOADS[workload],
        engine=engine,
        batch=settings.get("batch", 1),
        precision=Precision(*map(int, bits)),
        parallelism=Parallelism(**degrees),
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
