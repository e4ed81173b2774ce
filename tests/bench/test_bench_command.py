"""``lba-bench operator`` in this process: every column and file, what it refuses, and what it keeps when it is stopped."""

import csv
import json
import math
import signal

import pytest
import torch

from lba_exp import ops
from lba_exp.bench import cases, fla, operator, report
from lba_exp.bench.settings import Settings
from lba_exp.commands import bench
from lba_exp.ops import api

TINY = ["--device=cpu", "--threads=1", "--heads=2", "--key-width=8", "--value-width=4", "--repeats=2", "--seconds=0.002", "--chunk-size=8"]
FORMS = [form for form in ops.FORMS if form in api._IMPLEMENTATIONS]


def run(*arguments, code=0):
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        bench.main(["operator", *TINY, *arguments])
    assert end.value.code == code
    assert torch.get_num_threads() == threads


def record(folder):
    return json.loads((folder / "result.json").read_text())


def refused(capsys, *arguments):
    run(*arguments, code=1)
    streams = capsys.readouterr()
    lines = streams.err.strip().splitlines()
    assert streams.out == "" and len(lines) == 1 and lines[0].startswith("lba-bench: ")
    return lines[0].removeprefix("lba-bench: ")


def test_everything_is_measured_and_written(tmp_path, capsys):
    folder = tmp_path / "new" / "bench"
    run("--lengths=32,8", "--dtypes=float32,bfloat16", "--decays=none,vector", "--output", str(folder))
    content = record(folder)
    assert content["status"] == "finished" and content["command"].startswith("lba-bench operator --device=cpu")
    assert content["environment"]["threads"] == 1 and content["environment"]["torch"] == torch.__version__
    assert {"commit", "dirty"} == {*content["git"]}
    cells = content["cells"]
    keys = [(c["dtype"], c["decay"], c["length"], c["pass"], c["form"]) for c in cells]
    decays, contenders = ("none", "vector"), [*FORMS, "softmax", "copy"]
    assert keys == [
        (dtype, decay, length, part, form)
        for dtype in ("float32", "bfloat16")
        for decay in decays
        for part in ("forward", "both")
        for length in (8, 32)
        for form in contenders
    ]
    softmax, copy = ({key[:4]: c["median_ms"] for key, c in zip(keys, cells, strict=True) if c["form"] == name} for name in contenders[-2:])
    for key, c in zip(keys, cells, strict=True):
        assert c["status"] == "measured" and c["reason"] is None and c["calls"] >= 2 and c["batch"] == 1
        assert 0 < c["quartile_1_ms"] <= c["median_ms"] <= c["quartile_3_ms"]
        assert c["softmax_over_form"] == pytest.approx(softmax[key[:4]] / c["median_ms"])
        assert c["form_over_copy"] == pytest.approx(c["median_ms"] / copy[key[:4]]) and c["denominator"] is c["host_ms"] is None
        if c["form"] == "copy":
            assert c["form_over_copy"] == 1 and c["error"] is c["peak_bytes"] is None
            continue
        assert 0 < c["error"] < (1e-2 if c["dtype"] == "bfloat16" else 2e-5)
        io = c["length"] * 2 * (8 + 8 + 4 + 4) * (2 if c["dtype"] == "bfloat16" else 4)
        outputs = io // 6 if c["pass"] == "forward" else io  # y; y and the gradients of q, k, v
        assert c["peak_bytes"] >= outputs and c["peak_over_io"] == pytest.approx(c["peak_bytes"] / io)
    assert len(content["crossovers"]) == 2 * len(decays) * 2 * 2
    assert len(content["growth"]) == 2 * len(decays) * 2 * len(contenders)
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [float(r["median_ms"]) for r in rows] == [c["median_ms"] for c in cells] and {*rows[0]} == {*cells[0]}
    page, screen = (folder / "table.md").read_text(), capsys.readouterr().out
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    for text in (page, screen):
        words = " ".join(text.split())
        assert all(name in words for name in (*report.COLUMNS, *contenders, "selective decay per channel, bfloat16, forward + backward"))
        assert "chunkwise overtakes softmax" in words or "softmax at 32, the longest" in words or "faster than softmax at every" in words
    assert "| form | 8 to 32 |" in page and "…" not in screen


def test_a_wrong_form_shows_in_the_error(tmp_path, monkeypatch):
    def shifted(q, k, v, f, b, **options):  # reads the gate of the token before
        return api.parallel(q, k, v, f.roll(1, dims=1), b, **options)

    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", shifted)
    run("--lengths=200", "--decays=selective", "--forms=parallel,chunkwise", "--output=out")
    errors = {(c["form"], c["pass"]): c["error"] for c in record(tmp_path / "out")["cells"]}
    for part in ("forward", "both"):
        assert errors["parallel", part] < 2e-5 and errors["chunkwise", part] > 1e-3 and errors["softmax", part] < 2e-5


def test_cells_without_figures(tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def nothing(q, k, v, *args, **options):
        return torch.full_like(v, math.nan), None

    def elsewhere(*args, **options):
        raise ValueError("form: 'blockwise' needs a machine of the moon")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", full)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", nothing)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "blockwise", elsewhere)
    forms = "--forms=parallel,recurrent,chunkwise,blockwise"
    arguments = ("--lengths=16,512", "--decays=none", "--passes=forward", "--unscaled", "--memory-budget-gib=0.01", "--output=out")
    run(forms, *arguments)
    content = record(tmp_path / "out")
    found = {(c["form"], c["length"]): (c["status"], c["reason"], c["median_ms"] is None) for c in content["cells"]}
    needs = ops.estimate_bytes("parallel", 1, 512, 2, 8, 4) / 2**30
    assert found["parallel", 16] == ("measured", None, False)
    assert found["parallel", 512] == ("skipped", f"needs about {needs:.3g} GiB", True)
    assert found["recurrent", 16] == ("out of memory", None, True)
    assert found["chunkwise", 16] == ("measured", "the output is not finite", False)
    assert found["blockwise", 16] == ("not available here", "'blockwise' needs a machine of the moon", True)
    screen = " ".join(capsys.readouterr().out.split())
    for text in (screen, (tmp_path / "out" / "table.md").read_text(), (tmp_path / "out" / "table.csv").read_text()):
        assert "out of memory" in text and "needs about" in text and "not finite" in text
        assert "not available here" in text and "'blockwise' needs a machine of the moon" in text


def test_a_form_that_does_not_run_here_is_not_offered(tmp_path, monkeypatch):
    def elsewhere(*args, **options):
        raise ValueError("form: 'blockwise' needs a machine of the moon")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "blockwise", elsewhere)
    run("--lengths=8", "--decays=none", "--passes=forward", "--no-softmax", "--output=out")
    assert [c["form"] for c in record(tmp_path / "out")["cells"]] == [*(f for f in FORMS if f != "blockwise"), "copy"]


def test_a_form_that_breaks_is_told(tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("kernel\nmiscompiled")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", broken)
    run("--lengths=8", "--decays=none", "--output=out", code=1)
    cells = record(tmp_path / "out")["cells"]
    assert {c["status"] for c in cells if c["form"] == "chunkwise"} == {"failed"}
    assert {c["status"] for c in cells if c["form"] != "chunkwise"} == {"measured"}
    assert "the first one (chunkwise) with: RuntimeError: kernel" in capsys.readouterr().err


def test_cells_that_the_host_bounds_are_told(tmp_path, monkeypatch, capsys):
    times = iter([1e9, 1e-9, RuntimeError("no event"), None])

    def host_time(call, count, device):
        assert 1 <= count <= operator.HOST_CALLS
        found = next(times)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(operator, "host_time", host_time)
    run("--lengths=8", "--decays=none", "--passes=forward", "--forms=parallel,chunkwise", "--output=out")
    cells = record(tmp_path / "out")["cells"]
    assert [(c["form"], c["host_ms"], c["status"]) for c in cells] == [
        ("parallel", 1e9, "measured"),
        ("chunkwise", 1e-9, "measured"),
        ("softmax", None, "measured"),
        ("copy", None, "measured"),
    ]
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        assert text.count("1,000,000,000 ms (bound)") == 1 and "0.000 ms (bound)" not in text and "here 1 of 2 cells" in text


@pytest.mark.parametrize(("number", "who", "code"), [(signal.SIGINT, "the user", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_stopped(tmp_path, monkeypatch, capsys, number, who, code):
    measured = operator._measure_pass

    def until(part, *args):
        if part == "both":
            assert record(tmp_path / "out")["status"] == "running", "what a killed process leaves"
            page = (tmp_path / "out" / "table.md").read_text()
            assert "fixed decay, float32, forward" in page and "| 16 | 1 | 16 | parallel | " in page and "running" in page
            assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 1 + 6
            signal.raise_signal(number)
        return measured(part, *args)

    monkeypatch.setattr(operator, "_measure_pass", until)
    before = signal.getsignal(number)
    run("--lengths=8,16", "--decays=fixed", "--forms=parallel", "--output=out", code=code)
    assert signal.getsignal(number) is before
    content = record(tmp_path / "out")
    assert content["status"] == "interrupted" and {c["pass"] for c in content["cells"]} == {"forward"} and len(content["cells"]) == 6
    streams = capsys.readouterr()
    assert "fixed decay, float32, forward" in streams.out and f"stopped by {who} after 6 of 12 cells" in streams.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"result.json", "table.md", "table.csv", "figure.png"}


def test_constant_tokens(tmp_path):
    run("--lengths=8,21,100", "--tokens=64", "--decays=fixed", "--direction=forward", "--forms=parallel,auto", "--output=out")
    cells = record(tmp_path / "out")["cells"]
    assert {(c["length"], c["batch"]) for c in cells} == {(8, 8), (21, 3), (100, 1)}
    assert all(c["status"] == "measured" and (c["form"] == "copy" or c["error"] < 2e-5) for c in cells)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "B L about 64" in page and "| 21 | 3 | 63 | parallel | " in page and "| 100 | 1 | 100 | copy | " in page


def test_the_copy_moves_the_bytes_of_q_k_v_y(monkeypatch):
    case = cases.Case("none", "bfloat16", 3, 5, Settings(lengths=(5,), heads=2, key_width=8, value_width=4))
    target = cases.call("copy", case, cases.draw(case, torch.device("cpu")), backward=True)()
    assert 2 * target.nbytes == case.io_bytes == 3 * 5 * 2 * 2 * (8 + 8 + 4 + 4) and bool((target == 1).all())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--forms=chunkwize"], "--forms: 'chunkwize' is not a form; did you mean chunkwise? Valid: parallel, "),
        (["--dtypes=float31"], "--dtypes: 'float31' is not a dtype; did you mean float32? Valid: float64, float32, bfloat16, float16."),
        (["--decays=none,selectiv"], "--decays: 'selectiv' is not a decay; did you mean selective? Valid: none, fixed, selective, vector."),
        (["--passes=backward"], "--passes: 'backward' is not a pass; did you mean forward? Valid: forward, both."),
        (["--direction=x"], "--direction: 'x' is not a direction. Valid: both, forward, backward."),
        (["--device=gpu"], "--device: 'gpu' is not a device; did you mean cpu? Valid: auto, cpu, cuda."),
        (["--lengths=16,-4"], "--lengths -4 does not fit: give whole numbers >= 1, such as 1024,4096."),
        (["--lengths=1e3"], "--lengths 1e3 does not fit"),
        (["--lengths=,"], "--lengths is empty"),
        (["--batch", "-1"], "--batch -1 does not fit: give a whole number >= 1."),
        (["--heads=0"], "--heads 0 does not fit"),
        (["--value-width=x"], "--value-width x does not fit"),
        (["--repeats=0"], "--repeats 0 does not fit"),
        (["--threads=0"], "--threads 0 does not fit"),
        (["--seconds=nan"], "--seconds nan does not fit: give a number above 0."),
        (["--memory-budget-gib=-2"], "--memory-budget-gib -2 does not fit"),
        (["--tokens=64", "--batch=2"], "--tokens and --batch exclude each other"),
        (["--forms=parallel,fla-x2,fla"], "--forms fla-x2,fla: flash-linear-attention runs on CUDA alone: give --device cuda."),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, sentence):
    assert refused(capsys, "--output=out", *arguments).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_first(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    assert refused(capsys, "--output=old", "--forms=nonsense") == "--output old exists already: give a new folder."
    (tmp_path / "file").touch()
    assert refused(capsys, "--output=file/new").startswith("--output file/new cannot be made (Not a directory)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert refused(capsys, "--device=cuda").startswith("--device cuda: torch finds no CUDA device here")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    run("--device=cuda", "--lengths=64,256", "--dtypes=float32,bfloat16", "--output=out")
    content = record(tmp_path / "out")
    assert content["environment"]["memory_method"] == "cuda allocator"
    assert len({c["form"] for c in content["cells"]}) >= len(FORMS) + 2
    for c in content["cells"]:
        if c["form"] in fla.NAMES and c["status"] == "not available here":
            assert c["decay"] == "vector" or (c["pass"] == "both" and c["decay"] == "selective" and "Triton" in c["reason"])
            continue
        assert c["status"] == "measured" and c["median_ms"] > 0 and c["form_over_copy"] > 0
        # fla's numerators are rounded to bfloat16 before the diagonal is taken from them
        assert c["form"] == "copy" or (c["peak_bytes"] > 0 and c["error"] < (5e-2 if c["form"] in fla.NAMES else 1e-2))
