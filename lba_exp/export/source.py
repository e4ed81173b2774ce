"""What is exported: a model and what is known about it, from a run, a model folder or memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lba_exp import registry
from lba_exp.callbacks.checkpoints import BEST, load_checkpoint
from lba_exp.convert.files import read_model
from lba_exp.errors import UserError
from lba_exp.evaluating import configuration
from lba_exp.results.folder import read_record


def read(source: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, and the part of the metadata that tells where it is from.

    Args:
        source: a module; or the path of a run folder (its best checkpoint is taken), of a checkpoint in one, or of a model folder.

    Raises:
        UserError: no such path, or no model there.
    """
    about = dict.fromkeys(("run", "name", "step", "commit", "data", "class_names", "normalisation", "vocabulary"))
    about["second_text"] = False
    if isinstance(source, nn.Module):
        return source, about
    path = Path(source).expanduser()
    checkpoint = path if path.is_file() else path / "checkpoints" / BEST
    folder = checkpoint.parent.parent
    if checkpoint.parent.name == "checkpoints" and (folder / "config.yaml").is_file():
        cfg = configuration(folder)  # imports the run's plugins
        about |= _of_run(folder, cfg, load_checkpoint(checkpoint))
        path = checkpoint
    try:
        return read_model(path), about
    except UserError:
        raise
    except Exception as error:  # torch meets files of other kinds with errors of many kinds
        raise UserError(f"{path} cannot be read as a model ({type(error).__name__}: {' '.join(str(error).split())}).") from error


def _of_run(folder: Path, cfg: Any, content: dict[str, Any]) -> dict[str, Any]:
    # the data themselves are not needed: the checkpoint holds what a model must know of them
    data = content.get(registry.DATA[cfg.data.kind].__qualname__) or {}
    record = read_record(folder) or {}
    normalisation = {"mean": data["mean"], "deviation": data["deviation"]} if "mean" in data else None
    return {
        "run": str(folder),
        "name": record.get("name"),
        "step": content["global_step"],
        "commit": (record.get("git") or {}).get("commit"),
        "data": record.get("data"),
        "class_names": data.get("class_names", data.get("classes")),
        "normalisation": normalisation,
        "vocabulary": data.get("vocabulary"),
        "second_text": cfg.data.second_text_column is not None,
    }
