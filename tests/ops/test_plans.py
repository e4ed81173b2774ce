"""Which plan a launch of the fused form takes: overriding ones, tuned ones, candidates that do not fit."""

import dataclasses
import json

import pytest
import torch

from lba_exp.ops.fused import operator

pytestmark = pytest.mark.skipif(not operator.HAS_TRITON, reason="needs Triton")
if operator.HAS_TRITON:
    from triton.runtime.errors import OutOfResources

    from lba_exp.ops.fused import plan as plans
    from lba_exp.ops.fused import tuned
    from lba_exp.ops.fused.candidates import CANDIDATES, SHORT

KEY = ("backward", "half", 64, "long")
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "plans.json"
    path.parent.mkdir()
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(plans, "_TOO_LARGE", set())
    monkeypatch.setattr(plans, "device_name", lambda device: "a GPU")
    tuned.plans.cache_clear()
    yield path
    tuned.plans.cache_clear()


def taken(run=lambda plan: plan):
    return plans.with_plan("backward", torch.bfloat16, 64, 999, CPU, run)


def test_every_candidate_is_one_that_can_be_launched():
    for (kind, _, width, span), listed in CANDIDATES.items():
        assert len(set(listed)) == len(listed) >= 2 and width in (64, 128) and span in ("short", "long")
        for plan in listed:
            sizes = (plan.rows, plan.columns, plan.state_columns)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            if kind != "linear":
                assert all(plan.block % size == 0 for size in sizes)
            assert kind != "backward" or plan.columns % plan.rows == 0
    wanted = {
        (k, p, w, s) for k in ("forward", "backward", "linear") for p in ("half", "full") for w in (64, 128) for s in ("short", "long")
    }
    assert set(CANDIDATES) == wanted


@pytest.mark.parametrize("length", [1, 2, 17, 64, 100, 128, SHORT])
def test_a_plan_is_cut_to_a_short_sequence(length):
    for (kind, *_), listed in CANDIDATES.items():
        for plan in listed:
            cut = plans.clipped(plan, length)
            assert cut.block <= max(16, 2 * length) or kind == "linear"
            sizes = (cut.rows, cut.columns, cut.state_columns)
            assert kind == "linear" or (cut.block >= min(length, plan.block) and all(cut.block % size == 0 for size in sizes))


def test_the_first_candidate_is_the_default_and_an_override_goes_before_it(file):
    assert taken() == CANDIDATES[KEY][0]
    other = dataclasses.replace(CANDIDATES[KEY][0], warps=8)
    with plans.override("backward", other):
        assert taken() == other
        with plans.override("backward", CANDIDATES[KEY][1]):
            assert taken() == CANDIDATES[KEY][1]
        assert taken() == other
    assert taken() == CANDIDATES[KEY][0]


def test_what_does_not_fit_gives_way_once_and_for_all(file):
    tried = []

    def run(plan):
        tried.append(plan)
        if plan != CANDIDATES[KEY][-1]:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return "ran"

    assert [taken(run), taken(run)] == ["ran", "ran"]
    assert tried == [*CANDIDATES[KEY], CANDIDATES[KEY][-1]]

    def never(plan):
        raise OutOfResources(1, 0, "shared memory")

    with pytest.raises(OutOfResources):
        taken(never)


def test_a_tuned_plan_goes_first_on_its_gpu_alone(file):
    best = CANDIDATES[KEY][2]
    file.write_text(tuned.text_of("another GPU", {KEY: CANDIDATES[KEY][1]}))
    file.write_text(tuned.text_of("a GPU", {KEY: best}))
    assert taken() == best and tuned.plans("another GPU") == {KEY: CANDIDATES[KEY][1]} and tuned.plans("a third GPU") == {}
    assert plans.candidates(KEY, "a GPU") == tuple(dict.fromkeys((best, *CANDIDATES[KEY])))
    file.write_text(tuned.text_of("a GPU", {("forward", "half", 64, "short"): CANDIDATES["forward", "half", 64, "short"][1]}))
    assert len(json.loads(file.read_text())[tuned.section("a GPU")]) == 2  # what was there stays


def test_a_plan_that_is_no_candidate_is_not_taken(file):
    file.write_text(tuned.text_of("a GPU", {KEY: dataclasses.replace(CANDIDATES[KEY][0], warps=16)}))
    assert taken() == CANDIDATES[KEY][0]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a GPU": 3}', "SECTION"], ids=["no JSON", "list", "number", "sizes"])
def test_a_file_of_another_kind_is_left_alone_with_a_warning(file, text):
    file.write_text(json.dumps({tuned.section("a GPU"): {"backward half 64 long": ["x"]}}) if text == "SECTION" else text)
    if text == "SECTION":
        assert taken() == CANDIDATES[KEY][0]  # no candidate
        file.write_text(json.dumps({tuned.section("a GPU"): {"backward half": [1]}}))
        tuned.plans.cache_clear()
    with pytest.warns(UserWarning, match="holds no plans of the fused form"):
        assert taken() == CANDIDATES[KEY][0]
    file.write_text(text if text != "SECTION" else "{")
    assert json.loads(tuned.text_of("a GPU", {KEY: CANDIDATES[KEY][1]}))
