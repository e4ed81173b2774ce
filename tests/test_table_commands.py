"""lba-table and lba-report from the command line: quick, one sentence for a mistake, nothing overwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lba_exp
from lba_exp.commands import report, table
from tests.run_folders import write_run

ROOT = str(Path(lba_exp.__file__).resolve().parent.parent)


@pytest.fixture
def runs(tmp_path):
    for model, accuracy in (("lion_s", 0.9), ("softmax", 0.8)):
        for seed in (0, 1):
            write_run(tmp_path / "runs", model, seed, accuracy)


def refused(command, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.out == "" and said.err.count("\n") == 1, said
    return said.err


def test_a_table_on_the_screen_and_in_files(runs, tmp_path, capsys):
    table.main(["runs"])
    text = capsys.readouterr().out
    assert "| lion_s  |    **90.00 ± 0.00** |" in text
    for suffix, start in (("md", "test accuracy"), ("csv", "model,data,metric,mean,std"), ("tex", "\\begin{table}")):
        table.main(["runs", "--output", f"t.{suffix}"])
        assert (tmp_path / f"t.{suffix}").read_text().startswith(start)
    assert (tmp_path / "t.md").read_text() == text
    table.main(["runs", "--where", "model=lion_s", "--rows", "model,seed", "--format", "csv", "--output", "odd.txt"])
    assert len((tmp_path / "odd.txt").read_text().splitlines()) == 3
    capsys.readouterr()
    table.main(["--diff", "runs/digits/lion_s/seed0", "runs/digits/softmax/seed1", "--format", "csv"])
    assert capsys.readouterr().out.splitlines()[1:] == ["model.name,lion_s,softmax", "seed,0,1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name the runs"),
        (["nowhere"], "nowhere is no folder"),
        (["runs", "--metric", "test/acc"], "did you mean test/accuracy?"),
        (["runs", "--rows", "modle"], "did you mean model? Valid: model, task"),
        (["runs", "--metric", "nothing"], "'nothing' is not a metric of these runs. Valid: efficiency/"),
        (["runs", "--rows", "model", "--cols", "model"], "both name model:"),
        (["runs", "--rows", ","], "--rows is empty"),
        (["runs", "--output", "there.md"], "there.md exists already"),
        (["runs", "--output", "a/b.md"], "the folder a does not exist"),
        (["runs", "--output", "b.pdf"], "its suffix must be one of .md, .csv, .tex"),
        (["runs", "--diff", "runs", "runs"], "--diff compares two run folders"),
        (["--diff", "runs", "runs"], "is no run folder"),
        (["runs", "--paper", "lara"], "did you mean lra?"),
    ],
)
def test_mistakes_are_one_sentence(runs, tmp_path, capsys, arguments, sentence):
    (tmp_path / "there.md").write_text("mine")
    assert sentence in refused(table, arguments, capsys)
    assert (tmp_path / "there.md").read_text() == "mine" and not (tmp_path / "b.pdf").exists()


def test_a_report_is_written_once(runs, tmp_path, capsys):
    report.main(["runs", "--baseline", "softmax", "--title", "Digits & more"])
    page = (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out == "report.html\n" and "<h1>Digits &amp; more</h1>" in page
    assert "report.html exists already" in refused(report, ["runs"], capsys)
    assert "is not a metric" in refused(report, ["runs", "--metric", "x", "--output", "b.html"], capsys)
    assert (tmp_path / "report.html").read_text() == page and not (tmp_path / "b.html").exists()


def test_nothing_heavy_is_imported(runs):
    code = (
        "import sys; from lba_exp.commands import report, table; table.main(['runs', '--spread', 'ci95']);"
        "report.main(['runs']); print([m for m in ('torch', 'lightning', 'matplotlib', 'wandb', 'hydra', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
