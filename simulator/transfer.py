"""Links in time: transfers that share a wire equally and are re-timed when others start, end, or the wire fails."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Final

from simulator.clock import FIRST, Clock, Moment

ROUNDING: Final = 1e-9
"""Share of all bytes that sums may be off by."""


class Wire:
    """One wire under fair sharing.

    A transfer is over when the wire has carried its bytes for everybody: with n of them under way each gets a n-th. In
    the count of bytes that each transfer has got since the start of the run (`carried`), ends do not move; only the
    time of the next one does.

    Parameters
    ----------
    clock : Clock
    bandwidth_bytes_per_s : float
        Of all transfers together [bytes/s].
    latency_s : float
        From the last byte sent to the landing [s].
    """

    def __init__(self, clock: Clock, bandwidth_bytes_per_s: float, latency_s: float = 0.0) -> None:
        self.clock = clock
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.latency_s = latency_s
        self.speed = 1.0  # share of the bandwidth that is there; 0 while the wire is cut
        self.busy_s = 0.0
        self.asked_bytes = self.sent_bytes = self.dropped_bytes = 0.0
        self.carried = 0.0  # bytes that a transfer under way since the start would have got
        self._since_s = 0.0
        self._queue: list[tuple[float, int, float, Hashable]] = []  # (carried at the end, order, bytes, key)
        self._order = count()
        self._on_land: dict[Hashable, Callable[[], None]] = {}
        self._landing: dict[Hashable, Callable[[], None]] = {}  # sent, and not there yet
        self._next: Moment | None = None

    @property
    def active(self) -> int:
        """Transfers under way."""
        return len(self._on_land)

    def send(self, key: Hashable, n_bytes: float, on_land: Callable[[], None]) -> None:
        """Start a transfer, now; the key must not be under way.

        Parameters
        ----------
        key : hashable
            To drop it by.
        n_bytes : float
            Its size [bytes].
        on_land : callable
            Called when it has landed.
        """
        self._carry()
        self._on_land[key] = on_land
        self.asked_bytes += n_bytes
        heappush(self._queue, (self.carried + n_bytes, next(self._order), n_bytes, key))
        self._plan()

    def drop(self, key: Hashable) -> bool:
        """Stop a transfer, and return whether there was one; what was sent of it is lost."""
        if self._landing.pop(key, None) is not None:
            return True
        if key not in self._on_land:
            return False
        self._carry()
        del self._on_land[key]
        self.dropped_bytes += next(n_bytes for _, _, n_bytes, other in self._queue if other == key)
        self._queue = sorted(entry for entry in self._queue if entry[3] != key)
        self._plan()
        return True

    def change(self, speed: float) -> None:
        """Set the share of the bandwidth that is there, from now on."""
        self._carry()
        self.speed = speed
        self._plan()

    def audit(self) -> Iterator[str]:
        """Yield what does not add up once nothing happens any more."""
        if self._on_land:
            yield f"{len(self._on_land)} transfers never land"
        left = self.asked_bytes - self.sent_bytes - self.dropped_bytes
        if abs(left) > ROUNDING * max(self.asked_bytes, 1.0):
            yield f"{left:g} bytes of {self.asked_bytes:g} are neither sent nor dropped"

    def _carry(self) -> None:
        """Bring the count of bytes up to now."""
        now, active = self.clock.now, len(self._on_land)
        passed = now - self._since_s
        self._since_s = now
        if active and passed > 0:
            self.busy_s += passed
            self.carried += passed * self.bandwidth_bytes_per_s * self.speed / active

    def _plan(self) -> None:
        """Wait for the transfer that ends next."""
        queue = self._queue
        if not queue:
            self.carried = 0.0  # so that rounding stays small on long runs
        if not queue or not self.speed:
            self._next = None
            return
        left = max(0.0, queue[0][0] - self.carried)
        time_s = left * len(self._on_land) / (self.bandwidth_bytes_per_s * self.speed)
        self._next = self.clock.at(self.clock.now + time_s, self._sent, FIRST)

    def _sent(self, event: Moment) -> None:
        if event is not self._next:  # it was re-timed
            return
        self._carry()
        end, _, n_bytes, key = heappop(self._queue)
        self.carried = max(self.carried, end)  # rounding of the time must not leave a rest
        self.sent_bytes += n_bytes
        on_land = self._on_land.pop(key)
        self._plan()
        if self.latency_s:
            self._landing[key] = on_land
            self.clock.at(event.time_s + self.latency_s, lambda _: self._land(key, on_land), FIRST)
        else:
            on_land()

    def _land(self, key: Hashable, on_land: Callable[[], None]) -> None:
        if self._landing.get(key) is on_land:  # not dropped on the way
            del self._landing[key]
            on_land()


class Room:
    """A room that is given out in order of asking: whoever is first waits for all others to be behind.

    Parameters
    ----------
    free : callable
        Returns how much there is.
    """

    def __init__(self, free: Callable[[], float]) -> None:
        self.free = free
        self._waiting: dict[Hashable, tuple[float, Callable[[], None]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, key: Hashable, amount: float, on_grant: Callable[[], None]) -> None:
        """Ask for room; `on_grant` takes it when its turn has come."""
        self._waiting[key] = amount, on_grant
        if len(self._waiting) == 1:
            self.offer()

    def drop(self, key: Hashable) -> bool:
        """Take back what was asked for, and return whether it was still waiting."""
        found = self._waiting.pop(key, None) is not None
        if found:
            self.offer()
        return found

    def offer(self) -> None:
        """Give out what there is."""
        waiting = self._waiting
        while waiting:
            key = next(iter(waiting))
            amount, on_grant = waiting[key]
            if amount > self.free():
                return
            del waiting[key]
            on_grant()
