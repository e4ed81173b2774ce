"""``lba-bench steps``: training steps of tiny models, what the table says of them, and what is refused."""

import csv
import json

import pytest
import torch

from lba_exp import build
from lba_exp.bench import steps
from lba_exp.bench.measure import LONGEST_TURN
from lba_exp.bench.step_settings import StepSettings, configurations
from lba_exp.bench.steps_report import notes
from lba_exp.commands import bench
from lba_exp.ops import api

TINY = ["size=vit_tiny", "model.width=8", "model.depth=2", "model.heads=2", "model.patch_size=4"]
OPTIONS = ["--device=cpu", "--threads=1", "--repeats=2", "--seconds=0.02", "--resolution=12", "--batch=3", "--classes=5"]
VIT_B = 86_567_656  # parameters of ViT-B/16 at 224 pixels with 1,000 classes (arXiv 2010.11929)


def run(*arguments, code=0, compiled="off"):
    with pytest.raises(SystemExit) as end:
        bench.main(["steps", *TINY, *arguments, *OPTIONS, f"--compile={compiled}"])
    assert end.value.code == code


def cells(folder):
    return {c["model"]: c for c in json.loads((folder / "result.json").read_text())["cells"]}


def settings(*models, **options):
    return StepSettings(models, (*TINY,), resolution=12, batch=3, classes=5, dtype="float32", compile="off", device="cpu", **options)


@pytest.mark.parametrize("resolution", [224, 896])
def test_the_default_is_vit_b_16(resolution):
    models = {"softmax": 0, "lion_lit": 0, "lion_d": 12, "lion_s": 769 * 12, "lion_s_multiscan": 2 * 769 * 12}
    asked = StepSettings(tuple(models), resolution=resolution)
    tokens = (resolution // 16) ** 2 + 1
    for name, cfg in configurations(asked).items():
        with torch.device("meta"):
            model = build.model(cfg.model, steps.data_spec(asked))
        assert sum(p.numel() for p in model.parameters()) == VIT_B + 12 * models[name] + (tokens - 197) * 768
        assert (cfg.model.width, cfg.model.depth, cfg.model.heads, model.blocks[0].mlp[0].out_features) == (768, 12, 12, 3072)
        assert model.class_token is not None and model.positions is not None and model.form in (None, "auto")


def test_every_model_has_its_line(tmp_path, capsys):
    run("softmax", "lion_lit", "lion_s model.mixer.form=recurrent", "--form=chunkwise", "--output=out")
    found = cells(tmp_path / "out")
    assert [*found] == ["softmax", "lion_lit", "lion_s model.mixer.form=recurrent"]
    assert [c["form"] for c in found.values()] == [None, "chunkwise", "recurrent"]
    first = found["softmax"]
    for c in found.values():
        assert c["status"] == "measured" and c["reason"] is None and c["calls"] >= 2 and (c["tokens"], c["batch"]) == (10, 3)
        assert 0 < c["quartile_1_ms"] <= c["median_ms"] <= c["quartile_3_ms"]
        assert c["over_first"] == pytest.approx(c["median_ms"] / first["median_ms"])
        assert c["images_per_second"] == pytest.approx(3000 / c["median_ms"])
        assert c["peak_bytes"] > 4 * 4 * c["parameters"], "weights, gradients and two averages in float32"
        assert c["peak_over_first"] == pytest.approx(c["peak_bytes"] / first["peak_bytes"]) and 0 < c["first_loss"] < 5
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [float(r["median_ms"]) for r in rows] == [c["median_ms"] for c in found.values()]
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        words = " ".join(text.split())
        assert "Training step, 12 px (10 tokens), batch 3, bf16 autocast, not compiled, size=vit_tiny model.width=8" in words
        assert all(name in words for name in found) and "images/s" in words
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "peak memory: weights" in "".join(notes(record))
    record["settings"]["compile"] = "graphs"
    assert "peak memory: not told: CUDA graphs" in "".join(notes(record))


def test_a_step_is_adamws_on_the_loss():
    (cfg,) = configurations(settings("lion_s")).values()
    step = steps.Step(cfg, settings("lion_s"), torch.device("cpu"))
    torch.manual_seed(0)
    model = build.model(cfg.model, steps.data_spec(settings("lion_s")))
    loss = torch.nn.functional.cross_entropy(model(step.images), step.labels, label_smoothing=cfg.optim.label_smoothing)
    loss.backward()
    assert float(step()) == pytest.approx(float(loss.detach())) and all(p.grad is None for p in step.model.parameters())
    for (name, before), after in zip(model.named_parameters(), step.model.parameters(), strict=True):
        moved = before.grad.abs() > 1e-6  # where Adam's first step is the learning rate, against the gradient
        exempt = before.ndim == 1 or "gate" in name or "positions" in name or "class_token" in name
        kept = before * (1 if exempt else 1 - cfg.optim.lr * cfg.optim.weight_decay)
        expected = (kept - cfg.optim.lr * before.grad.sign())[moved]
        torch.testing.assert_close(after[moved], expected, atol=0.02 * cfg.optim.lr, rtol=0, msg=name)


@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_compiled_models_keep_their_graphs_side_by_side(tmp_path, monkeypatch, compiled):
    """More models than torch keeps graphs of one function, and turns in which none is compiled again."""
    from torch._dynamo import config

    made, turns, plain = [], [], torch.compile

    def backend(graph, inputs):
        made.append(len(turns))
        return graph.forward

    def turn(*arguments):
        turns.append(len(made))
        return take_turns(*arguments)

    take_turns = steps.take_turns
    monkeypatch.setattr(torch, "compile", lambda *args, **options: plain(*args, **options, backend=backend))
    monkeypatch.setattr(steps, "take_turns", turn)
    models = ["softmax", "lion_lit", "lion_d", "lion_d model.mixer.form=recurrent"]
    with config.patch(recompile_limit=2):
        run(*models, "--form=parallel", "--output=out", compiled=compiled)
    assert {c["status"] for c in cells(tmp_path / "out").values()} == {"measured"}
    assert turns[0] >= len(models) and set(made) == {0}, "graphs are made in the warm-up alone"


def test_a_model_that_does_not_fit_is_an_empty_cell(tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def elsewhere(*args, **options):
        raise ValueError("form: 'chunkwise' needs a machine of the moon")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", full)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "chunkwise", elsewhere)
    run("lion_d model.mixer.form=recurrent", "softmax", "lion_d", "--form=chunkwise", "--output=out")
    found = cells(tmp_path / "out")
    assert [(c["status"], c["median_ms"] is None) for c in found.values()] == [
        ("out of memory", True),
        ("measured", False),
        ("not available here", True),
    ]
    assert found["softmax"]["over_first"] is None
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| out of memory |" in page and "lion_d not available here: 'chunkwise' needs a machine of the moon" in page
    assert "out of memory" in capsys.readouterr().out


def test_memory_that_ends_in_a_turn(monkeypatch):
    calls = []

    def full(*args, **options):
        calls.append(1)
        if len(calls) > 2 * (steps.WARM_UP + 1):  # two layers a step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return api.parallel(*args, **options)

    monkeypatch.setitem(api._IMPLEMENTATIONS, "recurrent", full)
    asked = settings("lion_d", "softmax", form="recurrent", repeats=1, seconds=1e-3)
    one, other = steps.measure(configurations(asked), asked, torch.device("cpu"), lambda text, done: None)
    assert (one["status"], one["median_ms"], one["peak_bytes"]) == ("out of memory", None, None)
    assert other["status"] == "measured" and other["calls"] <= LONGEST_TURN


def test_a_model_that_breaks_is_told(monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("kernel\nmiscompiled")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "parallel", broken)
    run("softmax", "lion_d", "--form=parallel", code=1)
    assert "1 of 2 cells failed, the first one (lion_d) with: RuntimeError: kernel" in capsys.readouterr().err


def test_stopped_by_the_user(tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "take_turns", stop)
    run("softmax", "--output=out", code=130)
    assert "stopped by the user" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no model is named: give entries of conf/model"),
        (["softmax", "softmax"], "'softmax' is named twice"),
        (["softmx"], "model=softmx: 'softmx' is not an entry of model; did you mean softmax"),
        (['lion_s "'], "'lion_s \"' is no model with its overrides: No closing quotation."),
        (["softmax", "lion_s", "--form=chunkwize"], "model.mixer.form=chunkwize: 'chunkwize' is not valid for model.mixer.form"),
        (["lion_s model.mixer.gat=none"], "model.mixer.gat is not a key of a run; did you mean model.mixer.gate?"),
        (["lion_s_mlm", "size=bert_mini"], "model.kind=masked_lm does not"),
        (["softmax", "--dtype=float16"], "--dtype: 'float16' is not a dtype"),
        (["softmax", "--compile=all"], "--compile: 'all' is not what is compiled. Valid: model, graphs, blocks, off."),
        (["softmax", "--resolution=0"], "--resolution 0 does not fit"),
        (["softmax", "model.patch_size=4", "--resolution=10"], "--resolution 10 is no multiple of model.patch_size=4."),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        bench.main(["steps", "model.depth=1", *arguments, "--output=out"])
    streams = capsys.readouterr()
    assert end.value.code == 1 and streams.out == "" and streams.err.count("\n") == 1
    assert streams.err.removeprefix("lba-bench: ").startswith(sentence), streams.err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    with pytest.raises(SystemExit) as end:
        bench.main(["steps", "softmax", "lion_s", *TINY, *OPTIONS, "--device=cuda", "--output=out"])
    assert end.value.code == 0
    for c in cells(tmp_path / "out").values():
        assert c["status"] == "measured" and c["peak_bytes"] > 16 * c["parameters"] and c["median_ms"] > 0
