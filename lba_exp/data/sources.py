"""What a ``source`` names: the embedded digits, a local folder, or a data set on the hub. Needs neither torch nor datasets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lba_exp.errors import DataError

EMBEDDED = "digits"
TOKENIZER = "tokenizer.json"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """``kind`` is "embedded", "folder" (then ``path`` is set) or "hub" (then ``repository`` and perhaps ``config``)."""

    kind: str
    name: str
    path: Path | None = None
    repository: str | None = None
    config: str | None = None


def resolve_source(source: str) -> Source:
    """What ``source`` names: "digits"; else a folder where one exists, or where it can only be a path; else a hub name ("org/name:config").

    Raises:
        DataError: no such folder, a file instead of a folder, or a word that can be neither a path nor a hub name.
    """
    if source == EMBEDDED:
        return Source("embedded", EMBEDDED)
    path = Path(source).expanduser()
    if source and path.is_dir():
        return Source("folder", path.resolve().name, path=path.resolve())
    if source and path.exists():
        raise DataError(f"the data source {source} is a file: give the folder that holds it ({path.parent}).")
    # org/name may be either: with a folder `org` here, a path was meant
    is_path = source.startswith((".", "~", "/")) or source.count("/") > 1 or ("/" in source and path.parent.is_dir())
    if is_path:
        raise DataError(_missing(source, path))
    if not HUB_NAME.fullmatch(source):
        valid = f"{EMBEDDED}, a local folder, or a hub name such as org/name or org/name:config"
        raise DataError(f"data.source: {source!r} names no data: give {valid}.")
    if "/" not in source and (near := nearest_embedded(source)):
        raise DataError(f"data.source: {source!r} is neither embedded nor a folder here.{near} A data set of the hub is org/name.")
    repository, _, config = source.partition(":")
    return Source("hub", repository.split("/")[-1], repository=repository, config=config or None)


def vocabulary_file(vocabulary: str | None) -> Path:
    """The file of a vocabulary: the one named, or vocab.txt or tokenizer.json in the folder named; raises DataError where there is none."""
    path = Path(vocabulary).expanduser() if vocabulary else None
    if path is not None and path.is_dir():
        path = next((file for file in (path / "vocab.txt", path / TOKENIZER) if file.is_file()), path / "vocab.txt")
    if path is None or not path.is_file():
        raise DataError(
            f"data.vocabulary={path} is no file: give a WordPiece vocabulary, one token a line, or a {TOKENIZER}, or the folder of one "
            "(vocab.txt); data.vocabulary_size=8000 trains one on a corpus, data.tokens=bytes needs none."
        )
    return path


def check_source(source: str) -> None:
    """Raises DataError for what can be seen without reading data: a folder that does not exist, a word that names nothing."""
    resolve_source(source)


def nearest_embedded(source: str) -> str:
    """A hint (" Did you mean digits?") where a hub name looks like a misspelt embedded data set; else empty."""
    return f" Did you mean {EMBEDDED}?" if get_close_matches(source.lower(), [EMBEDDED], cutoff=0.7) else ""


def _missing(source: str, path: Path) -> str:
    while not path.parent.is_dir():
        path = path.parent
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    lowered = {name.lower(): name for name in siblings}
    near = get_close_matches(path.name.lower(), lowered, n=1, cutoff=0.6)
    hint = f"; did you mean {path.parent / lowered[near[0]]}?" if near else f"; there is no {path.name} in {path.parent.resolve()}."
    return f"the data folder {source} does not exist{hint}"
