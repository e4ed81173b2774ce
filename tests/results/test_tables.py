"""Cells, marks, notes, and the formats they are written in."""

import csv
import io
import shutil
import subprocess

import pytest

from lba_exp.errors import UserError
from lba_exp.results.collect import collect
from lba_exp.results.difference import difference_table
from lba_exp.results.layout import BEST, SECOND, Table, Text, lay_out
from lba_exp.results.paper import read_paper
from lba_exp.results.quantities import lower_is_better, style
from lba_exp.results.rendering import grid_csv, latex, markdown
from lba_exp.results.tables import TableOptions, pivot
from tests.run_folders import write_run


def table_of(root, **options) -> Table:
    return lay_out(pivot(collect([root])[0], TableOptions(**options)))


def shown(table: Table, column: int = 1) -> dict:
    """row -> (text, mark, what stands behind)"""
    return {row[0].text: (row[column].text, row[column].mark, row[column].after) for row in table.rows}


def three_models(root):
    for seed in range(3):
        write_run(root, "lion_s", seed, 0.90 + 0.01 * seed)
        write_run(root, "lion_d", seed, 0.80 + 0.02 * seed)
        write_run(root, "softmax", seed, 0.70)


def test_means_spreads_and_marks(tmp_path):
    three_models(tmp_path)
    table = table_of(tmp_path)
    assert table.head == ["model", "digits"] and table.title == "test accuracy, %: mean ± standard deviation"
    assert shown(table) == {
        "lion_d": ("82.00 ± 2.00", SECOND, ""),
        "lion_s": ("91.00 ± 1.00", BEST, ""),
        "softmax": ("70.00 ± 0.00", None, ""),
    }
    assert "n = 3 runs in each cell." in table.notes
    assert shown(table_of(tmp_path, spread="ci95"))["lion_s"][0] == "91.00 ± 2.48"  # 4.3027 / sqrt(3)
    assert shown(table_of(tmp_path, spread="none"))["lion_s"][0] == "91.00"
    assert shown(table_of(tmp_path, better="lower"))["softmax"][1] == BEST
    assert {mark for _, mark, _ in shown(table_of(tmp_path, better="none")).values()} == {None}


def test_ties_as_they_read_share_a_mark(tmp_path):
    for model, accuracy in (("a", 0.900001), ("b", 0.9), ("c", 0.8), ("d", 0.800004), ("e", 0.1)):
        write_run(tmp_path, model, 0, accuracy)
    assert [mark for _, mark, _ in shown(table_of(tmp_path)).values()] == [BEST, BEST, SECOND, SECOND, None]


def test_equal_values_have_no_best(tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b")
    assert {mark for _, mark, _ in shown(table_of(tmp_path)).values()} == {None}


def test_missing_and_failed_cells_are_shown_and_not_ranked(tmp_path):
    write_run(tmp_path, "whole", 0, 0.5)
    write_run(tmp_path, "whole", 1, 0.6)
    write_run(tmp_path, "partly", 0, 0.9)
    write_run(tmp_path, "partly", 1, status="failed")
    write_run(tmp_path, "partly", 2, status="interrupted")
    write_run(tmp_path, "broken", 0, status="failed")
    folder = write_run(tmp_path, "corrupted", 0)
    (folder / "result.json").write_text("{")
    write_run(tmp_path, "diverged", 0, accuracy=None)
    write_run(tmp_path, "diverged", 1, accuracy=0.2)
    write_run(tmp_path, "elsewhere", 0, 0.3, data="listops")
    table = table_of(tmp_path)
    found = shown(table)
    assert found["partly"] == ("90.00", None, "(n = 1; failed 1 of 3; interrupted 1 of 3)"), "the mean over survivors is not the best"
    assert found["whole"] == ("55.00 ± 7.07", None, "(n = 2)"), "nothing else to be ranked with"
    assert found["broken"] == ("failed 1 of 1", None, "") and found["corrupted"] == ("unreadable 1 of 1", None, "")
    assert found["diverged"] == ("20.00", None, "(n = 1; no value 1 of 2)")
    assert found["elsewhere"][0] == "—" and shown(table, 2)["elsewhere"][0] == "30.00"
    assert "—: no run." in table.notes and any("not ranked" in note for note in table.notes)


def test_several_metrics_keys_and_columns(tmp_path):
    for lr in (0.001, 0.01):
        write_run(tmp_path / str(lr), "lion_s", 0, 0.5, optim__lr=lr)
        write_run(tmp_path / str(lr), "lion_s", 0, 0.6, optim__lr=lr, data="listops")
    table = table_of(tmp_path, rows=("model", "optim.lr"), metrics=("test/accuracy", "val/loss", "parameters"))
    assert table.head[:5] == ["model", "optim.lr", "digits: test accuracy, %", "digits: validation loss", "digits: parameters"]
    assert [cell.text for cell in table.rows[0]] == ["lion_s", "0.001", "50.00", "0.5000", "1,000", "60.00", "0.5000", "1,000"]
    assert [row[1].text for row in table.rows] == ["0.001", "0.01"]


def test_numeric_rows_are_in_order_of_size(tmp_path):
    for lr in (0.0001, 1e-05, 0.01, 100.0):
        write_run(tmp_path / str(lr), optim__lr=lr)
    assert [row[0].text for row in table_of(tmp_path, rows=("optim.lr",)).rows] == ["1e-05", "0.0001", "0.01", "100.0"]


def test_a_mean_over_different_configurations_is_remarked(tmp_path):
    write_run(tmp_path / "a", optim__lr=0.001)
    write_run(tmp_path / "b", optim__lr=0.1)
    remark = next(note for note in table_of(tmp_path).notes if "differ" in note)
    assert "optim.lr (0.001, 0.1)" in remark
    assert not [note for note in table_of(tmp_path, rows=("optim.lr",)).notes if "differ" in note]
    write_run(tmp_path / "c", optim__lr=0.1)
    assert "Some cell holds several runs of one seed." in table_of(tmp_path, rows=("optim.lr",)).notes


def test_baseline_and_comparison(tmp_path):
    three_models(tmp_path)
    table = table_of(tmp_path, baseline="softmax", compare=True)
    assert table.head == ["model", "digits", "difference (p of t-test, of sign flips)", "training time", "training memory"]
    row = {r[0].text: [c.text for c in r] for r in table.rows}
    # differences 20, 21, 22 points: t^2 = 3 * 21^2 = 1323, and with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert row["lion_s"][2] == "+21.00 (0.00076, 0.25; 3 pairs)" and row["softmax"][2] == "baseline"
    assert row["lion_s"][3:] == ["×1.3", "×1"] and row["softmax"][3:] == ["×1", "×1"]
    assert any("cannot fall below 0.25" in note for note in table.notes)
    with pytest.raises(UserError, match="needs --baseline"):
        table_of(tmp_path, compare=True)
    with pytest.raises(UserError, match=r"did you mean softmax\?"):
        table_of(tmp_path, baseline="softmx")
    write_run(tmp_path / "again", "softmax", 0, 0.5)
    with pytest.raises(UserError, match="several of seed 0"):
        table_of(tmp_path, baseline="softmax", compare=True)


def test_costs_of_different_machines_are_remarked(tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", record__environment={"device": "H100", "threads": 8, "precision": "bf16-mixed"})
    assert any("different machines" in note and "H100" in note for note in table_of(tmp_path, baseline="a").notes)
    assert not any("different machines" in note for note in table_of(tmp_path).notes)


def test_the_papers_numbers_have_their_own_column(tmp_path):
    write_run(tmp_path, "lion_s", data="listops")
    write_run(tmp_path, "lion-lit", data="pathx")
    write_run(tmp_path, "mine", data="listops")
    table = table_of(tmp_path, paper=read_paper("lra"))
    assert table.head == ["model", "listops", "listops: paper", "pathx", "pathx: paper"]
    assert {row[0].text: row[2].text for row in table.rows} == {"lion_s": "62.25", "lion-lit": "16.78", "mine": "—"}
    assert {row[4].text for row in table.rows} == {"97.99", "—"}, "the paper's LION-LIT fails on Path-X"
    assert any("arXiv 2502.16249v2, Long Range Arena" in note for note in table.notes)
    assert shown(table_of(tmp_path, paper=read_paper("imagenet_small:time"), metrics=("parameters",)), 2)["lion_s"][0] == "×2.03"
    with pytest.raises(UserError, match="has no number for this table"):
        table_of(tmp_path, paper=read_paper("imagenet_small"))
    with pytest.raises(UserError, match="holds accuracies, and --metric is validation/loss"):
        table_of(tmp_path, paper=read_paper("lra"), metrics=("validation/loss",))
    with pytest.raises(UserError, match=r"did you mean imagenet_small\?"):
        read_paper("imagenet_smal")
    with pytest.raises(UserError, match=r"did you mean listops\?"):
        read_paper("lra:listop")


def test_refusals(tmp_path):
    write_run(tmp_path)
    with pytest.raises(UserError, match="both name"):
        table_of(tmp_path, rows=("model",), cols=("variant",))


def test_a_table_without_finished_runs(tmp_path):
    write_run(tmp_path, "lion_s", 0, status="failed")
    assert shown(table_of(tmp_path))["lion_s"][0] == "failed 1 of 1"


def test_values_as_they_read():
    assert style("test/accuracy", [0.5]).text(0.99999) == "99.99" and style("test/accuracy", [1.0]).text(1.0) == "100.00"
    assert style("parity/recurrent/rel", [1e-7]).text(1.234e-7) == "1.2e-07"
    assert style("efficiency/peak_memory_bytes", [2.0**20]).text(3 * 2**20) == "3.0"
    assert (look := style("peak_bytes", [2.0**30, 2.0**32])).text(2.5 * 2**30) == "2.50" and look.unit == "GiB"
    assert style("efficiency/tokens_per_second", [1234567.8]).text(1234567.8) == "1,234,568"
    assert style("test/loss", [2.0461, 1.9]).text(2.0461) == "2.046" and style("x", []).text(0.0) == "0.0000"
    assert [lower_is_better(m) for m in ("test/loss", "parity/recurrent/rel", "efficiency/train_seconds", "parameters")] == [True] * 4
    assert not any(map(lower_is_better, ("test/accuracy", "efficiency/tokens_per_second", "parity/recurrent/agreement")))


def test_markdown_and_latex_escape_and_mark():
    rows = [[Text("a|b<i>"), Text("1 ± 0", BEST, "(n = 2)")], [Text("c_d&%"), Text("2", SECOND)]]
    table = Table("x_1", ["model", "d"], rows, 1, ["note"])
    lines = markdown(table).splitlines()
    assert lines[0] == "x_1" and lines[2].split("|")[1].strip() == "model" and lines[3].endswith("-: |")
    assert "| a\\|b&lt;i>" in lines[4] and "**1 ± 0** (n = 2) |" in lines[4] and "<u>2</u> |" in lines[5]
    assert len({len(line) for line in lines[2:6]}) == 1
    text = latex(table)
    assert r"\textbf{1 $\pm$ 0} (n = 2) \\" in text and r"c\_d\&\% & \underline{2} \\" in text and r"\caption{x\_1}" in text
    assert r"a\textbar{}b\textless{}i\textgreater{}" in text and text.count("{") == text.count("}")


def test_csv_holds_full_numbers(tmp_path):
    three_models(tmp_path)
    write_run(tmp_path, "lion_s", 3, status="failed")
    grid = pivot(collect([tmp_path])[0], TableOptions(baseline="softmax", compare=True, paper=read_paper("lra:image")))
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(grid_csv(grid)))}
    assert float(rows["lion_s"]["mean"]) == pytest.approx(0.91, abs=1e-12) and float(rows["lion_s"]["std"]) == pytest.approx(
        0.01, abs=1e-12
    )
    assert [rows["lion_s"][key] for key in ("n", "runs", "failed", "no_value", "paper", "unit_paper", "pairs")] == [
        *("3", "4", "1", "0", "86.14", "percent", "3")
    ]
    assert rows["softmax"]["difference"] == "" and float(rows["lion_s"]["relative_time"]) == pytest.approx(1.3)


def test_difference_of_two_runs(tmp_path):
    first = write_run(tmp_path / "a", optim__lr=0.001)
    second = write_run(tmp_path / "b", optim__lr=0.1, seed=1)
    rows = [[cell.text for cell in row] for row in difference_table(first, second).rows]
    assert rows == [["optim.lr", "0.001", "0.1"], ["seed", "0", "1"]], "where they lie and how they were called does not count"
    assert difference_table(first, first).notes == ["The two configurations are the same."]
    with pytest.raises(UserError, match="is no run folder"):
        difference_table(first, tmp_path)


def test_where_the_best_checkpoint_was_is_no_merit(tmp_path):
    for i, model in enumerate(("a", "b")):
        write_run(tmp_path, model, 0, 0.5 + i / 10, record__best={"step": 10 * (i + 1)}, record__parameters=10 * (i + 1))
    marks = {m: [c[1] for c in shown(table_of(tmp_path, metrics=(m,))).values()] for m in ("best/step", "parameters", "test/accuracy")}
    assert marks == {"best/step": [None, None], "parameters": [BEST, SECOND], "test/accuracy": [SECOND, BEST]}
    assert [c[1] for c in shown(table_of(tmp_path, metrics=("best/step",), better="lower")).values()] == [BEST, SECOND], "unless asked for"


EVIL = r"""[0.9, 0.999] * # $ % & _ { } ~ ^ \ < > | " ' ` ± × − — λ ω ü →"""


def test_a_line_of_latex_never_begins_with_an_argument():
    rows = [[Text("[0.9, 0.999]"), Text("1", BEST)], [Text("*x"), Text("—")], [Text(EVIL), Text("90 ± 1", SECOND, "(n = 1)")]]
    text = latex(Table(EVIL, ["[optim.betas]", "a|b"], rows, 1, [EVIL]))
    body = text[text.index("\\toprule") : text.index("\\bottomrule")].splitlines()
    assert not [line for line in body if line.startswith(("[", "*"))] and "{}[0.9, 0.999] & \\textbf{1}" in text
    assert "$\\lambda$ $\\omega$" in text and "\\textbar{}" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex, with booktabs")
def test_latex_compiles(tmp_path):
    table = Table(EVIL, [EVIL, EVIL], [[Text(EVIL), Text(EVIL, BEST)], [Text("[x"), Text(EVIL, SECOND, EVIL)]], 1, [EVIL])
    start = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "all.tex").write_text(f"{start}{latex(table)}\\end{{document}}\n")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout.decode(errors="replace")
