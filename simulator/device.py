"""How fast a worker is: a straggler is slower, and who shares a device gets an equal part of it while others work."""

from __future__ import annotations


class Paced:
    """Something whose steps take longer than alone and healthy."""

    def __init__(self) -> None:
        self.slowness = 1.0  # a straggler takes this many times as long
        self.turns = 1  # workers that take turns on its device now
        self.pace = 1.0  # how many times as long as alone and healthy its steps take
        self.device: SharedDevice | None = None

    def retime(self, before: float) -> None:
        """Let the rest of the step under way take longer, or less long, than at the pace before."""
        raise NotImplementedError

    def straggle(self, slowness: float) -> None:
        """Take so many times as long, the rest of the step under way included."""
        self.slowness = slowness
        self._change()

    def take_turns(self, turns: int) -> None:
        """Be one of so many that work on the device, from now on."""
        self.turns = turns
        self._change()

    def _change(self) -> None:
        before, self.pace = self.pace, self.slowness * self.turns
        self.retime(before)

    def end_turn(self) -> None:
        """Leave the device to others."""
        if self.device is not None:
            self.device.leave(self)


class SharedDevice:
    """Takes turns: of n workers with a step under way, each is n times as slow, and re-timed when that changes.

    Two kernels that need different things overlap better than that, so this is an upper bound of what sharing costs.
    """

    def __init__(self) -> None:
        self._active: dict[Paced, None] = {}

    def enter(self, worker: Paced) -> None:
        """Let a worker begin to work."""
        if worker not in self._active:
            self._active[worker] = None
            self._share_out()

    def leave(self, worker: Paced) -> None:
        """Let a worker stop working."""
        if worker in self._active:
            del self._active[worker]
            worker.take_turns(1)
            self._share_out()

    def _share_out(self) -> None:
        for worker in self._active:
            worker.take_turns(len(self._active))
