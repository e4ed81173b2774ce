"""A small corpus and its vocabulary, written to a folder."""

from pathlib import Path

import numpy as np

WORDS = ["the", "a", "cat", "dog", "##s", "sleep", "run", "under", "over", "red", "green", "house", "tree", "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_corpus(folder: Path, *, texts=200, words=20, splits=("train", "validation"), column="text") -> list[str]:
    """Overrides of a run that reads it."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    rng = np.random.default_rng(0)
    plain = [word for word in WORDS if not word.startswith("##")]
    for split in splits:
        # a word is followed by the next one in the list, nine times of ten
        rows = []
        for _ in range(texts if split == "train" else texts // 4):
            row = [int(rng.integers(len(plain)))]
            while len(row) < words:
                row.append((row[-1] + 1) % len(plain) if rng.random() < 0.9 else int(rng.integers(len(plain))))
            rows.append(" ".join(plain[i] for i in row))
        datasets.Dataset.from_dict({column: rows}).to_parquet(str(folder / f"{split}.parquet"))
    return [f"data.source={folder}", f"data.vocabulary={folder.parent / 'vocab.txt'}"]
