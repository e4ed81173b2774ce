"""Crossovers and growth on times that are known in closed form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lba_exp.bench.growth import crossover, crossovers, growth, sentence

LENGTHS = st.lists(st.integers(1, 2**17), min_size=1, max_size=8, unique=True).map(sorted)


@given(LENGTHS, st.floats(1.0, 1e5), st.floats(0.5, 1.5), st.floats(0.1, 1.5))
def test_power_laws_cross_where_they_do(lengths, crossing, exponent, steeper):
    """ours = n^p, theirs the same at the crossing and steeper: straight lines in log-log, so the crossing is met exactly."""
    ours = {n: n**exponent for n in lengths}
    theirs = {n: crossing**exponent * (n / crossing) ** (exponent + steeper) for n in lengths}
    found = crossover(ours, theirs)
    if min(abs(math.log(n / crossing)) for n in lengths) < 1e-6:
        return  # at a measured length rounding decides
    if crossing < lengths[0]:
        assert found == {"where": "below", "length": None, "between": [lengths[0]]}
    elif crossing > lengths[-1]:
        assert found == {"where": "above", "length": None, "between": [lengths[-1]]}
    else:
        left, right = found["between"]
        assert found["where"] == "inside" and left < crossing < right and lengths.index(right) == lengths.index(left) + 1
        assert found["length"] == pytest.approx(crossing, rel=1e-6)


@given(st.dictionaries(st.integers(1, 9), st.floats(0.1, 10)), st.dictionaries(st.integers(1, 9), st.floats(0.1, 10)))
def test_faster_at_every_length_after_the_crossover(ours, theirs):
    common = sorted({*ours} & {*theirs})
    found = crossover(ours, theirs)
    if not common:
        assert found["where"] == "unknown"
        return
    after = {"below": common[0], "above": math.inf, "inside": (found["between"] or [0])[-1], "unknown": math.inf}[found["where"]]
    assert all(ours[n] < theirs[n] for n in common if n >= after)
    before = [n for n in common if n < after]
    assert not before or ours[before[-1]] >= theirs[before[-1]]


def cell(form, length, time, **changes):
    return {"dtype": "float32", "decay": "none", "pass": "forward", "form": form, "length": length, "median_ms": time} | changes


def test_lists():
    cells = [cell("softmax", n, n**2 / 500) for n in (100, 1000)] + [cell("chunkwise", n, n) for n in (1000, 100)]
    cells += [cell("parallel", 100, 50.0), cell("parallel", 1000, None)]
    entries = crossovers(cells)
    assert [(e["form"], e["overtakes"], e["where"]) for e in entries] == [
        ("chunkwise", "parallel", "above"),
        ("chunkwise", "softmax", "inside"),
    ]
    assert sentence(entries[0]) == (
        "no decay, float32, forward: chunkwise is not yet faster than parallel at 100, the longest measured in common."
    )
    assert sentence(entries[1]) == "no decay, float32, forward: chunkwise overtakes softmax at about 500 tokens (between 100 and 1,000)."
    steps = {g["form"]: (g["from"], g["to"], g["time_ratio"], g["exponent"]) for g in growth(cells)}
    assert steps == {"softmax": (100, 1000, pytest.approx(100), pytest.approx(2)), "chunkwise": (100, 1000, 10, pytest.approx(1))}


def test_groups_are_kept_apart():
    cells = [cell(f, 10, t, decay=d) for d, f, t in (("none", "chunkwise", 1), ("none", "softmax", 2), ("fixed", "chunkwise", 3))]
    assert [(e["decay"], e["where"]) for e in crossovers(cells)] == [("none", "below")]
