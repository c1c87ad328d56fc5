"""Random workers and traffic: nothing hangs, loses a request or breaks a law; a leap is its steps bit by bit."""

from hypothesis import HealthCheck, Phase, given, settings

from simulator import simulate
from simulator.laws import check
from simulator.trace import same
from tests.simulator.fuzz import plans, services, traffic

QUICK = [Phase.explicit, Phase.reuse, Phase.generate]  # to shrink a simulation takes minutes


@settings(max_examples=150, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), traffic(), services())
def test_any_worker_under_any_traffic_keeps_the_laws(plan, requests, service):
    trace = simulate(plan, requests, service=service)
    check(trace)
    stepped = simulate(plan, requests, service=service, leaps=False)
    check(stepped)
    assert same(trace, stepped)
    assert trace.events <= stepped.events + len(requests)
    assert same(trace, simulate(plan, requests, service=service))
