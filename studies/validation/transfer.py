"""Fit the curves that devices share, leave each device out in turn, and write `transfer.md`.

`python -m studies.validation.transfer` reads measured tables and writes the files `shared.<library>.toml` of
`hardware_profiles/fitted/` as well; with `--report` it writes the report of the files that are there. Needs the extra
`data`.
"""

from __future__ import annotations

import argparse
import datetime as dt
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hardware_profiles
from costmodel import load_hardware
from costmodel.hardware import HardwareProfile
from studies.validation.split import is_test, rule
from studies.validation.transfer_report import REPORT, load_shared, report

if TYPE_CHECKING:
    from runtime.tables import Samples
    from runtime.transfer import Shared

SEED: Final = 0
ROOT: Final = Path(__file__).resolve().parents[2]
FITTED: Final = Path(hardware_profiles.__file__).parent / "fitted"
AIC, VIDUR = "aiconfigurator/data", "vidur/data/profiling"
FOLDERS: Final = {
    "a100-sxm4-80gb": (f"{AIC}/a100_sxm", f"{VIDUR}/compute/a100", f"{VIDUR}/network/a100_dgx"),
    "h100-sxm5-80gb": (f"{AIC}/h100_sxm", f"{VIDUR}/compute/h100", f"{VIDUR}/network/h100_dgx"),
    "l40s-48gb": (f"{AIC}/l40s",),
    "rtx-pro-6000-96gb": (f"{AIC}/rtx_pro_6000_server",),
    "a40-48gb": (f"{VIDUR}/compute/a40",),
}
"""Where the tables of each device are, under the folder of data."""
BEYOND: Final = ("mi210-64gb", "llmcompass")
"""A device of another maker, ..."""
CHECKED: Final = ("sglang gemm.bf16", "trtllm gemm.bf16")
"""... and the curves that are checked on its products."""


HEAD: Final = """# Written by `python -m studies.validation.transfer`: edit nothing, fit again.
# One curve for several devices. Errors are those of devices that were left out of the fit, bands are for a device that
# was not measured.
# Constants are in clock cycles, FLOP per byte and shares of datasheet rates; see costmodel/efficiency/transfer.py.
"""


def measured(data: Path) -> Iterator[tuple[HardwareProfile, list[Samples]]]:
    """Yield each device with its rows."""
    from runtime.calibrate import read

    for name, folders in FOLDERS.items():
        yield load_hardware(name), read([data / folder for folder in folders], name)


def fit(data: Path) -> list[Shared]:
    """Return what devices share."""
    from runtime.calibrate import read
    from runtime.grouping import groups
    from runtime.transfer import transfer, with_beyond

    device, folder = BEYOND
    others = [samples for samples in read([data / folder], device) if samples.kind == "gemm"]
    found = []
    for shared in transfer(groups(measured(data), is_test=is_test, seed=SEED)):
        print(f"{shared.group.name}: {len(shared.group.members)} devices")
        checked = shared
        if shared.group.name in CHECKED:
            for samples in others:
                checked = with_beyond(checked, load_hardware(device), samples)
        found.append(checked)
    return found


def write(several: Sequence[Shared]) -> None:
    """Write one file a library."""
    from runtime.fitted import SHARED, shared_profile, to_toml

    for library in sorted({shared.group.library for shared in several}):
        some = [shared for shared in several if shared.group.library == library]
        values = shared_profile(
            sorted(some, key=lambda shared: (shared.group.kind, shared.group.variant)),
            library=library,
            fitted_on=dt.datetime.now(tz=dt.UTC).date().isoformat(),
            split=f"studies/validation/split.json, salt {rule()['salt']}",
            seed=SEED,
        )
        (FITTED / f"{SHARED}.{library}.toml").write_text(to_toml(values, HEAD), encoding="utf-8")


def main() -> None:
    """Fit, write the files and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of measured tables")
    parser.add_argument("--report", action="store_true", help="write the report of the committed files alone")
    arguments = parser.parse_args()
    if not arguments.report:
        if not arguments.data.is_dir():
            parser.error(f"no folder {str(arguments.data)!r}; give the folder of measured tables with --data")
        write(fit(arguments.data))
    REPORT.write_text(report(load_shared()), encoding="utf-8")


if __name__ == "__main__":
    main()
