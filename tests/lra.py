"""Long Range Arena's own download in small: a few samples in each of its folders, written by hand from its description."""

from pathlib import Path

import numpy as np
from PIL import Image

LISTOPS = [("( ( ( ( [MAX 4 ) ( ( ( [MED 2 ) 7 ) ] ) ) ) 1 ) ] )", 4), ("( ( ( [SM 9 ) 8 ) ] )", 7), ("( ( ( [MIN 0 ) 5 ) ] )", 0)]


def write_listops(folder: Path, samples: int = 8) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        rows = [LISTOPS[row % len(LISTOPS)] for row in range(samples)]
        (folder / f"basic_{split}.tsv").write_text("".join(f"{a}\t{b}\r\n" for a, b in [("Source", "Target"), *rows]), newline="")
    return folder


def pairs(samples: int, seed: int = 0) -> list[tuple[float, str, str]]:
    """(label, text, text): 1 where both texts are of one letter; of many lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(samples):
        first, second = "ab"[row // 2 % 2], "ab"[(row // 2 + row) % 2]
        found.append((1 - row % 2, first * int(rng.integers(3, 40)), second * int(rng.integers(3, 40))))
    return found


def write_aan(folder: Path, samples: int = 8) -> Path:
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "eval", "test")):
        rows = [f'{float(label)}\tP{row}\tQ{row}\t"{a}\t{b} é' for row, (label, a, b) in enumerate(pairs(samples, number))]
        (folder / f"new_aan_pairs.{split}.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


def write_pathfinder(folder: Path, samples: int = 40, size: int = 32) -> Path:
    """pathfinder32/curv_contour_length_14, its images in two folders, with one empty file; an image's grey value tells its number."""
    inner = folder / "curv_contour_length_14"
    (inner / "metadata").mkdir(parents=True)
    for part in range(2):
        (inner / "imgs" / str(part)).mkdir(parents=True)
        lines = []
        for row in range(samples // 2):
            number = part * samples // 2 + row
            path = inner / "imgs" / str(part) / f"sample_{row}.png"
            Image.fromarray(np.full((size, size), number, np.uint8)).save(path)
            lines.append(f"imgs/{part} sample_{row}.png {row} {number % 2} 1 2 3.5\n")
        if part:
            (inner / "imgs" / "1" / "sample_99.png").touch()
            lines.append("imgs/1 sample_99.png 99 1 1 2 3.5\n")
        (inner / "metadata" / f"{part}.npy").write_text("".join(lines))
    return folder
