"""Runs out of a Weights & Biases project, as rows for tables. Runs logged offline are read from their run folders instead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lba_exp.errors import UserError
from lba_exp.results.collect import STATUSES, UNFINISHED, Run

# W&B's word for a run that left no record -> ours
STATES = {"finished": "finished", "failed": "failed", "crashed": "failed", "killed": "interrupted"}
TIMEOUT = 20  # seconds for a request


def wandb_runs(projects: Sequence[str], api: Any = None) -> list[Run]:
    """The runs of some projects.

    A run's summary holds its record (``running._finish_wandb``); one that has none, because it was killed or logged by another program,
    is shown with its configuration and the test scores of its summary.

    Args:
        projects: ``ENTITY/PROJECT`` or ``PROJECT``.
        api: a ``wandb.Api``; default: a new one, with the key and server that wandb finds in its environment.

    Raises:
        UserError: no key, no network, no such project, or no run in it.
    """
    import requests

    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError  # what paging through runs raises bare

    found: list[Run] = []
    server = None
    try:
        if api is None:
            server = wandb.setup().settings.base_url
            requests.head(server, timeout=5)  # without network wandb's own service keeps asking, and was seen not to end
            api = wandb.Api(timeout=TIMEOUT)
        for project in projects:
            found += [_run(run) for run in api.runs(project, lazy=False)]  # else a request a run
    except (wandb.errors.Error, WandbApiFailedError, requests.RequestException, ValueError, TimeoutError) as error:
        unreachable = isinstance(error, requests.ConnectionError | requests.Timeout)
        reason = f"{server or 'its server'} cannot be reached" if unreachable else " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"--from wandb: Weights & Biases cannot be read ({reason}): it takes ENTITY/PROJECT, a key (`wandb login` or WANDB_API_KEY) "
            "and the network; runs logged offline are read from their run folders, without --from."
        ) from None
    if not found:
        raise UserError(f"--from wandb: there is no run in {', '.join(projects)}.")
    return sorted(found, key=lambda run: (str(run.record.get("name")), run.label("seed")))


def _run(run: Any) -> Run:
    config = _nested({key: value for key, value in _plain(run.config).items() if not key.startswith("_")})
    summary = _plain(run.summary)
    record = summary.get("record")
    told = {"name": run.name, **{key: config[key] for key in ("seed", "task") if key in config}}
    model, data, origin = (config.get(key) if isinstance(config.get(key), dict) else {} for key in ("model", "data", "origin"))
    told |= {"variant": model.get("name"), "data": data.get("name") or data.get("source"), "group": getattr(run, "group", None)}
    told |= {key: origin.get(key) for key in ("experiment", "sweep", "row")}
    told = {key: value for key, value in told.items() if value is not None}
    scores = {key[5:]: value for key, value in summary.items() if key.startswith("test/") and key.count("/") == 1}
    record = {**told, "metrics": {"test": scores}, **(record if isinstance(record, dict) else {})}
    status = record.get("status")
    if status not in STATUSES:
        status = STATES.get(run.state, UNFINISHED)
    error = None if status == "finished" else record.get("error") or f"W&B says: {run.state}"
    return Run(getattr(run, "url", None) or run.name, {**record, "status": status}, config, status, error)


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys, as the parameters of W&B's own sweeps have them, in their groups (``tracking.begin``)."""
    nested = {key: value for key, value in config.items() if "." not in key}
    for key, value in config.items():
        *path, last = key.split(".")
        node = nested
        for part in path:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[last] = value if path else node[last]
    return nested


def _plain(value: Any) -> Any:
    """W&B's own mappings as dicts."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): _plain(content) for key, content in value.items()}
    return value
