"""Random troubles for the fuzz tests: failures, workers that come, go and change their role, shared devices.

`python -m tests.simulator.trouble_fuzz 5000 1` and `python -m tests.simulator.trouble_fuzz 17/42` do what they do in
`tests.simulator.cluster_fuzz`.
"""

import sys
from dataclasses import replace

from hypothesis import strategies as st

from simulator import simulate
from simulator.engine import NOT_BACK
from simulator.rules import Control, Failure, Move, Scaling
from simulator.topology import Topology
from tests.simulator.cluster_fuzz import clusters, faults_of, main, moody
from tests.simulator.fuzz import services, traffic

FASTER = 1000
"""Times as fast as in other tests are links: hours on slow ones are millions of failures."""
TIMES_S = (0.0, 0.003, 0.05, 0.4, 3.0)


@st.composite
def failures(draw, plan):
    """Return up to three failures of a plan."""
    found = []
    for _ in range(draw(st.integers(0, 3))):
        pool = draw(st.sampled_from(plan.pools))
        kinds = ["crash", "straggler"]
        kinds += ["link"] if any(link.source == pool.name for link in plan.links) else []
        kinds += ["preprocessing"] if pool.runs("preprocess") else []
        kind = draw(st.sampled_from(kinds))
        held = {"kind": kind, "pool": pool.name, "slowdown": draw(st.sampled_from([1.5, 20.0]))}
        if kind == "link":
            held["to"] = draw(st.sampled_from([link.target for link in plan.links if link.source == pool.name]))
            held["bandwidth_left"] = draw(st.sampled_from([0.0, 0.3]))
        if kind in ("crash", "straggler"):
            held["worker"] = draw(st.sampled_from([None, pool.workers - 1]))
        again = draw(st.booleans())
        held["mean_time_between_s" if again else "at_s"] = draw(st.sampled_from(TIMES_S[1:] if again else TIMES_S))
        if again and kind == "link":  # one that is hardly ever there takes hours, and millions of failures
            held |= {"mean_time_between_s": draw(st.sampled_from([0.05, 0.4]))}
        held["for_s"] = draw(st.sampled_from([0.01, 0.5, 5.0] if again else [0.01, 0.5, 5.0, None]))
        found.append(Failure(**held))
    return tuple(found)


@st.composite
def controls(draw, plan):
    """Return rules for a plan, or None."""
    if draw(st.booleans()):
        return None
    signal = st.sampled_from(["waiting", "requests", "tokens"])
    scale, move = [], []
    for pool in plan.pools:
        if draw(st.booleans()):
            limits = {"least": draw(st.integers(1, pool.workers)), "most": pool.workers + draw(st.integers(0, 2))}
            gaps = {"above": draw(st.sampled_from([0.5, 2.0, 300.0])), "below": draw(st.sampled_from([0.0, 0.4]))}
            times = {"holds": draw(st.integers(1, 3)), "cold_start_s": draw(st.sampled_from([0.0, 0.3]))}
            scale.append(Scaling(pool=pool.name, signal=draw(signal), **limits, **gaps, **times))
    if len(plan.pools) > 1 and draw(st.booleans()):
        a, b = draw(st.permutations([pool.name for pool in plan.pools]))[:2]
        for source, target in ((a, b), (b, a)):
            rule = {"from": source, "to": target, "signal": draw(signal), "above": 1.0, "below": 3.0, "holds": 1}
            move.append(Move(**rule, switch_s=draw(st.sampled_from([0.0, 0.2]))))
    return Control(every_s=draw(st.sampled_from([0.02, 0.5])), scale=tuple(scale), move=tuple(move))


@st.composite
def sharing(draw, plan):
    """Return the plan, perhaps with two pools on the same devices."""
    if len(plan.pools) < 2 or not draw(st.sampled_from([False, False, True])):
        return plan
    host, guest, *rest = plan.pools
    guest = guest.model_copy(update={"shares_devices_of": host.name, "workers": host.workers})
    pools = (host, guest, *rest)
    _ = Topology(pools=pools, links=plan.links)
    return plan.model_copy(update={"pools": pools})


@st.composite
def troubled(draw):
    """Return a plan with troubles, its traffic and its service."""
    plan = draw(sharing(draw(clusters())))
    faster = [
        link.model_copy(update={"bandwidth_bytes_per_s": FASTER * link.bandwidth_bytes_per_s}) for link in plan.links
    ]
    plan = plan.model_copy(update={"links": tuple(faster)})
    shared = any(pool.shares_devices_of for pool in plan.pools)
    troubles = {"failures": draw(failures(plan)), "control": None if shared else draw(controls(plan))}
    after = {"after_crash": draw(st.sampled_from(["retry", "fail"]))}
    plan = plan.model_copy(update={**troubles, "policies": plan.policies.model_copy(update=after)})
    service = replace(draw(services()), embedding_token_bytes=100.0, kv_token_bytes=50.0, kv_layers=4)
    return type(plan).model_validate(plan.model_dump(by_alias=True)), draw(moody(draw(traffic()))), service


def troubles_of(plan, requests, service):
    """Return what breaks; where all that fails is repaired, nobody may end for want of it."""
    faults = faults_of(plan, requests, service)
    if all(failure.for_s is not None for failure in plan.failures):
        reasons = simulate(plan, requests, service=service).reasons
        lost = [request for request, reason in reasons.items() if reason == NOT_BACK]
        faults += [f"given up though all is repaired: {lost}"] if lost else []
    return faults


if __name__ == "__main__":
    main(sys.argv[1:], troubled(), troubles_of)
