"""Measure how fast the cost model is: import, single predictions, sweeps. Run by hand, the output kept beside it.

OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m studies.validation.speed | tee studies/validation/speed.txt
"""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from costmodel import Image, Workload, engine_names, hardware_names, load_hardware, load_model, model_names, predict
from costmodel.base import Array
from costmodel.hardware import HardwareProfile
from costmodel.models import ModelSpec

N_QUERIES = 1000
N_POINTS = 500_000
Query = tuple[ModelSpec, HardwareProfile, Workload, str]


def queries() -> list[Query]:
    """Return a thousand different requests, drawn with a fixed seed."""
    draw = random.Random(0)  # noqa: S311 - a benchmark, not a secret
    models = [load_model(name) for name in model_names()]
    devices = [load_hardware(name) for name in hardware_names()]
    found = []
    for _ in range(N_QUERIES):
        model = draw.choice(models)
        n_images = draw.randint(1, 3) if model.media else 0
        images = [Image(draw.randint(100, 4000), draw.randint(100, 4000)) for _ in range(n_images)]
        workload = Workload(images=images, text_tokens=draw.randint(1, 4000), output_tokens=draw.randint(1, 1000))
        found.append((model, draw.choice(devices), workload, draw.choice(engine_names())))
    return found


def median_us(action: Callable[[Query], object], requests: list[Query]) -> float:
    """Return the median time of an action over all requests [µs]."""
    taken = []
    for request in requests:
        start = time.perf_counter()
        action(request)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1e6


def headline(request: Query) -> object:
    """Predict TTFT, TPOT and total time."""
    model, device, workload, engine = request
    return predict(model, device, workload, engine=engine)


def everything(request: Query) -> object:
    """Predict everything that the JSON holds."""
    model, device, workload, engine = request
    return predict(model, device, workload, engine=engine).as_dict()


def sweep_points_per_s(model: ModelSpec, device: HardwareProfile) -> float:
    """Return the points a second of a broadcast sweep over tokens and batch, the best of three."""
    draw = np.random.default_rng(0)

    def tokens(most: int) -> Array:
        return draw.integers(1, most, N_POINTS).astype(float)

    visual = tokens(20_000) if model.media else None
    workload = Workload(visual_tokens=visual, text_tokens=tokens(4_000), output_tokens=tokens(1_000))
    batch = tokens(64)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        predict(model, device, workload, batch=batch)
        taken.append(time.perf_counter() - start)
    return N_POINTS / min(taken)


def import_cpu_s() -> float:
    """Return the CPU time that importing the cost model adds to starting Python [s], the median of five.

    As after an installation, modules are compiled before.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def cpu_s(code: str) -> float:
        command = [sys.executable, "-c", f"import time; {code}; print(time.process_time())"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603
        return float(done.stdout)

    cpu_s("import costmodel")
    return float(np.median([cpu_s("import costmodel") - cpu_s("pass") for _ in range(5)]))


def main() -> None:
    """Print every figure."""
    requests = queries()
    for request in requests:
        everything(request)  # loads and compiles
    print(f"python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}")
    print(f"import costmodel: {import_cpu_s():.3f} s of CPU")
    fitted = [(model, device, workload, "fused") for model, device, workload, _ in requests]
    new = median_us(headline, fitted)  # with tables of curves that are not worked out yet, but for a few
    for name, some in (("all engines", requests), ("fitted curves", fitted)):
        for request in some:
            everything(request)
        for action in (headline, everything):
            label = action.__name__
            print(f"one prediction, {label}, {name}: {median_us(action, some):.0f} us (median of {N_QUERIES} requests)")
    print(f"the first prediction of a model on a device with fitted curves: {new / 1e3:.1f} ms (median)")
    device = load_hardware("h100-sxm5-80gb")
    print("million points/s of a sweep over tokens and batch on one core (TTFT and TPOT), slowest model first:")
    rates = sorted((sweep_points_per_s(load_model(name), device) / 1e6, name) for name in model_names())
    for rate, name in rates:
        print(f"  {rate:.2f} {name}")


if __name__ == "__main__":
    main()
