"""cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tafs.assets.lockfile import LOCK, Locked, LockedFile, _command, _entry
from tafs.common.files import _appearing_whole, sha256


def path(name: str, lock: Path = LOCK) -> Path:
    """The folder with a resource's verified files; never touches the network.

    Files whose size and times are those of their verification are taken as unaltered, all others
    are hashed again: what a program has written is noticed, also where it has set the time back.

    Raises:
        ValueError: it is not locked, not fetched, or a file is missing or altered; one line with
            the remedy.
    """
    locked = _entry(name, lock)
    folder, verified = _folder(locked), _verified(name, locked)
    remedy = _command("fetch", name, lock)
    if not verified:
        raise ValueError(f"{name}: not fetched; run {remedy}")
    for file, expected in locked.files.items():
        if _state(folder / file, expected) is None:
            raise ValueError(f"{name}: {folder / file} is missing; run {remedy}")
    states = _verify_changed(locked, verified, remedy)
    # Where the cache cannot be written every job hashes what has changed.
    with suppress(OSError):
        _note(name, locked, verified, states)
    return folder


def digest(name: str, lock: Path = LOCK) -> str:
    """One SHA-256 for a resource, of its locked entry: repository, commit, files and mark.

    Raises:
        ValueError: it is not locked.
    """
    content = _entry(name, lock).model_dump(exclude_none=True, mode="json")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_random(name: str, lock: Path = LOCK) -> bool:
    """Whether the lock marks a resource as randomly initialised.

    Raises:
        ValueError: it is not locked.
    """
    return _entry(name, lock).weights == "random"


def _home() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "tafs"


def _folder(locked: Locked) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if locked.hub is None:
        return _home() / "files" / locked.revision
    repository = repo_folder_name(repo_id=locked.hub, repo_type=locked.type)
    return Path(constants.HF_HUB_CACHE) / repository / "snapshots" / locked.revision


def _verified_file(name: str, locked: Locked) -> Path:
    return _home() / "verified" / f"{name}.{locked.revision}.json"


def _verified(name: str, locked: Locked) -> dict[str, Any]:
    """What `_state` gave for each file when it was verified; empty if none was."""
    try:
        content = json.loads(_verified_file(name, locked).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _state(file: Path, expected: LockedFile) -> list[Any] | None:
    """What tells that a file is still the one that had this SHA-256; None if it is missing."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [expected.sha256, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _verify_changed(
    locked: Locked, verified: Mapping[str, Any], command: str
) -> dict[str, list[Any] | None]:
    """Hash the files that are not as they were when they were verified; the state of all."""
    folder, states = _folder(locked), {}
    for file, expected in locked.files.items():
        # Taken before the file is read: what changes meanwhile is hashed again.
        states[file] = _state(folder / file, expected)
        if states[file] != verified.get(file):
            _verify(folder / file, expected, command)
    return states


def _note(
    name: str, locked: Locked, verified: Mapping[str, Any], states: Mapping[str, Any]
) -> None:
    """Write down what was verified, where it is not what was known."""
    if states != verified:
        with _appearing_whole(_verified_file(name, locked)) as temporary:
            temporary.write(json.dumps(states, indent=1).encode())


def _verify(file: Path, expected: LockedFile, command: str) -> None:
    size = file.stat().st_size
    if size != expected.size:
        found = f"has {size} bytes instead of {expected.size}"
    else:
        digest = sha256(file)
        if digest == expected.sha256:
            return
        found = f"has SHA-256 {digest} instead of {expected.sha256}"
    # Hugging Face's snapshots are links: the damaged file itself is elsewhere.
    raise ValueError(f"{file} is altered: {found}; delete {file.resolve()} and run {command}")
