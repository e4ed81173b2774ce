"""From a sweep file and a command line to jobs: what is valid expands to what its definition says, a mistake is one sentence."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lba_exp import composing
from lba_exp.commands import train as command
from lba_exp.sweeping import plan as planning
from lba_exp.sweeping.expand import expand, text

KEYS = ["seed", "optim.lr", "model.width", "model.heads", "data.batch_size"]


@given(st.data())
def test_jobs_are_the_product_of_the_axes_without_the_exclusions(data):
    keys = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True))
    points = st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)
    cut = data.draw(st.integers(0, len(keys)))
    grid = {key: data.draw(points) for key in keys[:cut]}
    size = data.draw(st.integers(1, 3))
    zipped = {key: data.draw(st.lists(st.integers(1, 9), min_size=size, max_size=size, unique=True)) for key in keys[cut:]}
    rows = data.draw(st.lists(st.sampled_from(["a", "b c", "ü"]), unique=True))
    node = {"grid": grid, "zip": [zipped] if zipped else [], "variants": {row: [f"name={number}"] for number, row in enumerate(rows)}}

    axes = [[{key: value} for value in values] for key, values in grid.items()]
    axes += [[dict(zip(zipped, point, strict=True)) for point in zip(*zipped.values(), strict=True)]] if zipped else []
    axes += [[{"row": row} for row in rows]] if rows else []
    expected = [{k: v for part in point for k, v in part.items()} for point in itertools.product(*axes)]
    rule = data.draw(st.sampled_from(expected))
    rule = {k: rule[k] for k in data.draw(st.lists(st.sampled_from(sorted(rule)), min_size=1, unique=True))}
    left = [job for job in expected if any(job[k] != v for k, v in rule.items())]
    if not left:
        return
    assert [dict(draft.values) for draft in expand(node | {"exclude": [rule]})] == left
    assert [dict(draft.values) for draft in expand(node)] == expected


LEAVES = st.none() | st.booleans() | st.integers() | st.text("abü ,'\"\\=[]{}:#~0.e-", min_size=1, max_size=8)


@given(st.recursive(LEAVES, st.lists, max_leaves=4))
def test_a_value_comes_back_from_its_text(value):
    assert composing.parse([f"k={text(value)}"])[0].value() == value


def test_the_command_line_replaces_and_adds_axes():
    node = {"grid": {"model": ["lion_lit", "lion_d"], "seed": [0, 1]}}
    assert len(expand(node, ["seed=5,6,7"])) == 6
    jobs = expand(node, ["seed=5", "optim.lr=0.1,0.2"])
    assert len(jobs) == 4 and all("seed=5" in job.overrides for job in jobs)


SWEEPS = {
    "sweep: {gird: {seed: [0, 1]}}": ("sweep.gird", "did you mean sweep.grid?"),
    "sweep: {grid: {seed: 0}}": ("sweep.grid", "seed is 0, no list"),
    "sweep: {grid: {sed: [0, 1]}}": ("sed", "did you mean seed?"),
    "sweep: {grid: {model: [lion_s, lion_t]}}": ("lion_t", "did you mean lion_"),
    "sweep: {grid: {model.heads: [4, 7]}}": ("model.heads=7", "does not divide"),
    "sweep: {grid: {seed: [0, 0]}}": ("seed=0 stands there twice",),
    "sweep: {grid: {seed: []}}": ("seed has no values",),
    "sweep: {zip: [{seed: [0, 1], model.width: [64]}]}": ("seed has 2, model.width has 1",),
    "sweep: {grid: {seed: [0, 1]}, zip: [{seed: [0, 1]}]}": ("seed stands in sweep.grid and in sweep.zip",),
    "sweep: {grid: {seed: [0, 1]}, exclude: [{seed: 2}]}": ("{seed: 2} leaves nothing out",),
    "sweep: {grid: {seed: [0, 1]}, exclude: [{sed: 1}]}": ("'sed' is not varied", "did you mean seed?"),
    "sweep: {grid: {seed: [0, 1]}, exclude: [{seed: [0, 1]}]}": ("leaves no job",),
    "sweep: {variants: {a: model.width=32}}": ("a needs a list of overrides",),
    "sweep: {variants: {a: ['seed=1,2']}}": ("a lists several values",),
    "sweep: {variants: {a: [modle=lion_s]}}": ("modle", "did you mean model?"),
    "sweep: {variants: {a: [], b: []}}": ("same run",),
    "sweep: {grid: {root: [a, b]}}": ("root cannot be varied",),
    "sweep: {grid: [seed, model]}": ("sweep.grid in sweeps/mine.yaml holds a list", "give a group of keys", "every combination"),
    "sweep: [1]": ("sweep in sweeps/mine.yaml holds a list", "give a group of keys"),
    "sweep: {zip: {seed: [0, 1]}}": ("sweep.zip in sweeps/mine.yaml holds keys", "give a list", "walked together"),
    "sweep: {variants: [{a: [seed=1]}]}": ("sweep.variants in sweeps/mine.yaml holds a list", "give a group of keys"),
    "sweep: {grid: {seed: [0, 1]}, exclude: {seed: 1}}": ("sweep.exclude in sweeps/mine.yaml holds keys", "give a list"),
    "model: {mixer: [1]}": ("model.mixer in sweeps/mine.yaml holds a list", "give a group of keys"),
    "hydra: {sweeper: {params: {seed: '1,2'}}}": ("hydra.sweeper.params is not used", "sweep: {grid: {seed: [1,2]}}"),
}


@pytest.mark.parametrize("content", SWEEPS)
def test_a_mistake_in_a_sweep_is_one_sentence(content, capsys):
    Path("sweeps").mkdir()
    Path("sweeps/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", "sweeps=mine"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.out == "" and said.err.count("\n") == 1
    for words in SWEEPS[content]:
        assert words in said.err
    assert [p.name for p in Path.cwd().iterdir()] == ["sweeps"]  # nothing is left behind


LINES = {
    ("seed=0,1", "folder=x"): ("would share the folder x",),
    ("seed=0,1", "hydra.launcher.jobs=0"): ("hydra.launcher.jobs=0", ">= 1"),
    ("seed=0,1", "hydra/launcher=lokal"): ("lokal", "did you mean local?"),
    ("seed=0,1", "hydra/sweeper=basic"): ("hydra/sweeper=basic is not used",),
    ("sweeps=digits", "sweep.only=[x]"): ("'x' is not a variant",),
    ("sweeps=digits_ablation", "model.mixer.gate=none"): ("model.mixer.gate is set by sweep.variants", "sweep.only"),
}


@pytest.mark.parametrize("arguments", LINES, ids=" ".join)
def test_a_mistake_beside_a_sweep_is_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", *arguments])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err.count("\n") == 1
    for words in LINES[arguments]:
        assert words in said.err
    assert list(Path.cwd().iterdir()) == []


def test_rows_have_names_of_their_own():
    jobs = planning.plan(["sweeps=digits_ablation", "sweep.only=[no decay,full]", "seed=3"]).jobs
    assert [(job.cfg.origin.row, job.cfg.model.mixer.gate) for job in jobs] == [("full", "selective"), ("no decay", "none")]
    assert [job.folder.parts[-3:] for job in jobs] == [("digits_ablation", f"lion_s,{row}", "seed3") for row in ("full", "no_decay")]


def test_a_dry_run_lists_and_writes_nothing(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["-m", "sweeps=digits", "--dry-run"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert said.count("missing ") == 12 and "12 jobs in runs/digits: 12 missing; 12 to run." in said and "no finished run" in said
    assert list(Path.cwd().iterdir()) == []
    with pytest.raises(SystemExit) as stop:
        command.main(["seed=1", "--dry-run"])
    assert stop.value.code == 1 and "add -m" in capsys.readouterr().err
