"""ListOps: values against an evaluator that shares nothing with the generator, shapes and shares against the published rule."""

import statistics
from functools import partial

import numpy as np
import pytest

from lba_exp.data.generate import listops
from lba_exp.data.generate.blocks import generate

RULE = listops.ListOpsRule()


def drawn(count: int, seed: int = 0) -> listops.Sequences:
    return listops.make(RULE, np.random.default_rng(seed), count)


def parse(words: list[str]):
    """The nested lists ("[MAX", argument, ...) of a sequence; fails where it is no tree."""
    stack = [[]]
    for word in words:
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            node = stack.pop()
            stack[-1].append(node)
        else:
            stack[-1].append(int(word))
    assert len(stack) == 1 and len(stack[0]) == 1
    return stack[0][0]


def evaluate(node) -> int:
    """From the task's definition (arXiv 1804.06028), by recursion."""
    if isinstance(node, int):
        return node
    values = [evaluate(child) for child in node[1:]]
    if node[0] == "[MIN":
        return min(values)
    if node[0] == "[MAX":
        return max(values)
    if node[0] == "[MED":
        return int(statistics.median(values))
    assert node[0] == "[SM"
    return sum(values) % 10


def nodes(node, depth: int = 1):
    yield depth, node
    for child in [] if isinstance(node, int) else node[1:]:
        yield from nodes(child, depth + 1)


def trees(samples: listops.Sequences):
    return [parse([listops.TOKENS[token] for token in sequence]) for sequence in samples]


def check_values(samples: listops.Sequences) -> None:
    assert [evaluate(tree) for tree in trees(samples)] == samples.labels.tolist()


def test_values_are_those_of_another_evaluator():
    check_values(drawn(400))


@pytest.mark.slow
def test_ten_thousand_values_are_those_of_another_evaluator():
    check_values(drawn(10_000, seed=1))


def test_the_evaluator_can_tell():
    samples = drawn(3)
    samples.labels[1] = (samples.labels[1] + 1) % 10
    with pytest.raises(AssertionError):
        check_values(samples)


def test_trees_are_those_of_the_rule():
    samples = drawn(600, seed=2)
    assert samples.lengths.sum() == len(samples.tokens) and listops.TOKENS.index("<pad>") == 0 and samples.tokens.min() > 0
    assert samples.lengths.min() > 500 and samples.lengths.max() < 2_000
    found = [pair for tree in trees(samples) for pair in nodes(tree)]
    assert max(depth for depth, _ in found) == 10
    operations = [node for _, node in found if not isinstance(node, int)]
    assert all(depth < 10 for depth, node in found if not isinstance(node, int))
    assert {len(node) - 1 for node in operations} == set(range(2, 11))
    assert all(isinstance(tree, list) for tree in trees(samples))
    digits = np.bincount([node for _, node in found if isinstance(node, int)]) / sum(isinstance(node, int) for _, node in found)
    assert np.abs(digits - 0.1).max() < 0.005
    shares = {name: sum(node[0] == name for node in operations) / len(operations) for name in ("[MIN", "[MAX", "[MED", "[SM")}
    assert all(abs(share - 0.25) < 0.01 for share in shares.values()), shares


def test_below_the_root_a_node_is_a_digit_in_three_of_four_cases_and_no_number_of_arguments_is_favoured():
    free = listops.ListOpsRule(longer_than=0, shorter_than=10**9)  # the bounds of the length favour trees with many operations
    found = [pair for tree in trees(listops.make(free, np.random.default_rng(3), 600)) for pair in nodes(tree)]
    inner = [isinstance(node, int) for depth, node in found if 1 < depth < 10]
    assert abs(np.mean(inner) - 0.75) < 0.01
    counts = np.bincount([len(node) - 1 for _, node in found if not isinstance(node, int)])[2:]
    assert np.abs(counts / counts.sum() - 1 / 9).max() < 0.01


def test_samples_depend_on_the_seed_and_the_split_alone():
    def tokens(seed, split, workers, size=20):
        parts = generate(partial(listops.make, RULE), 50, size, seed=seed, split=split, workers=workers)
        return np.concatenate([part.tokens for part in parts])

    one = tokens(0, 0, 1)
    assert np.array_equal(one, tokens(0, 0, 3))
    assert not np.array_equal(one[:500], tokens(1, 0, 1)[:500]) and not np.array_equal(one[:500], tokens(0, 1, 1)[:500])


def test_no_sample_comes_twice():
    samples = drawn(1_000, seed=4)
    assert len({sequence.tobytes() for sequence in samples}) == 1_000
