"""Pools of a deployment as they are typed: `--pools encode=1@l4-24gb --pools prefill+decode=3 --set encode.tp=2`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from costmodel import load_hardware
from costmodel.errors import one_line, unknown
from simulator.assembly import preprocess_at, scaled_pools, with_links
from simulator.serving_plan import ServingPlan
from simulator.topology import STAGES, Pool, Stage

FORM: Final = "must read STAGES=DEVICES or STAGES=DEVICES@HARDWARE, such as encode=1 or prefill+decode=3@h100-sxm5-80gb"
WHOLE_PLAN: Final = ("pool", "policies", "links")
"""What --set may change beside pools by name: all pools, the policies, all links."""
MOST_SHOWN: Final = 6
"""Pools that a message lists."""


def asked_pools(texts: Sequence[str], common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was typed of each pool: its name, stages, hardware and `devices`.

    Parameters
    ----------
    texts : sequence of str
        `STAGES=DEVICES[@HARDWARE]`; stages joined by +.
    common : mapping
        Fields of every pool, hardware among them unless each names its own.

    Raises
    ------
    LookupError
        If a stage or a device is unknown.
    ValueError
        If a text reads otherwise, or two pools are the same.
    """
    parts = [_parts(text) for text in texts]
    stages = preprocess_at([own for own, _, _ in parts])
    names = Counter(own for own, _, _ in parts)
    found = []
    for (own, devices, hardware), every in zip(parts, stages, strict=True):
        fields = {**common, **({"hardware": hardware} if hardware else {})}
        if not fields.get("hardware"):
            raise ValueError(f"pool {'+'.join(own)!r} has no hardware; give --hardware, or STAGES=DEVICES@HARDWARE")
        name = "+".join(own) if names[own] == 1 else f"{'+'.join(own)}@{fields['hardware']}"
        found.append({**fields, "name": name, "stages": list(every), "devices": devices})
    twice = [name for name, count in Counter(pool["name"] for pool in found).items() if count > 1]
    if twice:
        raise ValueError(f"--pools {twice[0]!r} is given twice; add up its devices, or give each its @HARDWARE")
    return found


def _parts(text: str) -> tuple[tuple[Stage, ...], int, str]:
    left, equals, right = text.partition("=")
    count, at, hardware = right.partition("@")
    if not equals or not count.strip().isdecimal() or not int(count) or (at and not hardware.strip()):
        raise ValueError(f"--pools {text!r} {FORM}")
    typed = [stage.strip() for stage in left.split("+")]
    for stage in typed:
        if stage not in STAGES:
            raise unknown("stage", stage, STAGES)
    return tuple(stage for stage in STAGES if stage in typed), int(count), hardware.strip()


def assembled(held: Mapping[str, Any], settings: Sequence[str], gpus: int | None, times: int = 1) -> ServingPlan:
    """Return the plan of pools that say how many devices they have, with settings and derived links.

    Parameters
    ----------
    held : mapping
        Fields of a plan; each pool has `devices` in place of workers.
    settings : sequence of str
        See `set_fields`.
    gpus : int or None
        Devices of all pools together, if it was said.
    times : int
        How often every pool is there.

    Raises
    ------
    ValueError
        If devices do not make whole workers, are not `gpus`, or pools cannot work together.
    """
    fields = {**held, "pools": [dict(pool) for pool in held["pools"]], "policies": dict(held.get("policies", {}))}
    link_fields = set_fields(fields, settings)
    try:
        pools = [_pool(fields_of) for fields_of in fields["pools"]]
        if gpus is not None and sum(pool.devices for pool in pools) != gpus:
            each = ", ".join(f"{pool.name} {pool.devices}" for pool in pools[:MOST_SHOWN])
            raise ValueError(
                f"--gpus {gpus} must be what the pools have together, {sum(pool.devices for pool in pools)} ({each});"
                " change one of them"
            )
        if link_fields and len(pools) == 1:
            raise ValueError(
                f"--set links.{next(iter(link_fields))}=… changes no link: one pool does everything; leave it out"
            )
        others = {key: value for key, value in fields.items() if key not in ("model", "pools", "links")}
        return with_links(fields["model"], scaled_pools(pools, times), settings=link_fields, others=others)
    except ValidationError as error:
        raise one_line(error, "plan") from None


def _pool(fields: Mapping[str, Any]) -> Pool:
    """Return a pool whose workers use up its devices, unless they are said themselves."""
    devices = fields["devices"]
    load_hardware(fields["hardware"])
    one = Pool.model_validate({key: value for key, value in fields.items() if key != "devices"})
    if "workers" in fields:
        return one
    each = one.devices_per_worker
    if devices % each:
        raise ValueError(
            f"pool {one.name!r}: devices={devices} must be a multiple of the {each} of a worker (tp x pp x dp);"
            " change either"
        )
    return one.model_copy(update={"workers": devices // each})


def set_fields(held: dict[str, Any], settings: Sequence[str]) -> dict[str, str]:
    """Write settings into the fields of a plan, and return those of links.

    Parameters
    ----------
    held : dict
        Fields of a plan; its pools and policies are changed.
    settings : sequence of str
        `pool.KEY=VALUE` for all pools, `NAME.KEY=VALUE` for one, `policies.KEY=VALUE`, `links.KEY=VALUE` for all links.

    Raises
    ------
    ValueError
        If one reads otherwise.
    """
    links: dict[str, str] = {}
    pools = held["pools"]
    by_name = {pool.get("name", "all"): pool for pool in pools}
    for text in settings:
        owner = next((name for name in (*WHOLE_PLAN, *by_name) if text.startswith(f"{name}.")), None)
        key, equals, value = text[len(owner) + 1 :].partition("=") if owner else ("", "", "")
        if owner is None or not key or not equals:
            raise ValueError(
                f"--set {text!r} must read pool.KEY=VALUE, policies.KEY=VALUE, links.KEY=VALUE or NAME.KEY=VALUE, such"
                f" as pool.max_batch=64; names: {', '.join(by_name)}"
            )
        whole = {"pool": pools, "policies": [held.setdefault("policies", {})], "links": [links]}
        for target in whole.get(owner) or [by_name[owner]]:
            target[key] = value
    return links
