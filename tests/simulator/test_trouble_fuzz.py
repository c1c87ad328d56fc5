"""Random troubles under any traffic: nothing hangs, loses a request or breaks a law; a leap is its steps bit by bit."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.simulator.trouble_fuzz import troubled, troubles_of

QUICK = [Phase.explicit, Phase.reuse, Phase.generate]  # to shrink a simulation takes minutes


@pytest.mark.slow
@settings(max_examples=150, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.too_slow])
@given(troubled())
def test_any_trouble_under_any_traffic_keeps_the_laws(case):
    assert not troubles_of(*case)
