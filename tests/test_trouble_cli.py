"""Failures and control by command: what a PLAN.toml says of them, what the report shows, what is refused and how."""

import json

import pytest

from simulator import ServingPlan
from studies import cli

POOLS = """
model = "qwen2.5-vl-7b"

[[pools]]
name = "encode"
stages = ["preprocess", "encode"]
hardware = "h100-sxm5-80gb"

[[pools]]
name = "language"
stages = ["prefill", "decode"]
hardware = "h100-sxm5-80gb"
workers = 2

[[pools]]
name = "cheap"
stages = ["preprocess", "encode", "prefill", "decode"]
hardware = "l4-24gb"

[[links]]
from = "encode"
to = "language"
bandwidth_bytes_per_s = 4.5e11
"""
TROUBLES = """
[[failures]]
kind = "crash"
pool = "language"
worker = 0
at_s = 2.0
for_s = 3.0

[[failures]]
kind = "link"
pool = "encode"
to = "language"
mean_time_between_s = 2.0
for_s = 0.5
bandwidth_left = 0.25

[control]
every_s = 1.0

[[control.scale]]
pool = "language"
most = 4
signal = "requests"
above = 5.0
below = 1.0
cold_start_s = 2.0

[[control.move]]
from = "encode"
to = "language"
above = 50.0
below = 1.0
switch_s = 0.7
"""
COMES = ["--workload", "image-1080p-1", "--rate", "8", "--requests", "60"]


@pytest.fixture
def lvlm(capsys, tmp_path):
    """Run `lvlm simulate` with a plan, and return its exit code, stdout and stderr."""

    def run(plan, *arguments):
        path = tmp_path / "plan.toml"
        path.write_text(plan)
        code = cli.main(["simulate", str(path), *COMES, *arguments])
        return (code, *capsys.readouterr())

    return run


def test_failures_and_control_are_the_same_after_a_file(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(POOLS + TROUBLES)
    plan = ServingPlan.read(path)
    assert [failure.kind for failure in plan.failures] == ["crash", "link"]
    assert plan.failures[1].bandwidth_left == 0.25
    assert plan.control.scale[0].least == 1
    assert plan.control.move[0].switch_s == 0.7
    path.write_text(plan.as_toml())
    assert ServingPlan.read(path) == plan


def test_the_report_says_what_went_wrong_and_what_was_paid(lvlm):
    code, out, _ = lvlm(POOLS + TROUBLES)
    assert code == 0
    text = " ".join(out.split())
    assert "went wrong: 1 x a worker crashed, " in text
    assert " x a link was lost or slow; requests began anew " in text
    assert "pool 'language': " in text
    assert " worker-hours were paid; 2 all the time would be " in text
    assert "pool 'cheap': " not in text


def test_json_has_failures_retries_and_paid_time(lvlm):
    code, out, _ = lvlm(POOLS + TROUBLES, "--json")
    assert code == 0
    found = json.loads(out)
    values = found.get("values", found)
    assert values["failures"]["crash"] == 1
    assert values["failures"]["link"] > 1
    assert values["retries"] > 0
    assert values["paid_worker_s"]["cheap"] == pytest.approx(values["span_s"])
    assert values["paid_worker_s"]["language"] != pytest.approx(2 * values["span_s"])


def test_a_plan_without_troubles_speaks_of_none(lvlm):
    code, out, _ = lvlm(POOLS)
    assert code == 0
    assert "went wrong" not in out
    assert "worker-hours" not in out


def failing(**keys):
    return "\n[[failures]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())


def scaling(**keys):
    rule = {"pool": "language", "most": 4, "above": 2.0, "below": 1.0, **keys}
    return "\n[[control.scale]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in rule.items())


def moving(source, target):
    return f'\n[[control.move]]\nfrom = "{source}"\nto = "{target}"\nabove = 2.0\nbelow = 1.0'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            failing(kind="crash", pool="lang", at_s=1.0),
            "names pool 'lang', which there is not; known: encode, language",
        ),
        (failing(kind="crash", pool="language", worker=2, at_s=1.0), "worker=2 of a failure must be one of pool 'lang"),
        (failing(kind="crash", pool="language"), "at_s=None and mean_time_between_s=None: give one of them"),
        (
            failing(kind="crash", pool="language", at_s=1.0, mean_time_between_s=1.0),
            "at_s=1.0 and mean_time_between_s=1.0: give one of them",
        ),
        (
            failing(kind="crash", pool="language", mean_time_between_s=9.0),
            "for_s=None must be given with mean_time_bet",
        ),
        (
            failing(kind="link", pool="language", to="encode", at_s=1.0),
            "from 'language' to 'encode' is of no link of th",
        ),
        (failing(kind="link", pool="encode", at_s=1.0), "to=None must name the receiving pool of a link"),
        (failing(kind="link", pool="encode", to="langage", at_s=1.0), "names pool 'langage', which there is not"),
        (failing(kind="preprocessing", pool="language", at_s=1.0), "needs a pool that runs 'preprocess'"),
        (failing(kind="preprocessing", pool="encode", worker=0, at_s=1.0), "worker=0 is of crashes and stragglers"),
        (failing(kind="fire", pool="language", at_s=1.0), "kind"),
        (scaling(pool="lang"), "control names pool 'lang', which there is not"),
        (scaling(least=3), "workers=2 of pool 'language' must be between least=3 and most=4 of its scaling"),
        (scaling(most=1), "workers=2 of pool 'language' must be between least=1 and most=1"),
        (scaling(most=1, least=2), "most=1 must be least=2 or more; raise it"),
        (scaling(below=2.0), "below=2 must be less than above=2; else workers come and go without end"),
        (scaling() + scaling(), "one of them by several rules that work against each other; keep one"),
        (moving("language", "cheap"), "workers of 'language' cannot move to 'cheap': hardware and devices of a worker"),
        (moving("language", "language"), "to='language' must be another pool than from; change one"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(lvlm, more, message):
    code, out, err = lvlm(POOLS + more)
    assert code == 2
    assert not out
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_pools_on_one_device_must_fit_together(lvlm):
    shared = POOLS.replace('name = "language"\n', 'name = "language"\nshares_devices_of = "encode"\n')
    guest = shared.replace("workers = 2", "workers = 1").replace("h100-sxm5-80gb", "t4-16gb")
    code, _, err = lvlm(guest)
    assert code == 3
    assert "all that pools 'encode' and 'language' hold on one t4-16gb needs " in err
    assert len(err.strip().splitlines()) == 1
