"""Random clusters and traffic: nothing hangs, loses a request or breaks a law; a leap is its steps bit by bit."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.simulator.cluster_fuzz import cases, faults_of

QUICK = [Phase.explicit, Phase.reuse, Phase.generate]  # to shrink a simulation takes minutes


@pytest.mark.slow
@settings(max_examples=150, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_cluster_under_any_traffic_keeps_the_laws(case):
    assert not faults_of(*case)
