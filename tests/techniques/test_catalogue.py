"""The catalogue of published methods: files against what was noted, names, arguments, and what goes together."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from costmodel import Image, Unsupported, Workload, load_engine, load_model
from costmodel.query import build_query
from costmodel.techniques import compose, technique, technique_names
from costmodel.techniques.applied import VARIANT, Published, load_arguments
from costmodel.techniques.composing import parts_of
from costmodel.techniques.method import load_ids_by_name, load_method, load_method_texts, plain
from costmodel.techniques.primitives import load_fields, load_primitive, primitive_names
from costmodel.techniques.protocol import NEEDS, PLACES

GOLDEN = Path(__file__).parents[1] / "goldens" / "techniques.json"  # its source is named in the file
NOTED = {method["id"]: method for method in json.loads(GOLDEN.read_text(encoding="utf-8"))["methods"]}
METHODS = sorted(NOTED)
REWRITING = [identity for identity in METHODS if load_method(identity).primitives]
GIVEN = {
    "draft": "qwen2.5-vl-3b",
    "frames_keep": 0.5,
    "layer": 4,
    "layers": 4,
    "budget_tokens": 4000.0,
    "short_tokens": 8.0,
    "accepted": 2.0,
}
"""A value for what nobody published; a half for what is not named."""


def made(identity, **parameters):
    """Return a method, with a value for everything that its file lacks."""
    names = [names.split("|")[0] for names in load_method(identity).required]
    given = {name: GIVEN.get(name, 0.5) for name in names if not set(parameters) & set(alternatives(identity, name))}
    return technique(identity, **{**given, **parameters})


def alternatives(identity, name):
    return next(names.split("|") for names in load_method(identity).required if names.split("|")[0] == name)


def some_query():
    workload = Workload(images=[Image(336, 336)], text_tokens=32.0, output_tokens=16.0)
    return build_query(load_model("llava-1.5-7b"), workload, load_engine("ideal"))


# The files


def test_every_noted_method_is_a_file():
    assert technique_names() == METHODS
    assert len(METHODS) == 100


@pytest.mark.parametrize("identity", METHODS)
def test_a_file_says_what_was_noted(identity):
    noted, file = NOTED[identity], load_method(identity)
    for key in ("name", "category", "confidence", "source"):
        assert getattr(file, key) == noted[key]
    assert "+".join(file.stage) == noted["stage"]
    for key in ("where", "primitive", "defaults", "overheads", "composes", "quality", "published"):
        assert getattr(file.stated, key) == noted[key], key
    assert file.stated.parameters == noted["params"]
    assert dict(file.stated.effects) == {key: text for key, text in noted["effects"].items() if text != "="}
    if not noted["arxiv"].startswith("NF"):  # not found then
        assert file.paper.arxiv == noted["arxiv"]
    assert file.paper.title


@pytest.mark.parametrize("identity", METHODS)
def test_every_noted_default_is_a_number_of_the_file(identity):
    file = load_method(identity)
    held = set(numbers(file.settings)) | set(numbers(file.variants))
    for use in file.primitives:
        held |= set(numbers(use.parameters)) | {float(word) for word in re.findall(r"\d+(?:\.\d+)?", use.note)}
    missing = [value for value in printed(NOTED[identity]["defaults"]) if not any(is_told(value, h) for h in held)]
    assert not missing


def numbers(values):
    """Yield every number in a nested value."""
    if isinstance(values, bool | str):
        return
    if isinstance(values, int | float):
        yield float(values)
        return
    for value in values.values() if hasattr(values, "values") else values:
        yield from numbers(value)


def printed(text):
    """Return the numbers of a sentence: not those in names, of tables, or in remarks in square brackets."""
    text = re.sub(r"\[(?:patch sizes|detail|prior)[^]]*\]|survey Table \d+", "", text)
    text = re.sub(r"[A-Za-z][\w.]*-\d[\w.]*|\b[A-Za-z]+\d[\w.]*", "", text)  # LLaVA-1.5, DINOv2
    text = re.sub(r"(?<![\d.])1/([1-9]\d*)(?![\d.])", lambda found: str(1 / int(found[1])), text)
    numbers = re.findall(r"(?<![\w.])(-?\d+(?:\.\d+)?)(K?)(?![\dA-JL-Zac-wyz])", text)
    return [float(number) * (1000 if unit else 1) for number, unit in numbers]


def is_told(value, held):
    """Return whether a number of a file says what is printed: as it is, in percent, or as what is left."""
    options = (value, value / 100, abs(value) / 100, 1 - value, 1 - value / 100, -value)
    return any(abs(option - held) < 5e-4 * max(1.0, abs(held)) for option in options)


@pytest.mark.parametrize("identity", METHODS)
def test_what_was_not_found_stays_so(identity):
    noted, file = NOTED[identity], load_method(identity)
    if noted["quality"] in ("not found", "-"):
        assert not file.quality
    if not file.primitives:
        assert file.instead
        with pytest.raises(Unsupported, match="rewrites no request"):
            technique(identity)
    elif file.required:
        with pytest.raises(ValueError, match="was not published; give it"):
            technique(identity)
    else:
        assert technique(identity) is technique(identity)


@pytest.mark.parametrize("identity", REWRITING)
def test_a_method_sets_fields_of_its_primitives_and_every_argument_can_be_given(identity):
    file, method = load_method(identity), made(identity)
    for use, part in zip(file.primitives, method.parts, strict=True):
        assert set(use.parameters) <= set(load_fields(use.kind)), use.kind
        assert isinstance(part, load_primitive(use.kind))
        assert part.name == identity
        assert part.stages in PLACES
        assert part.needs <= set(NEEDS)
    assert len(load_arguments(identity)) == sum(len(load_fields(use.kind)) for use in file.primitives)
    slots = [part.slot for part in method.parts]
    assert len(slots) == len(set(slots))
    assert VARIANT not in load_arguments(identity)
    assert not file.knob or file.knob in load_arguments(identity)
    assert {name for names in file.required for name in names.split("|")} <= set(load_arguments(identity))


@pytest.mark.parametrize("identity", REWRITING)
def test_variants_and_published_qualities_are_arguments(identity):
    file = load_method(identity)
    for name in file.variants:
        changed = made(identity, variant=name)
        assert changed.parts != technique(identity).parts or file.variants[name].items() <= defaults(file).items()
    for point in file.quality:
        assert set(point.at) <= set(load_arguments(identity))
        assert 0 < point.retention < 1.3


def defaults(file):
    return {use.prefix + field: value for use in file.primitives for field, value in use.parameters.items()}


@pytest.mark.parametrize("identity", METHODS)
def test_measurements_are_those_of_the_list(identity, shared_data):
    with (shared_data / "validation" / "technique_measurements.csv").open(encoding="utf-8", newline="") as lines:
        listed = {int(line["rank"]): line for line in csv.DictReader(lines)}
    for point in load_method(identity).efficiency:
        line = listed[point.rank]
        assert (point.metric, point.unit, point.model, point.hardware, point.source) == tuple(
            line[key] for key in ("metric", "unit", "model", "hardware", "source")
        )
        assert line["config"] in point.setting
        assert point.baseline == (float(line["baseline_value"]) if line["baseline_value"] else None)
        assert point.value == (float(line["method_value"]) if line["method_value"] else None)


def test_a_broken_file_is_one_line(monkeypatch):
    texts = {**load_method_texts(), "broken": load_method_texts()["fastv"].replace("confidence", "certainty")}
    monkeypatch.setattr("costmodel.techniques.method.load_method_texts", lambda: texts)
    load_method.cache_clear()
    with pytest.raises(ValueError, match="technique broken: ") as caught:
        load_method("broken")
    load_method.cache_clear()
    assert "\n" not in str(caught.value)


# Names and arguments


def test_usual_names_are_aliases_and_belong_to_one_method():
    owners = {}
    for identity in METHODS:
        file = load_method(identity)
        for name in (identity, file.name, *file.aliases):
            assert owners.setdefault(plain(name), identity) == identity, name
    assert owners == dict(load_ids_by_name())
    for usual, identity in {"PyramidDrop": "pdrop", "LOOK-M": "lookm", "FasterVLM": "vispruner"}.items():
        assert technique(usual).name == identity


def test_a_primitive_goes_by_its_own_name():
    assert "token_reduce" in primitive_names()
    half = technique("token_reduce", at="layer", layer=2.0, keep=0.5)
    assert (half.layer, half.keep, half.name) == (2, 0.5, "token_reduce")
    assert not isinstance(half, Published)


def test_arguments_of_the_command_line_become_what_fields_are():
    changed = technique("pdrop", schedule="8:0.5/16:0.25")
    assert changed.parts[0].schedule == ((8, 0.5), (16, 0.25))
    assert technique("fastv", masked="true").parts[0].masked is True
    assert technique("sparsevlm", variant=64.0).parts[0].schedule[0] == (2, 0.114583)
    assert technique("holitom", inner_keep=0.25).parts[1].keep == 0.25
    assert technique("holitom", inner_keep=0.25).parts[0] is technique("holitom").parts[0]
    keeps = np.array([0.25, 0.5])
    assert technique("fastv", keep=keeps).parts[0].keep is keeps


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("fastw", {}, r"unknown technique 'fastw'; did you mean 'fastv'\?"),
        ("fastv", {"keeps": 0.5}, r"unknown parameter of technique fastv 'keeps'; did you mean 'keep'\?"),
        ("token_reduce", {"keeps": 0.5}, "unknown parameter of technique token_reduce 'keeps'"),
        ("sparsevlm", {"variant": 100.0}, "unknown variant of technique sparsevlm '100'"),
    ],
)
def test_unknown_names_are_named_with_the_nearest(name, parameters, says):
    with pytest.raises(LookupError, match=says) as caught:
        technique(name, **parameters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("fastv", {"keep": "half"}, "fastv.keep='half' must be a number"),
        ("pdrop", {"schedule": "8-0.5"}, "pdrop.schedule='8-0.5' must read 8:0.5/16:0.25"),
        ("livevlm", {"keep": 0.5}, "retrieve_read or retrieve_tokens was not published"),
    ],
)
def test_values_that_do_not_fit_are_one_line(name, parameters, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        technique(name, **parameters)
    assert "\n" not in str(caught.value)


# Together


@dataclass(frozen=True)
class Marked:
    """Appends its name to a list: a technique of our own."""

    name: str
    stages: str
    slot: str = ""
    at: str = ""
    needs: frozenset = frozenset()
    needs_attention_map: str = "none"

    def apply(self, query):
        query.applied.append(self.name)
        return query


@dataclass
class Log:
    applied: list


def test_techniques_apply_by_place_whatever_the_order():
    places = [Marked(place, place) for place in PLACES]
    for given in (places, places[::-1]):
        log = Log([])
        assert compose(log, given) is log
        assert log.applied == list(PLACES)


def test_within_a_place_tokens_apply_where_they_appear_and_caches_from_what_to_how():
    log = Log([])
    tokens = [Marked(at, "visual_tokens", f"{at} tokens", at) for at in ("pre_llm", "encoder_out", "encoder_layer")]
    caches = [Marked(slot, "kv", slot) for slot in ("stream", "kv read", "kv bits", "kv tokens")]
    compose(log, [*caches, *tokens])
    assert log.applied == ["encoder_layer", "encoder_out", "pre_llm", "kv tokens", "kv bits", "kv read", "stream"]


def test_a_technique_of_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match=r"nowhere\.stages='moon' must be one of frames"):
        compose(Log([]), [Marked("nowhere", "moon")])


def test_the_original_query_is_unchanged_and_parts_apply_alone_or_together():
    query = some_query()
    before = len(query.overheads)
    both = compose(query, [technique("visionzip"), technique("fastv")])
    assert both is not query
    assert len(query.overheads) == before
    assert [part.name for part in parts_of([technique("fastv"), technique("visionzip")])] == ["visionzip", "fastv"]
    assert len(parts_of([technique("dycoke")])) == 2


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("fastv", "pdrop"), "both take slot"),
        (("fastv", "sparsevlm"), "both take slot"),
        (("lookm", "vlcache"), "both take slot"),
        (("prunevid", "fastv"), "both take slot"),
        (("visionzip", "convllava"), "puts another encoder in its place"),
        (("fastvid", "fastvlm"), "puts another encoder in its place"),
        (("prumerge", "fastvit"), "puts another encoder in its place"),
        (("holitom", "streamingvlm"), "must see the whole video"),
        (("vidcom2", "rekv"), "must see the whole video"),
        (("elastic", "specvlm_ji"), "must be rolled back"),
        (("fastv", "himix"), "none run there"),
    ],
)
def test_pairs_that_cannot_be_are_refused_in_either_order(names, says):
    for given in (names, names[::-1]):
        with pytest.raises(ValueError, match=says) as caught:
            compose(some_query(), [made(name) for name in given])
        assert all(name in str(caught.value) for name in names)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("visionzip", "fastv", "akvq", "specvlm_ji"),  # the worked example of what goes together
        ("folder", "fastv"),
        ("pvc", "visionzip"),  # its encoder still is a ViT
        ("fastv", "mminf"),
        ("lookm", "akvq"),
        ("timechat", "streamingvlm"),
        ("lookm", "specvlm_ji"),
        ("specvlm_ji", "randrelax"),
    ],
)
def test_pairs_that_can_be_pass(names):
    parts = parts_of([made(name) for name in names])
    assert [part.place for part in parts] == sorted((part.place for part in parts), key=PLACES.index)
    from costmodel.techniques.composing import check

    check(parts)
