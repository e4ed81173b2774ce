"""GLUE's eight tasks in small, as files in the hub's layout and in that of GLUE's own download."""

from pathlib import Path

import numpy as np

from tests.corpus import SPECIAL, WORDS

PLAIN = [word for word in WORDS if not word.startswith("##")]
ENTAILMENT = ["entailment", "not_entailment"]
# task -> columns on the hub, classes in words (None: a number); in the own layout: header and the places of columns
TASKS = {
    "cola": (("sentence", "label"), ["0", "1"]),
    "sst2": (("sentence", "label"), ["0", "1"]),
    "mrpc": (("sentence1", "sentence2", "label"), ["0", "1"]),
    "stsb": (("sentence1", "sentence2", "label"), None),
    "qqp": (("question1", "question2", "label"), ["0", "1"]),
    "mnli": (("premise", "hypothesis", "label"), ["entailment", "neutral", "contradiction"]),
    "qnli": (("question", "sentence", "label"), ENTAILMENT),
    "rte": (("sentence1", "sentence2", "label"), ENTAILMENT),
}
HEADERS = {
    "cola": (None, (3, 1)),
    "sst2": ("sentence label", (0, 1)),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", (3, 4, 0)),
    "stsb": ("index genre filename year old_index source1 source2 sentence1 sentence2 score", (7, 8, 9)),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", (3, 4, 5)),
    "mnli": ("index promptID pairID genre b1 b2 p1 p2 sentence1 sentence2 label1 gold_label", (8, 9, 11)),
    "qnli": ("index question sentence label", (1, 2, 3)),
    "rte": ("index sentence1 sentence2 label", (1, 2, 3)),
}
SAMPLES = {"train": 24, "validation": 13}  # an odd number, for two devices


def rows(task: str, split: str) -> list[tuple]:
    """Texts and a label (the number of a class, or a score) a row; the same for both layouts."""
    columns, classes = TASKS[task]
    rng = np.random.default_rng([list(TASKS).index(task), len(split)])
    found = []
    for row in range(SAMPLES["train" if split == "train" else "validation"]):
        label = round(float(rng.uniform(0, 5)), 2) if classes is None else row % len(classes)
        texts = [" ".join(rng.choice(PLAIN, rng.integers(2, 12))) for _ in columns[:-1]]
        found.append((*texts, label))
    return found


def splits(task: str) -> tuple[str, ...]:
    return ("train", "validation_matched", "validation_mismatched") if task == "mnli" else ("train", "validation")


def write_hub(folder: Path, task: str) -> Path:
    """As the hub has it: one parquet file a split; a test split without labels beside them."""
    import datasets

    columns, classes = TASKS[task]
    label = datasets.Value("float32") if classes is None else datasets.ClassLabel(names=classes)
    features = datasets.Features({**dict.fromkeys(columns[:-1], datasets.Value("string")), "label": label, "idx": datasets.Value("int32")})
    folder.mkdir(parents=True)
    for split in (*splits(task), "test"):
        table = [(*row, number) for number, row in enumerate(rows(task, split))]
        if split == "test":
            table = [(*row[:-2], -1, row[-1]) for row in table]
        named = dict(zip((*columns, "idx"), map(list, zip(*table, strict=True)), strict=True))
        datasets.Dataset.from_dict(named, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def write_original(folder: Path, task: str) -> Path:
    """As GLUE's own download has it: tab-separated files, quotes being text, and some fields empty in QQP."""
    header, places = HEADERS[task]
    _, classes = TASKS[task]
    folder.mkdir(parents=True)
    names = header.split("|" if "|" in header else " ") if header else ["a", "b", "c", "d"]
    for split in splits(task):
        lines = ["\t".join(names)] if header else []
        for row in rows(task, split):
            fields = [f'"{name}' for name in names]
            for place, value in zip(places, row, strict=True):
                fields[place] = str(value)
            if classes is not None:
                fields[places[-1]] = classes[row[-1]]
            lines.append("\t".join(fields))
        if task == "qqp":
            lines.insert(2, "1\t2\t3\tthe cat")
        (folder / f"{split.replace('validation', 'dev')}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return folder
