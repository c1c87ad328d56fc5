"""One vLLM instance that encodes and several that do the rest, behind the proxy of vLLM's example, run one by one.

Every instance has a server of its own, which processes the pictures: that of the encoder gets a request for each
picture, those of prefill and decode get the original one (vLLM pull request 25233, `disagg_epd_proxy.py`). The cluster
of `simulator` gives a request one preprocessing, so instances are run in turn here. Nothing flows back from one to the
one before it: embeddings lie in shared storage, where nobody waits for room. Each is a whole vLLM, of which the
encoder's has no language model to run, and the others load what they would encode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.base import Array
from costmodel.models import MediaCost
from simulator import ServingPlan, simulate
from simulator.prompt import Chunk
from simulator.request import Ints, Items, Requests, requests_of
from simulator.service import Service
from studies.validation.one_server import OneServer


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """When requests came, had their first token, and their last [s].

    Parameters
    ----------
    arrival_s, first_token_s, finish_s : ndarray, shape (n,)
    """

    arrival_s: Array
    first_token_s: Array
    finish_s: Array


class EncodesOnly(OneServer):
    """The service of an instance that encodes one picture a request and runs no language model.

    Parameters
    ----------
    rank : Service
        A whole worker.
    step_host_s, copy_s : float
        The host's time of a step, and the copy of a picture's embeddings to the storage [s].
    """

    def __init__(self, rank: Service, *, step_host_s: float, copy_s: float) -> None:
        super().__init__(rank, 1)
        self.step_host_s, self.copy_s = step_host_s, copy_s

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of the encoder for the pictures of a step [s]."""
        return self.rank.encode_s(items) + len(items) * self.copy_s

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step beside its pictures [s]."""
        del chunks, finishing, decoding, keys
        return self.step_host_s


class LoadsEmbeddings(OneServer):
    """The service of an instance that loads embeddings from the storage where others encode.

    Parameters
    ----------
    rank : Service
        A whole worker.
    n_images : int
        Pictures of every request.
    copy_s : float
        The copy of a picture's embeddings from the storage, in the step that needs it first [s].
    """

    def __init__(self, rank: Service, n_images: int, *, copy_s: float) -> None:
        super().__init__(rank, n_images)
        self.copy_s = copy_s

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time to load the pictures of a step [s]."""
        return len(items) * self.copy_s


@dataclass(frozen=True, slots=True)
class Instance:
    """One vLLM.

    Parameters
    ----------
    plan : ServingPlan
        A pool of one worker that does everything.
    service : Service
        Its times.
    """

    plan: ServingPlan
    service: Service

    def served(self, requests: Requests) -> Times:
        """Return when its requests had their tokens."""
        columns = simulate(self.plan, requests, service=self.service).columns
        return Times(columns["arrival_s"], columns["first_token_s"], columns["finish_s"])


@dataclass(frozen=True, slots=True)
class EncoderApart:
    """An encoder's instance and equal ones for prefill and decode, dealt out by a proxy.

    Parameters
    ----------
    encoder, language : Instance
    deal : callable
        From a number of requests to the instance of each.
    """

    encoder: Instance
    language: Instance
    deal: Callable[[int], Ints]

    def served(self, requests: Requests) -> Times:
        """Return when requests had their tokens."""
        ready_s = self.encoded_s(requests)
        place = self.deal(len(requests))
        first_token_s, finish_s = np.full((2, len(requests)), np.nan)
        for instance in np.unique(place):
            mine = np.flatnonzero(place == instance)
            mine = mine[np.argsort(ready_s[mine], kind="stable")]
            times = self.language.served(_some(requests, mine, ready_s[mine]))
            first_token_s[mine], finish_s[mine] = times.first_token_s, times.finish_s
        return Times(requests.arrival_s, first_token_s, finish_s)

    def encoded_s(self, requests: Requests) -> Array:
        """Return when all pictures of each request are in the storage [s]; the proxy asks for all at once."""
        owner = requests.item_request
        one = np.ones(len(owner), dtype=np.int64)
        items = Items.same(len(owner), 1, requests.media[0])
        times = self.encoder.served(requests_of(requests.arrival_s[owner], one, one, items=items))
        ready_s = np.array(requests.arrival_s, dtype=float)
        np.maximum.at(ready_s, owner, times.finish_s)
        return ready_s


def _some(requests: Requests, index: Ints, arrival_s: Array) -> Requests:
    """Return some requests with as many pictures each, at other times [s]."""
    n_images = requests.n_items
    if len(requests.media) != 1 or (n_images != n_images[0]).any():
        raise ValueError(f"media={len(requests.media)} must be one size, in equal numbers; give `Items.same`")
    items = Items.same(len(index), int(n_images[0]), requests.media[0])
    return requests_of(arrival_s, requests.text_tokens[index], requests.output_tokens[index], items=items)
