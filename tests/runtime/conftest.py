"""Real and own models of every family, built once; modules skip themselves where torch or transformers is absent."""

import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Return the pair of a name, built at its first use."""
    from tests.runtime import tiny

    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny.pair(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
