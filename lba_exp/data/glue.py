"""GLUE (arXiv 1804.07461) in the layout of its own download: tab-separated files, with columns and labels of their own for each task.

They are given the columns, the splits and the numbers of labels that the data set has on the hub (nyu-mll/glue), so that a task's
settings (conf/data/glue_*.yaml) fit both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lba_exp.data.sources import Source
from lba_exp.errors import DataError
from lba_exp.messages import unknown

SPLITS = {"train": "train", "dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Layout:
    """Of a task's files.

    Attributes:
        columns: column on the hub -> column here, a name in the first line, or a number where there is no such line.
        classes: the labels in words, in the order of their numbers; empty where the labels are numbers.
        number: labels are no classes.
    """

    columns: Mapping[str, str | int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    number: bool = False


LAYOUTS = {
    "cola": Layout({"sentence": 3, "label": 1}),
    "sst2": Layout({"sentence": "sentence", "label": "label"}),
    "mrpc": Layout({"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}),
    "stsb": Layout({"sentence1": "sentence1", "sentence2": "sentence2", "label": "score"}, number=True),
    "qqp": Layout({"question1": "question1", "question2": "question2", "label": "is_duplicate"}),
    "mnli": Layout({"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}, ("entailment", "neutral", "contradiction")),
    "qnli": Layout({"question": "question", "sentence": "sentence", "label": "label"}, ENTAILMENT),
    "rte": Layout({"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}, ENTAILMENT),
}


def is_original(source: Source) -> bool:
    """Whether a source is a task's folder of GLUE's own download: it calls its validation split dev."""
    return source.kind == "folder" and any((source.path / f"{name}.tsv").is_file() for name in SPLITS if name != "train")


def read_original(source: Source, task: str) -> tuple[dict[str, Any], list[str]]:
    """split -> ``datasets.Dataset`` with the hub's columns, and sentences about rows that were left out.

    The test files have no labels and are not read. Rows that lack a field (QQP has some) are left out.

    Raises:
        DataError: an unknown task, a file without the task's columns, or a label that is none of the task's.
    """
    if task not in LAYOUTS:
        raise DataError(unknown(task, LAYOUTS, "a task of GLUE (data.glue_task)"))
    found, notes = {}, []
    for name, split in SPLITS.items():
        path = source.path / f"{name}.tsv"
        if path.is_file():
            found[split], short = _read(path, LAYOUTS[task])
            if short:
                notes.append(f"{path.name}: {short:,} rows lack a field and are left out.")
    return found, notes


def _read(path: Path, layout: Layout) -> tuple[Any, int]:
    import datasets

    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from None
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    places = layout.columns
    if not all(isinstance(place, int) for place in places.values()):
        header, rows = (rows[0] if rows else []), rows[1:]
        for column in places.values():
            if column not in header:
                raise DataError(f"{path}: {unknown(str(column), header, 'a column')}")
        places = {ours: header.index(theirs) for ours, theirs in places.items()}
    last = max(places.values())
    whole = [row for row in rows if len(row) > last and all(row[place] for place in places.values())]
    columns: dict[str, list] = {ours: [row[place] for row in whole] for ours, place in places.items()}
    feature = datasets.Value("float32")
    if not layout.number:
        names = list(layout.classes) or ["0", "1"]
        feature = datasets.ClassLabel(names=names)
        if strange := [label for label in columns["label"] if label not in names]:
            raise DataError(f"{path}: the label {strange[0]!r} is none of this task's, which are {', '.join(names)}.")
        columns["label"] = [names.index(label) for label in columns["label"]]
    else:
        try:
            columns["label"] = [float(label) for label in columns["label"]]
        except ValueError as error:
            raise DataError(f"{path}: a label is no number ({error}).") from None
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"label": feature})
    return datasets.Dataset.from_dict(columns, features=features), len(rows) - len(whole)
