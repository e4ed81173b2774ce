"""``lba-bench times``: training steps over softmax attention's, beside the paper's; and the script that runs it with the others."""

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lba_exp.bench import model_settings, step_settings, time_settings, times
from lba_exp.commands import bench, bench_options

TINY = ["model.width=8", "model.depth=1", "model.heads=2", "model.patch_size=4"]
OPTIONS = ["--device=cpu", "--threads=1", "--repeats=1", "--seconds=0.005", "--resolution=8", "--batch=2", "--classes=5", "--compile=off"]
SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu_inference.sh"


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        bench.main(["times", *arguments, *OPTIONS])
    assert end.value.code == code


def test_the_papers_column_stands_beside_ours(tmp_path, capsys):
    some = ["softmax", "lion_d_multiscan", "hydra model.mlp_ratio=3", "vim model.mlp_ratio=3"]
    run(*some, *TINY, "--sizes=vit_small", "--output=out")
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    cells = content["cells"]
    assert content["status"] == "finished" and content["settings"]["sizes"] == ["vit_small"]
    assert [(c["size"], c["model"]) for c in cells] == [("vit_small", model) for model in some]
    assert [c["paper"] for c in cells] == [1, 1.66, 2.50, 14.95]  # arXiv 2502.16249, the table of relative training times
    assert [c["attention"] for c in cells] == ["torch's", "ours", "our implementation", "our implementation"]
    assert all(c["status"] == "measured" and c["over_first"] == pytest.approx(c["median_ms"] / cells[0]["median_ms"]) for c in cells)
    for text in (capsys.readouterr().out, (tmp_path / "out" / "table.md").read_text()):
        words = " ".join(text.replace("|", " ").split())
        assert "size model attention parameters step x softmax paper" in words and "says nothing of the speed of the method" in words
        assert "vit_small vim model.mlp_ratio=3 our implementation" in words and "14.95" in words


def test_the_defaults_are_the_papers_sizes():
    options = {name: default for name, default in vars(parsed()).items() if name not in ("run", "bench")}
    settings = time_settings.read(options)
    assert {size: s.models for size, s in settings.items()} == dict.fromkeys(("vit_tiny", "vit_small", "vit_base"), time_settings.MODELS)
    models = ("softmax", "vim model.mlp_ratio=3")
    found = time_settings.configurations({size: replace(s, models=models[: 1 + (size == "vit_base")]) for size, s in settings.items()})
    shapes = {size: {(c.model.width, c.model.depth, c.model.heads) for c in composed.values()} for size, composed in found.items()}
    assert shapes == {"vit_tiny": {(192, 12, 3)}, "vit_small": {(384, 12, 6)}, "vit_base": {(768, 12, 12)}}
    assert [c.model.mlp_ratio for c in found["vit_base"].values()] == [4, 3]
    assert {(s.resolution, s.batch, s.dtype) for s in settings.values()} == {(224, 128, "bfloat16")}
    # arXiv 2502.16249, the table of relative training times: DeiT, LIT, D, D*, S, S*, Hydra, Vim
    assert [time_settings.paper_time("vit_small", m) for m in time_settings.MODELS] == [1, 0.74, 1.49, 1.66, 2.03, 2.72, 2.50, 14.95]
    assert [time_settings.paper_time("vit_tiny", m) for m in time_settings.MODELS] == [1, 0.69, 1.48, 1.73, 2.05, 3.83, None, 9.48]
    assert [time_settings.paper_time("vit_base", m) for m in time_settings.MODELS] == [1, 0.73, 1.39, 1.48, 1.46, 1.68, 2.51, 10.86]
    assert time_settings.paper_time("vit_huge", "lion_s") is None and time_settings.paper_time("vit_base", "retnet") is None


def parsed():
    return bench_options.make("lba-bench", "", bench.RUNS).parse_args(["times"])


def test_a_model_that_does_not_fit_is_an_empty_cell(monkeypatch, tmp_path, capsys):
    import torch

    from lba_exp.ops import api

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(api._IMPLEMENTATIONS, "parallel", full)
    run("softmax", "lion_d", "retnet", *TINY, "--sizes=vit_tiny", "--form=parallel", "--output=out")
    cells = json.loads((tmp_path / "out" / "result.json").read_text())["cells"]
    assert [c["status"] for c in cells] == ["measured", "out of memory", "out of memory"] and cells[1]["paper"] == 1.48
    assert times.row(cells[1])[4:7] == ("out of memory", "", "1.48") and times.row(cells[2])[6] == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lion_s", "softmax"], "'lion_s' comes first, and the paper's times are relative to softmax attention: name softmax first."),
        (["--sizes=vit_huge"], "size=vit_huge: 'vit_huge' is not an entry of size"),
        (["size=vit_tiny"], "size=vit_tiny: the sizes to measure are those of --sizes."),
        (["softmax", "lion_s size=vit_base"], "size=vit_base: the sizes to measure are those of --sizes."),
        (["softmax", "softmax"], "'softmax' is named twice"),
        (["--sizes=,"], "--sizes is empty"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, sentence):
    run(*arguments, "--output=out", code=1)
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1 and streams.err.removeprefix("lba-bench: ").startswith(sentence), streams.err
    assert not (tmp_path / "out").exists()


def script(tmp_path, *arguments, **environment):
    """Runs the script with an interpreter that does nothing but write down its words and make the folder: what it was called with."""
    stub = tmp_path / "python"
    stub.write_text(
        'line=$(printf "%q " "$@")\necho "$line" >> calls\n'
        'while [ $# -gt 0 ]; do [ "$1" != --output ] || { mkdir -p "$2"; echo "## a table" > "$2/table.md"; }; shift; done\n'
        'exit "${CODE:-0}"\n'
    )
    stub.write_text("#!/usr/bin/env bash\n" + stub.read_text())
    stub.chmod(0o755)
    (tmp_path / "calls").unlink(missing_ok=True)
    known = os.environ | {"PYTHON": str(stub)} | environment
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=known, timeout=60, cwd=tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return done, [shlex.split(line)[2:] for line in calls]


@pytest.mark.parametrize("small", ["", "1"])
def test_the_script_asks_for_what_there_is(tmp_path, small):
    done, calls = script(tmp_path, "out", SMALL=small, DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    timed = [words for words in calls if words[0] != "steps"]
    compiled = [words for words in calls if words[0] == "steps"]
    assert [words[0] for words in timed] == ["presets", "model", "model", "model", *["times"] * (2 if small else 3)]
    assert len(compiled) == (0 if small else 3 * len(time_settings.MODELS))
    found = [bench_options.make("lba-bench", "", bench.RUNS).parse_args(words) for words in timed + compiled]
    assert {args.device for args in found} == {"cpu"}
    resolutions, chunks, lengths = (model_settings.read(vars(args)) for args in found[1:4])
    assert {s.cell_seconds is None for s in (resolutions, chunks, lengths)} == {False} and len(chunks.chunk_sizes) > 3
    if not small:
        assert (resolutions.resolutions[0], resolutions.resolutions[-1], lengths.lengths[0], lengths.lengths[-1]) == (224, 2496, 256, 65536)
        for settings in (resolutions, chunks, lengths):
            few = replace(settings, models=settings.models[-1:])
            (cfg,) = model_settings.configurations(few).values()
            assert (cfg.model.width, cfg.model.depth, cfg.model.heads, cfg.model.mlp_ratio) == (192, 12, 3, 4)
        sizes = [time_settings.read(vars(args)) for args in found[4:7]]
        assert {size for settings in sizes for size in settings} == {"vit_tiny", "vit_small", "vit_base"}
        before = [step_settings.read(vars(args)) for args in found[7:]]  # what is compiled beforehand is what is timed
        assert {(*s.models, s.overrides, s.batch, s.compile) for s in before} == {
            (model, s.overrides, s.batch, s.compile) for settings in sizes for s in settings.values() for model in s.models
        }


def test_the_script_leaves_what_is_there_and_goes_on_after_a_failure(tmp_path):
    done, calls = script(tmp_path, "out", "lengths", "times", CODE="1")
    assert done.returncode == 1 and [words[0] for words in calls if words[0] != "steps"] == ["model", "times", "times", "times"]
    done, calls = script(tmp_path, "out", "times", "chunk_size")
    assert done.returncode == 0 and [words[0] for words in calls] == ["model"] and "out/times_vit_base is there already" in done.stdout
    assert "# out/chunk_size/table.md\n## a table" in done.stdout
    wrong, calls = script(tmp_path, "out", "chunks")
    assert wrong.returncode == 1 and calls == []
    assert wrong.stderr.startswith("chunks is no part: checks, resolutions, chunk_size, lengths, times")
