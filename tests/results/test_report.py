"""The page: complete, self-contained, escaped, readable without its pictures."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import lba_exp
from lba_exp.results.collect import collect
from lba_exp.results.report import charts
from lba_exp.results.report.page import report_page
from lba_exp.results.report.svg import Axis, Chart, Series
from lba_exp.results.tables import TableOptions
from tests.run_folders import config, write_run

EVIL = '"><script>alert(1)</script>&<b>'
VOID = {"wbr", "meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, links, and whether every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.fetched, self.links, self.open, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action", "poster", "xlink:href") or (name == "href" and tag != "a"):
                self.fetched.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            assert not name.startswith("on"), "no script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def curves(folder: Path, *, offset: float = 0.0, parity: str = "1e-07") -> None:
    lines = ["step,epoch,train/step_loss,train/loss,val/loss,val/accuracy,parity/recurrent/rel,parity/parallel/rel"]
    lines += [f"{step},{step // 10},,{2 - step / 100 + offset},{2.1 - step / 100},{step / 100},{parity},0.0" for step in range(10, 70, 10)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def decays(low: float, high: float) -> dict:
    heads = [[low, 0.9 * low + 0.1 * high, (low + high) / 2, 0.1 * low + 0.9 * high, high]] * 2
    return {
        "quantiles": [0.05, 0.25, 0.5, 0.75, 0.95],
        "layers": [{"layer": f"blocks.{i}", "forward": heads, "backward": heads} for i in (0, 1)],
    }


def page_of(root: Path, output: Path, **options) -> tuple[str, Page]:
    runs, remarks = collect([root])
    text = report_page(runs, TableOptions(**options), output, "title", remarks)
    return text, Page(text)


@pytest.fixture
def root(tmp_path):
    for seed in (0, 1):
        for model in ("lion_s", "lion_d"):
            curves(write_run(tmp_path / "runs", model, seed, 0.5 + 0.1 * seed, record__decays=decays(-0.5, -0.01)), offset=0.1 * seed)
    curves(write_run(tmp_path / "runs", "softmax", 0, 0.4, record__decays=None), parity="")
    write_run(tmp_path / "runs", "softmax", 1, status="failed")
    return tmp_path / "runs"


def test_a_complete_page(root, tmp_path):
    (tmp_path / "out").mkdir()
    text, page = page_of(root, tmp_path / "out" / "report.html", baseline="softmax")
    assert page.fetched == [] and not page.named("script") and "url(" not in text and "@import" not in text
    assert not [link for link in page.links if ":" in link], "links to run folders, nothing outside"
    targets = {(tmp_path / "out" / unquote(link)).resolve() for link in page.links}
    assert all(target.exists() for target in targets)
    folders = {path.parent.resolve() for path in root.rglob("config.yaml")}
    assert len(folders) == 6 and folders <= targets, "every run is there"
    said = " ".join(page.text)
    assert "ValueError: it broke" in said and "5 finished, 1 failed" in said and "failed 1 of 2" in said
    headings = [h for h in ("learning curves", "against training time", "parity of the forms", "decays by layer") if h in said]
    assert len(headings) == 4 and "has both" not in said and "has measured it" not in said and "on record" not in said
    pictures = [attrs for attrs in page.named("svg") if attrs.get("role") == "img"]
    assert len(pictures) == len(page.named("figure")) == 3 + 1 + 2 + 2
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and all(name in ids for picture in pictures for name in picture["aria-labelledby"].split())
    assert "tolerance 0.0001" in said and "layer 2 head 2" in said and "lion_s from 1.95 to 1.45" in said, "text alternatives tell numbers"
    assert "prefers-color-scheme: dark" in text


def test_a_job_without_a_folder_is_told_with_its_log_and_not_linked(tmp_path):
    write_run(tmp_path / "runs", seed=0)
    kept = tmp_path / "runs" / "digits" / ".sweep"
    (kept / "logs").mkdir(parents=True)
    (kept / "logs" / "b.log").write_text("Traceback")
    jobs = [{"label": f"lion_s/seed{i}", "status": "failed" if i == 1 else "not started", "error": "OSError: it broke"} for i in (1, 2)]
    jobs[0]["log"] = "/elsewhere/b.log"
    (kept / "summary.json").write_text(json.dumps({"jobs": jobs}))
    configs = {f"lion_s/seed{i}": config(seed=i, origin__overrides=["optim.lr=0.1", "<b>"]) for i in (1, 2)}
    (kept / "configs.json").write_text(json.dumps(configs))
    _, page = page_of(tmp_path / "runs", tmp_path / "report.html")
    said = " ".join(page.text)
    assert "1 finished, 1 failed, 1 missing" in said and "seed 1: OSError: it broke" in said and "seed 2" not in said
    targets = [tmp_path / unquote(link) for link in page.links]
    assert kept / "logs" / "b.log" in targets and all(target.exists() for target in targets)


def test_every_text_is_escaped(tmp_path):
    folder = write_run(
        tmp_path / "r&ns", "lion_s", 0, record__variant=EVIL, record__name=EVIL, record__data=EVIL, record__decays=decays(-1.0, -0.5)
    )
    curves(folder)
    failed = write_run(tmp_path / "r&ns", "lion_d", 1, status="failed", record__error=EVIL, record__data=EVIL)
    curves(failed)
    text, page = page_of(tmp_path / "r&ns", tmp_path / "report.html")
    assert "<script" not in text and not page.named("script") and "<b>" not in text.replace("&lt;b>", "")
    assert EVIL in "".join(page.text)


def test_a_page_of_runs_without_measurements(tmp_path):
    write_run(tmp_path / "runs", "lion_s", 0, status="failed")
    folder = write_run(tmp_path / "runs", "lion_d", 0, status="unfinished")
    (folder / "metrics.csv").write_text("step,val/loss\n10,not a number\n")
    _, page = page_of(tmp_path / "runs", tmp_path / "report.html")
    said = " ".join(page.text)
    for sentence in (
        "No run has written a metrics.csv",
        "No run has both",
        "No run has measured it",
        "No run has decays on record",
    ):
        assert sentence in said
    assert not page.named("figure")


@pytest.mark.parametrize("decay", ["text", {"layers": 3}, {"layers": [3]}, {"layers": [{"forward": None, "backward": None}]}])
def test_decays_that_are_none_draw_nothing(tmp_path, decay):
    runs = collect([write_run(tmp_path, record__decays=decay)])[0]
    assert charts.decay_figures("lion_s", 0, runs) == []


def test_decays_of_both_directions_where_they_differ(tmp_path):
    same, other = decays(-0.5, -0.01), decays(-0.5, -0.01)
    for layer in other["layers"]:
        layer["backward"] = decays(-3.0, -1.0)["layers"][0]["forward"]
    for i, (recorded, captions) in enumerate(((same, 1), (other, 2))):
        runs = collect([write_run(tmp_path / str(i), record__decays=recorded)])[0]
        figures = charts.decay_figures("lion_s", 0, runs)
        assert len(figures) == captions and ("backward" in figures[-1].caption) == (captions == 2)


def test_parity_shows_the_worst_run_and_what_is_not_finite(tmp_path):
    for seed, error in ((0, "1e-07"), (1, "0.01")):
        curves(write_run(tmp_path, seed=seed), parity=error)
    runs = collect([tmp_path])[0]
    rows = {run.place: charts.rows_of(run) for run in runs}
    figure = charts.parity_over_training("lion_s", runs, rows)
    assert "recurrent from 1e-02 to 1e-02" in figure.svg and figure.forms == ("recurrent",), "the form that trains is not drawn"
    curves(tmp_path / "digits" / "lion_s" / "seed0", parity="nan")
    rows = {run.place: charts.rows_of(run) for run in runs}
    assert charts.parity_over_training("lion_s", runs, rows).svg.count("not finite") == 6


def test_a_curve_is_mean_and_deviation(tmp_path):
    for seed in (0, 1):
        curves(write_run(tmp_path, seed=seed), offset=0.2 * seed)
    curves(write_run(tmp_path, seed=2, status="failed"), offset=99.0)
    runs = collect([tmp_path])[0]
    found = charts._curve("lion_s", 0, runs, {run.place: charts.rows_of(run) for run in runs}, "train/loss")
    assert found.points[0] == pytest.approx((10, 2.0)), "finished runs alone"
    assert found.band[0] == pytest.approx((10, 2.0 - 0.2 / math.sqrt(2), 2.0 + 0.2 / math.sqrt(2)))


def test_accuracy_over_the_time_trained_so_far(tmp_path):
    for seed, pace in ((0, 1.0), (1, 3.0)):
        folder = write_run(tmp_path, seed=seed)
        lines = [f"{step},{pace * step},{step / 100 + seed / 10}" for step in (10, 20)]
        (folder / "metrics.csv").write_text("\n".join(["step,efficiency/train_seconds,val/accuracy", *lines, "30,,0.9"]) + "\n")
    runs = collect([tmp_path])[0]
    rows = {run.place: charts.rows_of(run) for run in runs}
    figure = charts.curves_against_time({"lion_s": runs}, rows, "test/accuracy")
    assert "lion_s 25% after 40.0 s" in figure.svg and "15% at 20" in figure.svg, "means over runs of time and of accuracy"
    assert "band" in figure.svg
    assert charts.curves_against_time({"lion_s": runs}, rows, "parameters") is None
    assert charts.curves_against_time({"lion_s": runs}, rows, "test/loss") is None


def test_a_decay_that_is_the_same_for_every_token_is_a_point(tmp_path):
    for recorded, boxes in ((decays(-0.5, -0.5), 0), (decays(-0.5, -0.4), 4)):
        runs = collect([write_run(tmp_path / str(boxes), record__decays=recorded)])[0]
        (figure,) = charts.decay_figures("lion_d", 0, runs)
        assert figure.svg.count('class="box"') == boxes and figure.svg.count('class="dot') == 4 - boxes
        assert ("the same for every token" in figure.caption) == (not boxes)


def test_axes():
    axis = Axis("x", low=0, high=10)
    assert axis.ticks() == [0, 2, 4, 6, 8, 10] and axis.share(5) == 0.5 and axis.share(20) == 1.0
    log = Axis("y", log=True)
    log.fit([1e-7, 3e-5])
    assert log.ticks() == pytest.approx([1e-7, 1e-6, 1e-5]) and log.share(1e-9) == 0.0
    steps = Axis("step", low=0, high=3, whole=True)
    assert steps.ticks() == [0, 1, 2, 3]
    for values in ([], [0.0], [5.0, 5.0], [math.nan, math.inf]):
        for scale in (True, False):
            axis = Axis("x", log=scale)
            axis.fit(values)
            assert axis.low < axis.high and axis.ticks() and 0 <= axis.share(1.0) <= 1


def test_coordinates_of_a_line():
    x, y = Axis("x", low=0, high=10), Axis("y", low=0, high=1)
    chart = Chart("title", "description", x, y)
    chart.line(Series("s", [(0, 0.0), (10, 1.0)]), marked=False)
    assert f'points="{chart.px(0)},{chart.py(0)} {chart.px(10)},{chart.py(1)}"' in chart.done()
    assert chart.px(0) < chart.px(10) and chart.py(0) > chart.py(1)


def test_a_page_of_a_real_run(small, tmp_path):
    overrides = [*small, "trainer.max_epochs=1", f"folder={tmp_path}/runs/a"]
    record = lba_exp.train(lba_exp.compose(overrides), quiet=True)
    layers = record["decays"]["layers"]
    assert len(layers) == 1 and len(layers[0]["forward"]) == 2 and all(q <= 0 for head in layers[0]["forward"] for q in head)
    _, page = page_of(tmp_path / "runs", tmp_path / "report.html")
    said = " ".join(page.text)
    assert f"{100 * record['metrics']['test']['accuracy']:.2f}" in said
    assert len(page.named("figure")) == 4 + 2 + 1 + 1
