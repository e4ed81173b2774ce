"""Spreads and paired tests against scipy and against counting by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lba_exp.results.statistics import MOST_FLIPS, compare_paired, sign_flip_p, spread

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=2, max_size=12))
def test_spread_is_that_of_numpy_and_scipy(values):
    deviation = np.std(np.float64(values), ddof=1)
    assert spread(values, "std") == pytest.approx(deviation, abs=1e-12)
    if deviation > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert spread(values, "ci95") == pytest.approx((high - low) / 2, rel=1e-9)
    assert spread(values, "none") is None


def test_one_value_has_no_spread():
    assert spread([1.0], "std") is None and spread([], "ci95") is None


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8))
def test_paired_comparison_is_that_of_scipy_and_of_all_signs(pairs):
    ours, base = ({i: pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    found = compare_paired(ours, base | {99: 1.0})  # a seed that only one of them has does not count
    differences = [a - b for a, b in pairs]
    assert found.pairs == len(pairs) and found.difference == pytest.approx(np.mean(differences), abs=1e-9)
    if np.std(differences) > 1e-6:
        assert found.p_t == pytest.approx(stats.ttest_rel(*np.float64(pairs).T).pvalue, rel=1e-6, abs=1e-12)
    observed = abs(math.fsum(differences))
    sums = [
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in itertools.product((1, -1), repeat=len(pairs))
    ]
    assert found.p_permutation == pytest.approx(sum(s >= observed - 1e-9 for s in sums) / len(sums), abs=1e-12)


def test_the_least_p_of_three_pairs():
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25 and sign_flip_p([0.0, 0.0]) == 1.0


def test_where_a_test_says_nothing():
    alone = compare_paired({0: 1.0}, {0: 3.0})
    assert (alone.pairs, alone.difference, alone.p_t, alone.p_permutation) == (1, -2.0, None, None)
    assert compare_paired({0: 1.0}, {1: 1.0}).difference is None
    assert compare_paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p_t is None, "equal differences have no spread to compare with"
    many = {i: float(i * i) for i in range(MOST_FLIPS + 1)}
    found = compare_paired(many, dict.fromkeys(many, 0.0))
    assert found.p_permutation is None and found.p_t is not None
