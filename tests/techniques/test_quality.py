"""Published quality: at published settings, between them, and unknown everywhere else."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel import Image, Workload, predict
from costmodel.quality import combined, quality_dict, quality_of
from costmodel.techniques import technique
from costmodel.techniques.method import QualityPoint

SHARES = st.floats(0.0, 1.2, allow_nan=False)


@dataclass(frozen=True)
class Own:
    name: str = "own"
    slot: str = ""
    needs_attention_map: str = "none"

    def apply(self, query):
        return query


def test_a_published_setting_has_the_published_retention():
    assert quality_of(technique("visionzip", keep=0.333333)).retention == pytest.approx(0.985)
    assert quality_of(technique("sparsevlm")).retention == pytest.approx(0.991)
    assert quality_of(technique("sparsevlm", variant="64")).retention == pytest.approx(0.893)
    assert quality_of(technique("fastv", variant="75")).retention == pytest.approx(80.9 / 81.9)
    assert quality_of(technique("hybridkv", variant="10")).retention == pytest.approx(2.85 / 2.93)


def test_of_several_benchmarks_the_lowest_counts():
    found = quality_of(technique("prumerge"))
    assert found.benchmarks == pytest.approx({"VQAv2 (llava-1.5-7b)": 72.0 / 78.5, "POPE (llava-1.5-7b)": 76.3 / 85.9})
    assert found.retention == min(found.benchmarks.values())
    pairs = quality_of(technique("randrelax", variant="75"))
    assert pairs.retention == pytest.approx(0.814)
    assert len(pairs.benchmarks) == 3


@given(st.floats(0.25, 0.5))
def test_between_two_published_settings_retention_is_between_theirs(keep):
    low, high = 80.9 / 81.9, 81.3 / 81.9
    found = quality_of(technique("fastv", keep=keep)).retention
    assert low - 1e-12 <= found <= high + 1e-12
    assert found == pytest.approx(low + (high - low) * (keep - 0.25) / 0.25)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fastv", {"keep": 0.2}),  # below what was published
        ("fastv", {"keep": 0.6}),  # above
        ("fastv", {"keep": 0.4, "layer": 3}),  # another layer: one published setting makes no line
        ("fastv", {"masked": True}),
        ("fastv", {"keep": np.array([0.25, 0.5])}),  # a sweep is many
        ("randrelax", {"probability": 0.6}),  # a table, not a curve
        ("vidcom2", {"keep": 0.15}),
        ("pdrop", {"schedule": "8:0.4"}),
    ],
)
def test_elsewhere_it_is_unknown_and_says_so(name, parameters):
    found = quality_of(technique(name, **parameters))
    assert found.retention is None
    assert found.reason.startswith("published at other settings alone")


def test_what_nobody_published_is_unknown_and_says_so():
    assert quality_of(Own()).retention is None
    assert quality_of(technique("token_reduce", keep=0.5)).reason.startswith("no published method")
    assert quality_of(technique("trim")).reason.endswith("not found")


def test_lossless_holds_whatever_the_arguments():
    assert quality_of(technique("specvlm_ji", tokens=5.0, accepted=2.0)).retention == 1.0
    assert quality_of(technique("msd", accepted=1.5)).retention == 1.0


@given(st.lists(SHARES, max_size=5))
def test_losses_add_and_gains_do_not_pay_for_them(shares):
    kept = combined(shares)
    assert 0.0 <= kept <= 1.0
    assert kept <= min([1.0, *shares]) + 1e-12
    assert kept == pytest.approx(max(0.0, 1.0 - sum(1.0 - min(1.0, share) for share in shares)))
    assert combined([*shares, None]) is None
    assert combined([*shares, 1.1]) == pytest.approx(kept)


def test_the_dictionary_names_rule_techniques_and_sources():
    both = quality_dict([technique("fastv"), technique("visionzip")])
    assert both["estimate"] is True
    assert "losses" in both["rule"]
    assert both["retention"] == pytest.approx(81.3 / 81.9 + 0.9386665 - 1, abs=1e-6)
    assert [one["technique"] for one in both["techniques"]] == ["fastv", "visionzip"]
    assert "pkunlp-icler/FastV" in both["techniques"][0]["reason"]
    assert quality_dict([technique("fastv"), technique("trim")])["retention"] is None
    assert quality_dict([]) is None


def test_predictions_carry_it():
    workload = Workload(images=[Image(336, 336)])
    plain = predict("llava-1.5-13b", "a100-sxm4-80gb", workload)
    pruned = predict("llava-1.5-13b", "a100-sxm4-80gb", workload, techniques=[technique("fastv")])
    assert plain.as_dict()["quality"] is None
    assert pruned.as_dict()["quality"]["retention"] == pytest.approx(81.3 / 81.9)


def test_a_score_comes_with_its_baseline_or_alone():
    for values in ({}, {"baseline": 1.0}, {"baseline": 1.0, "value": 0.9, "kept": 0.9}):
        with pytest.raises(ValueError, match="baseline and value, or kept alone"):
            QualityPoint(benchmark="b", model="m", source="s", **values)
