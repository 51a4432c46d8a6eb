"""The downloaded files of resources: where they are, and whether they are still unaltered."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from tafs.assets import lockfile
from tafs.assets.lockfile import LOCK, Locked, LockedFile
from tafs.common.files import atomic_text, sha256


class Cached:
    """The cached files of a locked resource, and the note about their last verification.

    Files of the hub are in Hugging Face's own cache, those of GitHub in $HF_HOME/tafs/files. The
    note in $HF_HOME/tafs/verified holds each file's state, its SHA-256, size and times.
    """

    def __init__(self, name: str, lock: Path = LOCK) -> None:
        self.name = name
        self.locked: Locked = lockfile.entry(name, lock)
        self._remedy = lockfile.command("fetch", name, lock)

    @property
    def folder(self) -> Path:
        if self.locked.hub is None:
            return home() / "files" / self.locked.revision
        repository = repo_folder_name(repo_id=self.locked.hub, repo_type=self.locked.type)
        return Path(constants.HF_HUB_CACHE) / repository / "snapshots" / self.locked.revision

    @cached_property
    def noted(self) -> dict[str, Any]:
        """The state of each file at its last verification; empty if there was none."""
        try:
            content = json.loads(self._note.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def _note(self) -> Path:
        return home() / "verified" / f"{self.name}.{self.locked.revision}.json"

    def missing(self) -> list[str]:
        """The files that are not in the folder."""
        return [file for file in self.locked.files if not (self.folder / file).exists()]

    def verify(self) -> dict[str, Any]:
        """Hash the files that are not in their noted state, and return the state of all files.

        Raises:
            ValueError: a file is altered; names it and the remedy.
        """
        states = {}
        for file, expected in self.locked.files.items():
            # Taken before the file is read, so that a change in the meantime is hashed again.
            states[file] = _state(self.folder / file, expected)
            if states[file] != self.noted.get(file):
                self._check(self.folder / file, expected)
        return states

    def note(self, states: dict[str, Any]) -> None:
        """Write down the verified states, if they have changed."""
        if states != self.noted:
            atomic_text(self._note, json.dumps(states, indent=1), shared=True)

    def _check(self, file: Path, expected: LockedFile) -> None:
        size = file.stat().st_size
        if size != expected.size:
            found = f"has {size} bytes instead of {expected.size}"
        else:
            digest = sha256(file)
            if digest == expected.sha256:
                return
            found = f"has SHA-256 {digest} instead of {expected.sha256}"
        # Snapshots of the hub are links; the file to delete is their target.
        raise ValueError(
            f"{file} is altered: {found}; delete {file.resolve()} and run {self._remedy}"
        )


def path(name: str, lock: Path = LOCK) -> Path:
    """The folder of a resource's verified files; never uses the network.

    Files with the size and times of their last verification count as unaltered; all others are
    hashed again, which also detects programs that restore the modification time.

    Raises:
        ValueError: the resource is not pinned or not fetched, or a file is missing or altered;
            names the remedy.
    """
    cached, remedy = Cached(name, lock), lockfile.command("fetch", name, lock)
    if not cached.noted:
        raise ValueError(f"{name}: not fetched; run {remedy}")
    for file in cached.missing():
        raise ValueError(f"{name}: {cached.folder / file} is missing; run {remedy}")
    states = cached.verify()
    with suppress(OSError):  # with a read-only cache, every job verifies changed files again
        cached.note(states)
    return cached.folder


def digest(name: str, lock: Path = LOCK) -> str:
    """SHA-256 of a resource's locked entry: repository, commit, files and random mark."""
    content = lockfile.entry(name, lock).model_dump(exclude_none=True, mode="json")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_random(name: str, lock: Path = LOCK) -> bool:
    """Whether the lock file marks a resource as randomly initialised."""
    return lockfile.entry(name, lock).weights == "random"


def home() -> Path:
    """The folder of what this project keeps in Hugging Face's."""
    return Path(constants.HF_HOME) / "tafs"


def _state(file: Path, expected: LockedFile) -> list[Any]:
    """What identifies a file's content without reading it."""
    found = file.stat()
    return [expected.sha256, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
