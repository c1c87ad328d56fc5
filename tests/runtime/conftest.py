"""Real and own models of every family, built once."""

import pytest

pytest.importorskip("torch", reason="the runtime needs PyTorch: pip install 'lvlm-sim[runtime]'")
pytest.importorskip("transformers", reason="the oracle of the runtime is transformers: pip install 'lvlm-sim[test]'")


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
