"""An installed wheel carries conf/, experiments/ and sweeps/, and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_carries_every_configuration_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ("conf", "experiments", "sweeps"):
        for path in (ROOT / room).rglob("*.yaml"):
            assert f"lba_exp/bundled/{path.relative_to(ROOT)}" in names
    assert {f"lba_exp/results/{file}" for file in ("paper.yaml", "report/page.html", "report/style.css")} <= names
    assert not [n for n in names if n.startswith(("tests", "runs"))]


def test_the_wheel_works_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    work = tmp_path / "work"
    (work / "experiments").mkdir(parents=True)
    (work / "experiments" / "mine.yaml").write_text("# @package _global_\nseed: 41\n")
    code = (
        "import lba_exp, sys; from lba_exp import composing; assert 'site' in lba_exp.__file__, lba_exp.__file__;"
        "print(sorted(composing.options('sweeps')), composing.compose(['experiments=mine']).seed,"
        "composing.compose(['experiments=digits_lion_d']).model.name)"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout and done.stdout.split()[-2:] == ["41", "lion_d"]
