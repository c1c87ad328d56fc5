"""Time of an action on a device: warmed up, every sample kept, with peak memory, power and clock.

On a GPU the clock is that of CUDA events on the stream; on a CPU it is the wall, and with one thread the processor time
of this process, which other work on the machine does not disturb. A short kernel is repeated inside one CUDA graph, so
that the host's launches are not what is timed. `cold` empties the last cache before each sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from runtime.device import cpu_clock_hz, facts, synchronize
from runtime.nvml import Nvml

Action = Callable[[], object]
WARM_UP: Final = 3
"""Runs before the samples; fewer where they alone would use up the budget."""
LEAST: Final = 3
"""Samples that are taken whatever the budget: the fewest of which the median is not an outlier."""
MOST: Final = 100
SHORT_S: Final = 2e-4
"""Shorter actions are repeated within a sample: some hundred times the resolution of a CUDA event, about 0.5 us."""
MOST_REPEATS: Final = 1000
FLUSHED: Final = 2
"""The buffer that empties a cache is this many times as large."""
SHORTEST_FOR_POWER_S: Final = 0.2
"""The energy counter of the driver moves about ten times a second."""
RESOLUTION_S: Final = 1e-9  # of the clocks of the system
DIGITS: Final = 10
"""Of a sample [s]: a tenth of the resolution, since a sample may be a share of several runs."""
WALL, PROCESSOR, EVENTS = "wall", "processor time", "CUDA events"
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Timing:
    """What an action took.

    Parameters
    ----------
    samples_s : tuple of float
        Every timed run [s].
    peak_bytes : float or None
        Most memory in use: of the allocator on a GPU, of the process on a CPU [bytes].
    power_w : float or None
        Mean while samples were taken [W].
    clock_hz : float or None
        Clock behind the last sample [Hz].
    """

    samples_s: tuple[float, ...]
    peak_bytes: float | None = None
    power_w: float | None = None
    clock_hz: float | None = None


class Stopwatch:
    """Times actions on one device.

    Parameters
    ----------
    device : torch.device
    budget_s : float
        For the samples of one action [s]; a few are taken whatever they last.
    cold : bool
        Whether the last cache is emptied before each sample.
    """

    def __init__(self, device: torch.device, *, budget_s: float, cold: bool = False) -> None:
        self.device, self.budget_s, self.cold = device, budget_s, cold
        self.nvml = Nvml.of(device)
        self.clock = clock(device)
        self.buffer: torch.Tensor | None = None
        if cold:
            size = facts(device).get("l2_bytes", 0.0) * FLUSHED
            self.buffer = torch.zeros(int(size), dtype=torch.int8, device=device)

    def time(self, action: Action, *, repeatable: bool = False) -> Timing:
        """Return what an action takes.

        Parameters
        ----------
        action : callable
            Run over and over.
        repeatable : bool
            Whether it may be run many times within a sample, and be captured in a CUDA graph: kernels are.
        """
        first_s = self._warm_up(action)
        repeats = 1
        if repeatable and not self.cold and first_s < SHORT_S:
            repeats = min(MOST_REPEATS, max(1, round(SHORT_S / max(first_s, SHORT_S / MOST_REPEATS))))
        run = self._repeated(action, repeats, captured=repeatable)
        _reset_peak(self.device)
        energy_j, started = self.nvml.energy_j if self.nvml else None, time.perf_counter()
        samples: list[float] = []
        spent_s = 0.0
        while len(samples) < LEAST or (spent_s < self.budget_s and len(samples) < MOST):
            samples.append(max(round(self._sample(run) / repeats, DIGITS), RESOLUTION_S / 10))
            spent_s = time.perf_counter() - started
        return Timing(tuple(samples), _peak_bytes(self.device), self._power_w(energy_j, spent_s), self._clock_hz())

    def _warm_up(self, action: Action) -> float:
        started, taken_s = time.perf_counter(), 0.0
        for _ in range(WARM_UP):
            taken_s = self._sample(action)
            if time.perf_counter() - started > self.budget_s:
                break
        return taken_s

    def _repeated(self, action: Action, repeats: int, *, captured: bool) -> Action:
        """Return so many runs of an action as one: a loop, or a CUDA graph."""

        def loop() -> None:
            for _ in range(repeats):
                action()

        if not captured or self.device.type != "cuda":
            return loop if repeats > 1 else action
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
        graph.replay()
        return graph.replay

    def _sample(self, run: Action) -> float:
        """Return the time of one run [s]."""
        if self.buffer is not None:
            self.buffer.add_(1)
        if self.device.type != "cuda":
            start = self.clock()
            run()
            return max(self.clock() - start, RESOLUTION_S)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start_event.record()
        run()
        end_event.record()
        synchronize(self.device)
        return float(start_event.elapsed_time(end_event)) * 1e-3

    def _power_w(self, energy_j: float | None, spent_s: float) -> float | None:
        now_j = self.nvml.energy_j if self.nvml else None
        if energy_j is None or now_j is None or spent_s < SHORTEST_FOR_POWER_S:
            return None
        return (now_j - energy_j) / spent_s

    def _clock_hz(self) -> float | None:
        if self.device.type == "cpu":
            return cpu_clock_hz() or None
        return self.nvml.clock_hz if self.nvml else None


def clock_of(device: torch.device) -> str:
    """Return which clock times a device."""
    if device.type == "cuda":
        return EVENTS
    return PROCESSOR if torch.get_num_threads() == 1 else WALL


def clock(device: torch.device) -> Callable[[], float]:
    """Return the clock of the host that times a device [s]."""
    return time.process_time if clock_of(device) == PROCESSOR else time.perf_counter


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): resets the peak of the resident set
        except OSError:  # not allowed in this container: then the peak is that of the process so far
            return


def _peak_bytes(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    lines = STATUS.read_text(encoding="ascii").splitlines() if STATUS.is_file() else []
    peaks = [float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else None
