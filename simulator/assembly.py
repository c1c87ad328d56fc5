"""Plans from pools: what is added where nothing is said, links that the devices have, and plans k times as large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from costmodel import hardware as devices
from costmodel import load_engine, load_hardware
from costmodel.errors import Unsupported
from costmodel.hardware import HardwareProfile
from simulator.rules import Store
from simulator.serving_plan import ServingPlan
from simulator.topology import Link, Pool, Stage, Topology

NETWORK: Final = ("infiniband", "ethernet")
"""Links through a switch that leave the node; Ethernet that joins accelerators in a mesh stays inside (Gaudi)."""
PAIR: Final = 2
"""Ends of a transfer."""
WAY_OUT: Final = "give [[links]] in a PLAN.toml"


def preprocess_at(stages: Sequence[tuple[Stage, ...]]) -> list[tuple[Stage, ...]]:
    """Return the stages of pools, with preprocessing where pictures are encoded if it is named nowhere.

    Parameters
    ----------
    stages : sequence of tuple of str
        Of each pool. Where none encodes, those that prefill preprocess.
    """
    if any("preprocess" in own for own in stages):
        return list(stages)
    place: Stage = "encode" if any("encode" in own for own in stages) else "prefill"
    return [("preprocess", *own) if place in own else own for own in stages]


def with_links(
    model: str,
    pools: Sequence[Pool],
    *,
    settings: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
) -> ServingPlan:
    """Return the plan of pools, with every link that they need as `derived_link` has it.

    Parameters
    ----------
    model : str
    pools : sequence of Pool
    settings : mapping, optional
        Fields that all links get in place of the derived ones, such as mode.
    others : mapping, optional
        Other fields of the plan.

    Raises
    ------
    ValueError
        If the pools cannot work together, or a link can be derived from nothing.
    """
    links = []
    for source, target, what in Topology.model_construct(pools=tuple(pools), links=()).hops():
        fields = derived_link(source, target, what, pools).model_dump(by_alias=True)
        links.append({**fields, **(settings or {})})
    held = {"model": model, "pools": [pool.model_dump() for pool in pools], "links": links, **(others or {})}
    found = ServingPlan.model_validate(held)
    _ = found.topology
    return found


def derived_link(source: Pool, target: Pool, what: str, pools: Iterable[Pool]) -> Link:
    """Return the link between two pools, from the links in the profiles of their devices.

    Parameters
    ----------
    source, target : Pool
        The ends.
    what : {"pixels", "embeddings", "KV"}
        What goes over it.
    pools : iterable of Pool
        All pools: those of one device stand in as few nodes as they fit in.

    Returns
    -------
    Link
        One for each sending worker, pushing.

    Raises
    ------
    Unsupported
        If the profiles have no link that joins the pools.

    Notes
    -----
    Equal devices (what-ifs of one count as equal) use the fastest link of their profile that joins as many devices as
    all pools of that device have: NVLink or its like inside a node, PCIe where there is none, a network link beyond the
    node where the profile names one. Different devices stand in different nodes: they use the slower of both profiles'
    network links; where a profile has none, as if in one host, the slower of both links to the host. Pixels are on the
    host, so inside a node they go over the receiver's link to its host.

    The rate is that of one direction between two devices, in a mesh the share of one pair. KV is spread over the
    devices of a worker, so it uses as many of these at once as the smaller of both ends has; embeddings and pixels
    leave one device. The latency is that of the profile.
    """
    ends = load_hardware(source.hardware), load_hardware(target.hardware)
    if _base(source) == _base(target):
        joined = sum(pool.devices for pool in pools if _base(pool) == _base(source))
        found = _inside(ends[1], joined, on_host=what == "pixels", names=(source.name, target.name))
    else:
        found = _between(ends, on_host=what == "pixels", names=(source.name, target.name))
    lanes = min(_devices_of_a_loop(source), _devices_of_a_loop(target)) if what == "KV" else 1
    held = {
        "from": source.name,
        "to": target.name,
        "kind": found.kind,
        "bandwidth_bytes_per_s": lanes * found.rate_bytes_per_s(PAIR),
        "latency_s": found.latency_s,
    }
    return Link.model_validate(held)


def _base(pool: Pool) -> str:
    return pool.hardware.partition(":")[0]


def _devices_of_a_loop(pool: Pool) -> int:
    """Return the devices that hold one sequence's cache."""
    return pool.devices_per_worker // pool.loops


def _inside(profile: HardwareProfile, joined: int, *, on_host: bool, names: tuple[str, str]) -> devices.Link:
    """Return the link between equal devices, of which there are so many in all."""
    able = [link for link in profile.links if link.devices >= joined]
    if on_host:
        able = [link for link in able if link.topology == "host" or _is_network(link)]
    if not able:
        most = max((link.devices for link in profile.links), default=1)
        raise Unsupported(
            f"{joined} x {profile.name} have no link from {names[0]!r} to {names[1]!r}: the profile joins {most};"
            f" {WAY_OUT}"
        )
    return max(able, key=lambda link: link.rate_bytes_per_s(PAIR))


def _between(ends: tuple[HardwareProfile, ...], *, on_host: bool, names: tuple[str, str]) -> devices.Link:
    """Return the link between different devices: the slower of their networks, else of their links to a host."""
    networks = [max(filter(_is_network, end.links), key=_rate, default=None) for end in ends]
    if None not in networks:
        return min((link for link in networks if link is not None), key=_rate)
    asked = ends[1:] if on_host else ends
    hosts = [max((link for link in end.links if link.topology == "host"), key=_rate, default=None) for end in asked]
    for end, link in zip(asked, hosts, strict=True):
        if link is None:
            raise Unsupported(
                f"{end.name} has neither a network nor a link to a host in its profile, to link {names[0]!r} with"
                f" {names[1]!r}; {WAY_OUT}"
            )
    return min((link for link in hosts if link is not None), key=_rate)


def _is_network(link: devices.Link) -> bool:
    return link.kind in NETWORK and link.topology == "switch"


def _rate(link: devices.Link) -> float:
    return link.rate_bytes_per_s(PAIR)


def scaled(plan: ServingPlan, times: int) -> ServingPlan:
    """Return the plan with so many times the workers in every pool, and the CPU workers with them.

    Links of a worker come with their worker; one that a pool shares gets so many times its rate, a store that and so
    many times its room.
    """
    links = tuple(_scaled_link(link, times) for link in plan.links)
    store = plan.store and _scaled_store(plan.store, times)
    return plan.model_copy(update={"pools": scaled_pools(plan.pools, times), "links": links, "store": store})


def scaled_pools(pools: Iterable[Pool], times: int) -> tuple[Pool, ...]:
    """Return pools with so many times the workers and CPU workers."""
    return tuple(pool if times == 1 else pool.model_copy(update=_scaled_counts(pool, times)) for pool in pools)


def _scaled_counts(pool: Pool, times: int) -> dict[str, int | None]:
    if not pool.runs("preprocess"):
        return {"workers": pool.workers * times}
    cpus = pool.preprocess_workers or load_engine(pool.engine).preprocessing.workers
    return {"workers": pool.workers * times, "preprocess_workers": cpus * times}


def _scaled_link(link: Link, times: int) -> Link:
    if link.per == "worker":
        return link
    return link.model_copy(update={"bandwidth_bytes_per_s": link.bandwidth_bytes_per_s * times})


def _scaled_store(store: Store, times: int) -> Store:
    rate, room = times * store.bandwidth_bytes_per_s, times * store.capacity_bytes
    return store.model_copy(update={"bandwidth_bytes_per_s": rate, "capacity_bytes": room})


def assumptions(plan: ServingPlan) -> Iterator[str]:
    """Yield what is taken for granted of links between different devices, in words."""
    by_name = {pool.name: pool for pool in plan.pools}
    for link in plan.links:
        ends = by_name[link.source], by_name[link.target]
        if _base(ends[0]) != _base(ends[1]) and link.kind not in NETWORK:
            name = f"{link.source} > {link.target}"
            yield f"the link {name} is {link.kind}, as if both were in one host; {WAY_OUT} for a network"
