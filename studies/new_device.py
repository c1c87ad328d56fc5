"""The profile of a new device as `lvlm calibrate new:NAME` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.output import note


def write(name: str, paths: Sequence[Path], facts: Sequence[str], output: Path) -> Path:
    """Write the profile of a device from its measurement lines, and return the file.

    Parameters
    ----------
    name : str
        Of the device.
    paths : sequence of Path
        Files of lines, or folders.
    facts : sequence of str
        What a person states: key=value,…
    output : Path
        A .toml file, or a folder.

    Raises
    ------
    ValueError
        If there are no lines, or a number is missing.
    """
    from runtime import new_device
    from runtime.calibrate import read_lines

    lines = read_lines(paths)
    if not lines:
        raise ValueError(f"new:{name} needs measurement lines, *.jsonl; there are none in {', '.join(map(str, paths))}")
    values = new_device.measured_profile(name, lines, given(facts))
    path = output / f"{name}.toml" if output.is_dir() else output
    path.write_text(new_device.to_toml(values), encoding="utf-8")
    note(f"wrote {path}: the profile of {values['title']}")
    return path


def given(facts: Sequence[str]) -> dict[str, float | str]:
    """Return facts from `key=value,…`: numbers, whole ones as int, or words.

    Examples
    --------
    >>> given(["memory_bytes=80e9,core_count=132", "vendor=NVIDIA"])
    {'memory_bytes': 80000000000, 'core_count': 132, 'vendor': 'NVIDIA'}
    """
    found: dict[str, float | str] = {}
    for text in facts:
        for pair in text.split(","):
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not (key and equals and value):
                raise ValueError(f"--set {text!r}: {pair!r} must read key=value, such as memory_bytes=80e9")
            if key in found:
                raise ValueError(f"--set {key} is given twice; give it once")
            found[key] = _value(value)
    return found


def _value(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number
