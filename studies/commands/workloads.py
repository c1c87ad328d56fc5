"""`lvlm workloads`: what requests can be simulated."""

from __future__ import annotations

from rich.console import Console

from simulator.traffic.presets import PRESETS
from simulator.traffic.read import formats
from studies.options import FOR_PEOPLE, Format
from studies.output import Answer, emit
from studies.tables import sections, table


def workloads(*, form: Format = FOR_PEOPLE) -> None:
    """List the workloads and the trace formats, with their sources."""
    rows = [{"workload": name, "description": held.about, "source": held.source} for name, held in PRESETS.items()]
    read = {module.__name__.rpartition(".")[2]: module.ABOUT for module in formats()}

    def show(to: Console) -> None:
        names = table(("workload", "description", "source"), [tuple(row.values()) for row in rows], left=3)
        sections(to, names, table(("format", "description"), read.items(), left=2))

    emit(Answer("workloads", {}, {"workloads": rows, "formats": read}, lambda: rows, show), form)
