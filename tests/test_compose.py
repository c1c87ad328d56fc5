"""Techniques together: factors, what is missed of their product, and what explains it."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import Image, Workload, build_query, compose, evaluate, load_engine, load_hardware, load_model
from costmodel.composition import METRICS, NOTHING, bottleneck, compose_on, parts_of, value_of
from costmodel.operators import Kind, Operator
from costmodel.query import Overhead
from costmodel.solve import with_keep
from costmodel.techniques.relaxed_verify import RelaxedVerify
from costmodel.techniques.speculate import Speculate
from studies import cli, parse

A100 = "a100-sxm4-80gb"
WORKLOAD = Workload(images=[Image(1920, 1080)], text_tokens=64, output_tokens=65)


@dataclass(frozen=True)
class Thin:
    """Keeps a share of the visual tokens."""

    keep: float = 0.25
    slot: str = ""
    name: str = "thin"
    needs_attention_map: str = "none"

    def apply(self, query):
        return query if np.ndim(self.keep) == 0 and self.keep == 1 else with_keep(query, self.keep)


@dataclass(frozen=True)
class FewerPictures:
    """Shrinks what the encoder sees, and with it what comes out."""

    share: float = 0.5
    slot: str = ""
    name: str = "fewer-pictures"
    needs_attention_map: str = "none"

    def apply(self, query):
        media = query.media
        names = ("patches", "rows", "pairs", "window_pairs", "adapter_tokens", "resized_pixels")
        coded = tuple(pixels * self.share for pixels in media.coded_pixels)
        media = replace(media, coded_pixels=coded, **{name: getattr(media, name) * self.share for name in names})
        return replace(query, media=media, visual_tokens=query.visual_tokens * self.share)


@dataclass(frozen=True)
class Bits:
    """Narrows the cache."""

    bits: float = 4
    slot: str = "kv bits"
    name: str = "bits"
    needs_attention_map: str = "none"

    def apply(self, query):
        return replace(query, kv=tuple(replace(entry, bits=self.bits) for entry in query.kv))


@dataclass(frozen=True)
class Scored:
    """Costs something and saves nothing."""

    slot: str = ""
    name: str = "scored"
    needs_attention_map: str = "none"

    def apply(self, query):
        scoring = Overhead("prefill", (Operator("scoring", Kind.GEMM, flops=5e12),))
        return replace(query, overheads=(*query.overheads, scoring))


def query_of(name="qwen2.5-vl-7b", engine="ideal", **settings_):
    return build_query(load_model(name), WORKLOAD, load_engine(engine), **settings_)


def composed(*techniques, name="qwen2.5-vl-7b", engine="ideal", device=A100, **settings_):
    return compose_on(query_of(name, engine, **settings_), load_hardware(device), techniques)


def law(n_examples):
    return settings(max_examples=n_examples, deadline=None, derandomize=True, database=None)


TECHNIQUES = (Thin(0.1), Thin(0.6), FewerPictures(), Bits(), Scored(), Speculate(draft="qwen2.5-vl-3b", tokens=4))


@law(40)
@given(
    chosen=st.lists(st.sampled_from(TECHNIQUES), min_size=1, max_size=3, unique=True),
    engine=st.sampled_from(["ideal", "fused"]),
    batch=st.integers(1, 40),
)
def test_values_factors_and_products_agree(*, chosen, engine, batch):
    found = composed(*chosen, engine=engine, batch=float(batch))
    query, hardware = query_of(engine=engine, batch=float(batch)), load_hardware(A100)
    together = evaluate(compose(query, chosen), hardware)
    for one in found.interactions:
        assert one.plain == value_of(evaluate(query, hardware), one.metric)
        assert one.together == value_of(together, one.metric)
        for technique, alone, factor in zip(chosen, one.alone, one.factors, strict=True):
            assert alone == value_of(evaluate(technique.apply(query), hardware), one.metric)
            better = alone / one.plain if one.metric == "max_batch" else one.plain / alone
            assert factor == pytest.approx(better)
        assert one.guessed == pytest.approx(math.prod(one.factors))
        assert one.surplus == pytest.approx(one.reached / one.guessed - 1)
        if len(chosen) == 1:
            assert one.surplus == pytest.approx(0.0, abs=1e-12)
            assert one.explained_by == NOTHING


@law(40)
@given(
    chosen=st.lists(st.sampled_from(TECHNIQUES), max_size=3, unique=True),
    engine=st.sampled_from(["ideal", "fused"]),
    parallel=st.booleans(),
)
def test_the_parts_of_a_number_add_up_to_it(*, chosen, engine, parallel):
    chosen = [replace(t, parallel=parallel) if isinstance(t, Speculate) else t for t in chosen]
    p = evaluate(compose(query_of(engine=engine, batch=3.0), chosen), load_hardware(A100))
    for metric in METRICS:
        whole = 1 / p.max_batch if metric == "max_batch" else value_of(p, metric)
        total = sum(parts_of(p, metric).values())
        # the largest batch is rounded down, so its requests leave a little of the memory
        assert total == pytest.approx(whole, rel=0.1 if metric == "max_batch" else 1e-6), metric
        assert bottleneck(p, metric).part


def test_a_head_and_an_overhead_are_parts_of_a_stage():
    found = [Speculate(head_layers=1, tokens=4), Scored()]
    p = evaluate(compose(query_of(), found), load_hardware(A100))
    assert parts_of(p, "ttft_s")["prefill.scoring"] > 0
    assert parts_of(p, "ttft_s")["draft.prefill.join"] > 0
    assert parts_of(p, "tpot_s")["draft.decode.join"] > 0
    for metric in ("ttft_s", "tpot_s"):
        assert sum(parts_of(p, metric).values()) == pytest.approx(value_of(p, metric), rel=1e-6)


def test_what_no_technique_touches_leaves_a_deficit():
    found = composed(Thin(0.3), Thin(0.3)).interaction("ttft_s")
    assert found.surplus < -0.01  # the encoder and the pictures stand as before
    assert found.explained_by.partition(".")[0] in ("preprocess", "encode")


def test_two_that_save_the_same_leave_a_deficit_in_memory():
    one = composed(Thin(0.2), Bits(), batch=60.0).interaction("peak_bytes")
    assert one.surplus < 0
    assert one.explained_by in ("weights", "activations")  # what neither of them makes smaller


def test_techniques_on_different_stages_do_not_disturb_each_other():
    found = composed(Scored(), Bits())
    assert found.interaction("ttft_s").surplus == pytest.approx(0.0, abs=1e-9)
    assert found.interaction("tpot_s").surplus == pytest.approx(0.0, abs=1e-9)
    assert found.interaction("ttft_s").explained_by == NOTHING


def test_the_bottleneck_moves_to_what_is_left():
    found = composed(Thin(0.02), name="llava-1.5-7b", engine="fused")
    before, after = (bottleneck(p, "ttft_s") for p in (found.plain, found.together))
    assert before.part == "prefill"
    assert after.part != "prefill"
    assert before.operator.startswith("prefill.")


def test_what_cannot_stand_alone_is_measured_on_top():
    found = composed(Speculate(draft="qwen2.5-vl-3b"), RelaxedVerify(probability=0.5))
    assert found.on_top == (False, True)
    one = found.interaction("tpot_s")
    assert one.alone[1] == one.together
    assert one.factors[1] == pytest.approx(one.alone[0] / one.together)
    assert one.surplus == pytest.approx(0.0, abs=1e-9)


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least one technique"):
        composed()
    with pytest.raises(ValueError, match="both take slot 'kv bits'"):
        composed(Bits(), Bits(8))
    with pytest.raises(ValueError, match="speculate first"):
        composed(RelaxedVerify(probability=0.5))


# The command

KNOWN = {
    "thin": Thin,
    "pictures": FewerPictures,
    "bits": Bits,
    "speculate": Speculate,
    "relaxed_verify": RelaxedVerify,
}
ASKED = ["compose", "qwen2.5-vl-7b", A100, "--image", "1920x1080", "--technique", "thin:keep=0.2"]


@pytest.fixture
def lvlm(capsys, monkeypatch):
    monkeypatch.setattr(parse, "technique", lambda name, **fields: KNOWN[name](**fields))

    def run(*arguments):
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_compose_prints_a_page(lvlm):
    code, out, err = lvlm(*ASKED, "--technique", "bits", "--technique", "speculate:draft=qwen2.5-vl-3b")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    for words in ("1: thin:keep=0.2", "surplus", "times better", "bottleneck of TTFT"):
        assert words in out


def test_compose_json_has_the_keys_of_the_interface(lvlm):
    code, out, _ = lvlm(*ASKED, "--technique", "bits", "--json")
    assert code == 0
    values = json.loads(out)
    assert [one["name"] for one in values["alone"]] == ["thin", "bits"]
    assert [one["name"] for one in values["inputs"]["techniques"]] == ["thin", "bits"]
    assert set(values["interactions"]) == set(METRICS)
    one = values["interactions"]["ttft_s"]
    assert set(one) == {
        "plain", "alone", "together", "factors", "guessed", "reached", "surplus", "explained_by"
    }  # fmt: skip
    assert one["plain"] == values["plain"]["ttft_s"] > values["together"]["ttft_s"] == one["together"]
    assert set(values["plain"]["bottlenecks"]["tpot_s"]) == {"part", "bound", "operator"}


def test_compose_csv_has_a_row_a_number(lvlm):
    code, out, _ = lvlm(*ASKED, "--csv")
    assert code == 0
    assert len(out.splitlines()) == 1 + len(METRICS)


def test_compose_says_what_it_needs(lvlm):
    code, out, err = lvlm(*ASKED[:-2])
    assert (code, out) == (2, "")
    assert "give --technique" in err
    code, _, err = lvlm("compose", "qwen2.5-vl-72b", A100, "--technique", "bits")
    assert code == 3
    assert "does not fit" in err


def test_numbers_are_single_ones():
    assert np.isscalar(composed(Thin()).interaction("ttft_s").together)
