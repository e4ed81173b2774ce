"""``lba-bench model``: whole models in inference, cell by cell; what the tables say, the limits, and what is refused."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lba_exp.bench import model as bench
from lba_exp.bench import model_report, model_settings, pace
from lba_exp.commands import bench as command
from lba_exp.ops import api, recurrent

TINY = ["model.width=8", "model.depth=2", "model.heads=2"]
SHALLOW = ["model.width=8", "model.depth=1", "model.heads=2"]
OPTIONS = ["--device=cpu", "--threads=1", "--repeats=1", "--seconds=0.005", "--classes=5"]


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        command.main(["model", *arguments, *OPTIONS])
    assert end.value.code == code


def record(folder="out"):
    return json.loads(Path(folder, "result.json").read_text())


def cells(folder="out"):
    return {
        (c["model"].partition(" ")[0], c["form"], c["chunk_size"], c[record(folder)["settings"]["axis"]]): c
        for c in record(folder)["cells"]
    }


def statuses(found):
    return {key: c["status"] for key, c in found.items()}


def test_every_form_at_every_length(tmp_path, capsys):
    run("softmax", "lion_s", "lion_lit model.mixer.form=parallel", *TINY, "--lengths=48,16", "--batch=3", "--output=out")
    found = cells()
    forms = [("softmax", None, None), *(("lion_s", form, 64 if form == "chunkwise" else None) for form in model_settings.FORMS)]
    assert [*found] == [(*form, length) for length in (16, 48) for form in (*forms, ("lion_lit", "parallel", None))]
    for (_, form, _, length), c in found.items():
        assert (c["tokens"], c["batch"]) == (length, 3)
        if form == "fused":
            assert c["status"] == "not available here" and c["reason"] == "'fused' runs on CUDA devices alone" and c["median_ms"] is None
            continue
        assert c["status"] == "measured" and c["reason"] is None and c["estimated_ms"] is None
        assert 0 < c["quartile_1_ms"] <= c["median_ms"] <= c["quartile_3_ms"]
        assert c["sequences_per_second"] == pytest.approx(3000 / c["median_ms"])
        assert c["tokens_per_second"] == pytest.approx(length * c["sequences_per_second"])
        assert c["resident_bytes"] >= 4 * (c["parameters"] + 3 * length) and c["peak_bytes"] == c["resident_bytes"] + c["forward_bytes"]
        assert c["forward_bytes"] > 4 * 3 * length * (8 + 8 + 32), "stream, norm, hidden layer of the MLP"
    assert found["lion_s", "recurrent", None, 16]["state_size"] == found["lion_s", "recurrent", None, 48]["state_size"] == 2 * 2 * 2 * 4 * 5
    assert found["softmax", None, None, 16]["state_size"] is None
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [r["median_ms"] for r in rows] == ["" if c["median_ms"] is None else str(c["median_ms"]) for c in found.values()]
    pictures = {p.name for p in (tmp_path / "out").glob("*.png") if p.read_bytes().startswith(b"\x89PNG")}
    assert pictures == {"memory_length.png", "time_length.png", "forms.png"}
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        words = " ".join(text.replace("|", " ").split())
        assert "sequences of values, batch 3, float32, not compiled, model.width=8" in words and "16 tokens 48 tokens" in words
        assert "lion_s fused not available here: 'fused' runs on CUDA devices alone" in words and "lion_lit parallel" in words
        assert "…" not in text and "model.mixer.form" not in words.partition("Forward pass in inference")[2]


def test_resolutions_chunks_and_a_constant_number_of_tokens():
    sizes = ("--resolutions=16,32", "--chunk-sizes=8,32", "--tokens=40", "--forms=chunkwise,recurrent", "--output=out")
    run("softmax", "lion_s_multiscan", "size=vit_tiny", "model.patch_size=4", *TINY, *sizes)
    found = cells()
    names = [("softmax", None, None), ("lion_s_multiscan", "chunkwise", 8), ("lion_s_multiscan", "chunkwise", 32)]
    assert [*found] == [(*name, size) for size in (16, 32) for name in (*names, ("lion_s_multiscan", "recurrent", None))]
    assert {(c["resolution"], c["tokens"], c["batch"]) for c in found.values()} == {(16, 17, 2), (32, 65, 1)}
    assert {c["status"] for c in found.values()} == {"measured"}
    chunk_8, chunk_32 = (found["lion_s_multiscan", "chunkwise", chunk, 32] for chunk in (8, 32))
    assert chunk_8["operator_flops"] != chunk_32["operator_flops"] and chunk_8["counted_flops"] != chunk_32["counted_flops"]
    page = Path("out/table.md").read_text()
    assert "images, B L about 40" in page and "| lion_s_multiscan | chunkwise 8 | 32 px | 65 | 1 |" in page


def test_every_form_computes_what_the_model_does(monkeypatch):
    """What is timed is the model's forward pass in that form: a form that is wrong gives other logits."""
    settings = model_settings.ModelSettings(("lion_d",), tuple(TINY), lengths=(20,), batch=2, classes=5, device="cpu")
    (cfg,) = model_settings.configurations(settings).values()
    torch.manual_seed(0)
    model = bench.build.model(cfg.model, bench.data_spec(settings, 20)).eval()
    drawn = {}
    subject = bench._Subject(model, drawn, 2, 20, settings, torch.device("cpu"))
    with torch.no_grad():
        expected = model(drawn[2])
    for form, chunk in (("parallel", None), ("recurrent", None), ("chunkwise", 8), ("chunkwise", 16)):
        call, figures = subject.prepare(form, chunk)
        torch.testing.assert_close(call(), expected, atol=1e-5, rtol=1e-4)
        assert figures["counted_form"] == ("chunkwise" if form == "recurrent" else form)
    true = api._IMPLEMENTATIONS["recurrent"]
    monkeypatch.setitem(
        api._IMPLEMENTATIONS, "recurrent", lambda *a, **o: tuple(2 * x if i == 0 else x for i, x in enumerate(true(*a, **o)))
    )
    assert not torch.allclose(subject.prepare("recurrent", None)[0](), expected, atol=1e-3)


def test_recurrent_memory_is_a_line_as_steep_as_predicted(monkeypatch):
    lengths = "--lengths=64,512,768,1024"
    run("lion_s", *TINY, lengths, "--forms=recurrent", "--output=out")
    for line in record()["fits"]:
        assert (line["points"], line["shortest"], line["longest"]) == (3, 512, 1024), "shorter ones are gathered at once"
        assert line["over_predicted"] == pytest.approx(1, abs=0.02) and line["r_squared"] > 0.9999
        assert line["state_size"] == 2 * 2 * 2 * 4 * 5 and line["state_constant"]
    assert "| lion_s | 512 to 1,024 |" in Path("out/table.md").read_text()

    true, kept = recurrent.advance, []

    def hoarding(state, *args):  # keeps what it may forget
        true(state, *args)
        kept.append(state.repeat(256, 1, 1))

    monkeypatch.setattr(recurrent, "advance", hoarding)
    run("lion_s", *SHALLOW, lengths, "--forms=recurrent", "--output=more")
    assert record("more")["fits"][0]["over_predicted"] > 1.2


def test_cells_without_figures(monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    seen = []

    def full_later(*args, **options):
        seen.append(1)
        return full() if len(seen) > 2 else api.parallel(*args, **options)  # two layers a pass

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", full)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", full_later)
    monkeypatch.setattr(bench, "read_counts", lambda *args: bench.Counts((bench_call(),), 1.0))
    monkeypatch.setattr(bench._Subject, "_count", lambda *args: None)
    run("lion_d", "softmax", *TINY, "--lengths=8,16", "--forms=parallel,recurrent,chunkwise", "--output=out")
    found = cells()
    assert statuses(found) == {
        ("lion_d", "parallel", None, 8): "measured",
        ("lion_d", "recurrent", None, 8): "out of memory",
        ("lion_d", "chunkwise", 64, 8): "out of memory",  # in its turn
        ("softmax", None, None, 8): "measured",
        ("lion_d", "parallel", None, 16): "measured",
        ("lion_d", "recurrent", None, 16): "out of memory",
        ("lion_d", "chunkwise", 64, 16): "out of memory",
        ("softmax", None, None, 16): "measured",
    }
    assert all((c["median_ms"] is None) == (c["peak_bytes"] is None) == (c["status"] != "measured") for c in found.values())
    assert "out of memory" in capsys.readouterr().out


def bench_call():
    from lba_exp.bench.model_counts import Call

    return Call(8, 2, 4, 4, 2, True, True)


def test_a_form_that_breaks_is_told(monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("kernel\nmiscompiled")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", broken)
    run("lion_d", "softmax", *TINY, "--lengths=8", "--forms=parallel,recurrent", "--output=out", code=1)
    assert [c["status"] for c in cells().values()] == ["measured", "failed", "measured"]
    assert "1 of 3 cells failed, the first one (lion_d) with: RuntimeError: kernel" in capsys.readouterr().err


class Sleepy(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.runs = seconds, 0

    def forward(self, x):
        self.runs += 1
        time.sleep(self.seconds)
        return x + 1


def test_the_pace_is_that_of_the_second_block():
    blocks = nn.ModuleList([Sleepy(0.2), *(Sleepy(0.01) for _ in range(5))])
    call = lambda: nn.Sequential(*blocks)(torch.zeros(10, 10))  # noqa: E731
    found = pace.pace(call, blocks, 1.0, torch.device("cpu"))
    assert not found.left and 0.06 <= found.seconds < 0.2 and [b.runs for b in blocks] == [1] * 6
    found = pace.pace(call, blocks, 0.05, torch.device("cpu"))
    assert found.left and 0.06 <= found.seconds < 0.2 and [b.runs for b in blocks] == [2, 2, 1, 1, 1, 1]
    assert pace.two_blocks_bytes(call, blocks, torch.device("cpu")) >= 3 * 400 and [b.runs for b in blocks] == [3, 3, 1, 1, 1, 1]
    call()
    assert [b.runs for b in blocks] == [4, 4, 2, 2, 2, 2], "no hook is left behind"
    one = nn.ModuleList([Sleepy(0.02)])
    found = pace.pace(lambda: one[0](torch.zeros(1)), one, 0.001, torch.device("cpu"))
    assert not found.left and found.seconds >= 0.02


def test_a_cell_over_its_limit_is_left_and_estimated(monkeypatch, capsys):
    true, passes = api._IMPLEMENTATIONS["recurrent"], []

    def slow(q, *args, **options):
        passes.append(q.shape[1])
        time.sleep(2e-3 * q.shape[1])
        return true(q, *args, **options)

    layers = ["model.width=8", "model.depth=6", "model.heads=2"]
    run("lion_d", *layers, "--lengths=24,32", "--forms=recurrent", "--output=free")
    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", slow)
    sizes = ("--lengths=24,32,256", "--cell-seconds=0.8", "--forms=parallel,recurrent", "--memory-budget-gib=0.002", "--output=out")
    run("lion_d", *layers, *sizes)
    found, free = cells(), cells("free")
    assert [found["lion_d", "parallel", None, length]["status"] for length in (24, 32, 256)] == ["measured", "measured", "skipped"]
    assert found["lion_d", "parallel", None, 256]["reason"].startswith("needs an estimated 0.00")
    for length in (24, 32):
        c, whole = found["lion_d", "recurrent", None, length], free["lion_d", "recurrent", None, length]
        assert c["status"] == pace.OVER and c["median_ms"] is c["tokens_per_second"] is None and "2 of 6 blocks" in c["reason"]
        assert 6 * 2 * length <= c["estimated_ms"] < 3 * 6 * 2 * length
        assert c["forward_bytes"] == pytest.approx(whole["forward_bytes"], rel=0.01) and c["operator_flops"] == whole["operator_flops"]
    last = found["lion_d", "recurrent", None, 256]
    assert (last["status"], last["estimated_ms"], last["peak_bytes"]) == (pace.OVER, None, None) and "32 tokens took too long" in last[
        "reason"
    ]
    assert max(passes) == 32 and len(passes) == 2 * pace.PACED_BLOCKS
    for text in (capsys.readouterr().out, Path("out/table.md").read_text()):
        assert "about " in text and "over the limit" in text and "would have taken more than 0.8 s" in text
    run("lion_d", *TINY, "--lengths=8", "--forms=parallel,recurrent", "--cell-seconds=60", "--output=enough")
    assert {c["status"] for c in cells("enough").values()} == {"measured"}


@pytest.mark.parametrize(("number", "who", "code"), [(signal.SIGINT, "the user", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_stopped(monkeypatch, capsys, number, who, code):
    measured = bench._measure_size

    def until(size, *args):
        if size == 16:
            assert record()["status"] == "running" and len(record()["cells"]) == 2, "what a killed process leaves"
            signal.raise_signal(number)
        return measured(size, *args)

    monkeypatch.setattr(bench, "_measure_size", until)
    run("softmax", "lion_d", *TINY, "--lengths=8,16", "--forms=parallel", "--output=out", code=code)
    assert record()["status"] == "interrupted" and {c["length"] for c in record()["cells"]} == {8}
    assert f"stopped by {who} after 2 of 4 cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model.depth=1"], "no model is named: give entries of conf/model"),
        (["softmx"], "model=softmx: 'softmx' is not an entry of model; did you mean softmax"),
        (["lion_s", "lion_s"], "'lion_s' is named twice"),
        (
            ["lion_s", "--forms=recurent"],
            "--forms: 'recurent' is not a form; did you mean recurrent? Valid: parallel, recurrent, chunkwise, fused.",
        ),
        (["lion_s model.mixer.form=auto"], "--forms: 'auto' is not a form"),
        (["lion_s", "model.mixer.form=parallel"], "model.mixer.form=parallel: the forms of all models are those of --forms."),
        (["lion_s", "--lengths=8", "--resolutions=32"], "--lengths and --resolutions exclude each other"),
        (["lion_s", "--batch=2", "--tokens=64"], "--tokens and --batch exclude each other"),
        (["lion_s", "--resolutions=30"], "--resolutions 30 is no multiple of model.patch_size=16."),
        (["lion_s", "--lengths=0"], "--lengths 0 does not fit: give whole numbers >= 1, such as 1024,4096."),
        (["lion_s", "--cell-seconds=0"], "--cell-seconds 0 does not fit: give a number above 0."),
        (["lion_s", "--cell-seconds=9", "--compile=graphs"], "--cell-seconds leaves a pass between two blocks"),
        (["lion_s", "--compile=blocks"], "--compile: 'blocks' is not what is compiled. Valid: off, model, graphs."),
        (["lion_s", "model.heads=7"], "model.heads"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        command.main(["model", *arguments, "--output=out"])
    streams = capsys.readouterr()
    assert end.value.code == 1 and streams.out == "" and streams.err.count("\n") == 1
    assert streams.err.removeprefix("lba-bench: ").startswith(sentence), streams.err
    assert not (tmp_path / "out").exists()


def test_operations_have_prefixes():
    texts = [model_report.operations(n) for n in (None, 12, 1234, 5_600_000, 7.89e9, 1.5e12)]
    assert texts == ["", "12", "1.23 k", "5.6 M", "7.89 G", "1.5 T"]


@pytest.mark.gpu
def test_on_a_gpu():
    arguments = ["softmax", "lion_s", "hydra", "vim", "model.width=64", "model.depth=3", "model.heads=2", "--lengths=64,256", "--batch=2"]
    with pytest.raises(SystemExit) as end:
        command.main(["model", *arguments, "--device=cuda", "--dtype=bfloat16", "--seconds=0.01", "--cell-seconds=30", "--output=out"])
    assert end.value.code == 0
    for key, c in cells().items():
        assert c["status"] == "measured" and c["reason"] is None and c["peak_bytes"] > 2 * c["parameters"], key
