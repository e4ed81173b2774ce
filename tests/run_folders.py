"""Run folders as a run leaves them, without running one."""

import json
from pathlib import Path
from typing import Any

import yaml


def config(model: str = "lion_s", seed: int = 0, data: str = "digits", **changes: Any) -> dict[str, Any]:
    """A resolved configuration; ``changes``: dotted keys with __ for the dots."""
    made = {
        "name": None,
        "task": "classification",
        "seed": seed,
        "threads": 1,
        "model": {"name": model, "width": 16, "mixer": {"gate": "selective"}},
        "data": {"name": data, "source": "digits"},
        "optim": {"lr": 0.002, "betas": [0.9, 0.999]},
        "parity": {"mode": "check", "tolerance": 1e-4},
        "origin": {"experiment": None, "sweep": None, "debug": None, "overrides": [f"model={model}", f"seed={seed}"]},
    }
    for key, value in changes.items():
        node = made
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return made


def write_run(
    root: Path,
    model: str = "lion_s",
    seed: int = 0,
    accuracy: float | None = 0.5,
    *,
    status: str = "finished",
    data: str = "digits",
    **changes,
) -> Path:
    """A run folder below ``root`` whose test accuracy is ``accuracy``; its costs grow with it. status "unfinished": no record."""
    folder = Path(root) / data / model / f"seed{seed}"
    folder.mkdir(parents=True)
    record_changes = {key[8:]: changes.pop(key) for key in list(changes) if key.startswith("record__")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config(model, seed, data, **changes)))
    if status == "unfinished":
        return folder
    record = {
        "status": status,
        "name": model,
        "variant": model,
        "data": data,
        "seed": seed,
        "experiment": None,
        "sweep": None,
        "row": None,
        "parameters": 1000,
        "environment": {"device": "cpu (x86_64)", "devices": 1, "threads": 1, "precision": "32-true"},
        "efficiency": {"train_seconds": 10 * (accuracy or 1), "wall_seconds": 20.0, "peak_memory_bytes": 2**20 * (100 + seed)},
    }
    if status == "finished":
        record["metrics"] = {"validation": {"accuracy": 0.9, "loss": 0.5}, "test": {"accuracy": accuracy, "loss": 1.5}}
        record["parity"] = {"verdict": "pass", "tolerance": 1e-4, "forms": {"recurrent": {"rel": 1.5e-7, "accuracy": accuracy}}}
    else:
        record["error"] = "ValueError: it broke"
    (folder / "result.json").write_text(json.dumps(record | record_changes))
    return folder
