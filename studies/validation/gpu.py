"""Everything that is measured on a GPU, in the order of its worth, within a number of minutes.

First the reference model is checked on the device: logits against those of the CPU, and steps as a CUDA graph against
plain ones. Then every model is measured (the first with kernels in its shapes), the lines are compared with their
predictions, and curves are fitted. A step that fails says so and the next one runs. All files lie in one folder.

Run by hand::

    python -m studies.validation.gpu -o measurements/h100 --minutes 25
    python -m studies.validation.gpu -o /tmp/smoke --device cpu --smoke
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MODELS = (
    "qwen2.5-vl-7b",
    "llava-1.5-7b",
    "qwen3-vl-8b",
    "gemma-3-4b",
    "internvl3-8b",
    "qwen3-vl-30b-a3b",
)
SMALL = Path(__file__).parent / "small-lvlm"
REQUEST = ("--image", "1280x720", "--text", "64", "--batch", "1", "--batch", "8")
SMOKE = ("--image", "128x96", "--text", "8")
SHARES = (0.5, 0.4)
"""Of the time that is left: for the first model with its kernels, and for each one behind it."""
LOGITS_APART = 2e-2
"""Largest difference of logits of size one between two devices in single precision, products without TF32."""


def check(device_name: str) -> str:
    """Return in a line how far the small model on a device is from the CPU's, and whether graphs agree.

    Raises
    ------
    RuntimeError
        If logits or tokens differ.
    """
    import torch

    from costmodel.workload import Image
    from runtime.blueprint import load_blueprint
    from runtime.device import open_device
    from runtime.generate import generate, start
    from runtime.requests import Request
    from runtime.weights import load

    blueprint, device = load_blueprint(SMALL), open_device(device_name)
    here = load(blueprint, torch.device("cpu"), torch.float32)
    there = copy.deepcopy(here).to(device)
    prompts = Request((Image(128, 96),), text_tokens=16, batch=2).prompts(blueprint)
    with torch.inference_mode():
        apart = float((start(here, prompts, 1)[0] - start(there, prompts, 1)[0].cpu()).abs().max())
    if not apart < LOGITS_APART:
        raise RuntimeError(f"logits on {device_name} are {apart:.2g} from those of the CPU; at most {LOGITS_APART}")
    if device.type != "cuda":
        return f"logits within {apart:.2g} of the CPU's; no graphs on {device_name}"
    plain = generate(there, prompts, max_tokens=32)
    if plain != generate(there, prompts, max_tokens=32, steps="graph"):
        raise RuntimeError("a decode step as a CUDA graph gives other tokens than a plain one")
    return f"logits within {apart:.2g} of the CPU's; 32 tokens of a CUDA graph are those of plain steps"


def run(command: Sequence[str], log: Path) -> bool:
    """Run `lvlm` with these arguments, its output into a log; return whether it went well."""
    shown = " ".join(command)
    print(f"lvlm {shown}", file=sys.stderr)
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ lvlm {shown}\n")
        file.flush()
        whole = [sys.executable, "-m", "studies.cli", *command]
        done = subprocess.run(whole, stdout=file, stderr=subprocess.STDOUT, check=False)  # noqa: S603 - our own
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        print(f"  failed with exit code {done.returncode}: {last}", file=sys.stderr)
    return not done.returncode


def measure_all(folder: Path, device: str, models: Sequence[str], minutes: float, *, smoke: bool) -> list[Path]:
    """Measure every model while there is time, and return the files of lines."""
    started, files = time.monotonic(), []
    for number, model in enumerate(models):
        left_s = minutes * 60 - (time.monotonic() - started)
        if left_s <= 0:
            print(f"no time left for {', '.join(models[number:])}", file=sys.stderr)
            break
        seconds = left_s * SHARES[bool(number)]
        what = "microbench,stages,transformers" if not number else "stages,transformers"
        path = folder / f"{Path(model).name}.jsonl"
        request = SMOKE if smoke else REQUEST
        arguments = ("measure", model, "-o", str(path), "--device", device, "--what", what, *request)
        if run((*arguments, "--seconds", f"{seconds:.0f}"), path.with_suffix(".log")):
            files.append(path)
    return files


def judge(folder: Path, files: Sequence[Path], hardware: str | None) -> bool:
    """Compare every file with its predictions and fit curves to all of them; return whether it went well.

    Without a name the device is the one that the lines name; where the catalogue has none, nothing is compared.
    """
    from runtime.devices import device_of
    from runtime.measurement import read_measurements

    if not files:
        return True
    device = device_of(read_measurements(files[0])[0].device, hardware)
    if device is None:
        print("the catalogue has no such device, so nothing is compared; give --hardware", file=sys.stderr)
        return True
    name = hardware or device.name
    fitted = folder / "fitted"
    fitted.mkdir(exist_ok=True)
    sources = [flag for path in files for flag in ("--from", str(path))]
    fine = run(("calibrate", name, *sources, "-o", str(fitted)), folder / "calibrate.log")
    for path in files:
        fine &= run(("compare", str(path), "--json", "--hardware", name), path.with_suffix(".compare.json"))
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, compare and fit; return 1 if any step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", action="append", help="instead of the usual ones; repeat for several")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--hardware", help="name of its profile; by default the one that the lines name")
    parser.add_argument("--smoke", action="store_true", help="one tiny model, a few seconds")
    options = parser.parse_args(arguments)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    models = options.model or ([str(SMALL)] if options.smoke else list(MODELS))
    try:
        print(check(options.device))
    except (RuntimeError, ValueError, LookupError) as error:
        print(f"check failed: {error}", file=sys.stderr)
        return 1
    minutes = 0.1 if options.smoke else options.minutes
    files = measure_all(folder, options.device, models, minutes, smoke=options.smoke)
    fine = len(files) == len(models)
    fine &= judge(folder, files, options.hardware)
    print(f"{len(files)} of {len(models)} models measured into {folder}")
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
