"""The paper's index: every item is one that can be run, and every table is rebuilt from the committed records."""

import json

import pytest
import yaml

from lba_exp import composing
from lba_exp.commands.item import BEGIN, END, index_table
from lba_exp.errors import UserError
from lba_exp.results.collect import Run
from lba_exp.results.items import NOT_RUN, Item, choose, find, in_short, item_table, made, read_items, read_records

EXPERIMENTS = composing.config_roots()[-1] / "experiments"
FOLDER = EXPERIMENTS / "results"
ITEMS = read_items(FOLDER)
ROWS = {"a": 80.0, "b": None}


def run(row: str, seed: int, accuracy: float | None, lr: float = 1e-3, validation: float | None = None, **changes) -> Run:
    metrics = {"test": {"accuracy": accuracy}, "validation": {"accuracy": accuracy if validation is None else validation}}
    record = {"row": row, "seed": seed, "data": "digits", "parameters": 100, "metrics": metrics, "began": "2026-12-01T10:00:00", **changes}
    return Run(f"{row}-{seed}", record, {"optim": {"lr": lr}, "model": {"width": 8}}, changes.get("status", "finished"))


def item(**changes) -> Item:
    return Item(**{"name": "mine", "paper": "a table", "sweep": "mine", "rows": ROWS, **changes})


@pytest.mark.parametrize("name", ITEMS)
def test_every_table_is_rebuilt_from_the_records(name):
    chosen = ITEMS[name]
    runs = read_records(chosen, FOLDER)
    text = item_table(chosen, runs)
    assert text.startswith(f"{name}: ")
    if chosen.sweep is None:
        assert "No table of runs" in text and not runs
    elif not runs:
        assert "Not yet run" in text and in_short(chosen, runs) == NOT_RUN
    else:
        assert all(f"| {row} " in text.replace("*", "").replace("\\", "") for row in chosen.rows) and made(runs) in text


@pytest.mark.parametrize("name", [name for name, item in ITEMS.items() if item.sweep])
def test_every_item_is_rows_of_its_sweep(name):
    chosen = ITEMS[name]
    sweep = composing.compose_raw([f"sweeps={chosen.sweep}"]).sweep
    axes = {**sweep.grid, **{key: values for group in sweep.zip for key, values in group.items()}}
    known = {"row": sweep.variants}.get(chosen.row_key) or axes[{"experiment": "experiments"}.get(chosen.row_key, chosen.row_key)]
    if name != "glue":  # whose further tasks are given on the command line
        assert set(chosen.rows) <= set(known)
    assert chosen.baseline is None or chosen.baseline in chosen.rows
    for overrides in chosen.runs:
        composing.parse(overrides)


def test_twins_and_what_they_are_twins_of_name_each_other():
    for name, chosen in ITEMS.items():
        if chosen.like:
            assert any(other.twin == name for other in ITEMS.values())
        if chosen.twin:
            assert ITEMS[chosen.twin].like in ITEMS


def test_records_are_small_and_tell_no_places():
    def texts(value):
        if isinstance(value, dict):
            value = [*value, *value.values()]
        return [text for part in value for text in texts(part)] if isinstance(value, list) else [value]

    for path in FOLDER.glob("*/*.json"):
        assert path.stat().st_size <= 20_000
        content = json.loads(path.read_text())
        assert not [text for text in texts(content) if isinstance(text, str) and text.startswith(("/", "~"))]


def test_the_page_is_the_one_of_the_items_and_records():
    page = (EXPERIMENTS / "PAPER_INDEX.md").read_text()
    assert page.partition(BEGIN)[2].partition(END)[0].strip() == index_table(FOLDER).strip(), "run `lba-item index`"


def test_a_table_has_the_papers_numbers_the_comparison_and_what_is_missing():
    runs = [run("a", seed, 0.8 + seed / 100) for seed in range(3)] + [run("c", seed, 0.5) for seed in range(3)]
    text = item_table(item(baseline="a", rows={"b": 70.0, "a": 80.0, "c": 60.0}), runs)
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert lines[2:] == ["b", "a", "c"]
    assert "missing 3 of 3" in text and "80.00" in text and "60.00" in text and "parameters: difference" not in text
    assert "−31.00" in text and "Verdict: none yet." in text and "2026-12-01" in text


def test_each_row_has_the_rate_that_is_best_in_validation_on_common_seeds():
    searched = item(search={"optim.lr": [2e-3]})
    runs = [run("a", seed, 0.8) for seed in range(3)] + [run("a", 0, 0.7, 2e-3, validation=0.9)]
    runs += [run("b", seed, 0.8) for seed in range(3)] + [run("b", 0, 0.9, 2e-3, validation=0.7)]
    kept = choose(searched, runs)
    assert [(r.label("row"), r.label("optim.lr")) for r in kept] == [("a", "0.002"), *[("b", "0.001")] * 3]
    assert "| 0.002" in item_table(searched, runs)
    failed = run("b", 0, None, 2e-3, status="failed")
    assert {r.label("optim.lr") for r in choose(searched, [*runs[4:7], failed])} == {"0.001"}
    with pytest.raises(UserError, match="no seed in common"):
        choose(searched, [run("a", 0, 0.8), run("a", 1, 0.8, 2e-3)])


def test_a_row_that_failed_is_told():
    text = item_table(item(), [run("a", seed, 0.8) for seed in range(3)] + [run("b", seed, None, status="failed") for seed in range(3)])
    assert "failed 3 of 3" in text
    assert "b failed (n = 3)" in in_short(item(), [run("a", s, 0.8) for s in range(3)] + [run("b", 0, None, status="failed")])


def test_mistakes_in_the_file_and_in_a_record(tmp_path):
    def written(**entry):
        (tmp_path / "items.yaml").write_text(yaml.safe_dump({"mine": {"paper": "p", **entry}}))
        return read_items(tmp_path)

    with pytest.raises(UserError, match="swep"):
        written(swep="digits")
    with pytest.raises(UserError, match="not both"):
        written(sweep="digits", command="lba-bench")
    with pytest.raises(UserError, match="did you mean mine"):
        find(written(sweep="digits"), "mien")
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "a-seed0.json").write_text("{}")
    with pytest.raises(UserError, match="not a run's record"):
        read_records(written(sweep="digits", rows=ROWS)["mine"], tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_items(tmp_path / "nowhere")
