"""Pin and download the paper scale's models, rewards and prompts.

resources.yaml names the repositories. These two commands need the network; jobs do not:

    python -m tafs.assets.download lock [NAME...]     pin revisions and SHA-256 in the lock file
    python -m tafs.assets.download fetch [NAME...]    download the pinned files and verify them

The variables HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_ENDPOINT of huggingface_hub apply. TAFS_GITHUB
is the URL of a GitHub Enterprise Server to use instead of github.com, with its API at /api/v3 and
its files at /raw. `tafs.assets.cache` describes where the files are.
"""

from __future__ import annotations

import argparse
import errno
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_session, snapshot_download
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import hf_raise_for_status
from huggingface_hub.utils.sha import git_hash
from pydantic import ValidationError

from tafs.assets import lockfile
from tafs.assets.cache import Cached
from tafs.assets.lockfile import LOCK, RESOURCES, Locked, LockedFile, Resource, Source
from tafs.common.errors import RunFailed, run_cli
from tafs.common.files import atomic, atomic_text, sha256

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def resolve(resource: Resource, random_weights: bool = False) -> Locked:
    """Pin a resource to the latest commit of its repository, with sizes and SHA-256 (online).

    Raises:
        ValueError: a cached file is altered.
        RunFailed: the repository cannot be read, or a pattern matches none of its files.
    """
    with _in_one_line(resource):
        revision, files = (_resolve_hub if resource.hub else _resolve_github)(resource)
        where = resource.model_dump(include={"hub", "github", "type"})
        marked: Any = "random" if random_weights else None
        return Locked(**where, revision=revision, files=files, weights=marked)


def _resolve_hub(resource: Resource) -> tuple[str, dict[str, LockedFile]]:
    repository = str(resource.hub)
    info: Any = HfApi().repo_info(repository, repo_type=resource.type, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen = {name: siblings[name] for name in _select(resource.files, sorted(siblings))}
    # The hub's API has the SHA-256 of large files and only git's hash of small ones.
    small = [name for name, sibling in chosen.items() if sibling.lfs is None]
    if small:
        folder = snapshot_download(
            repository,
            repo_type=resource.type,
            revision=info.sha,
            allow_patterns=[glob.escape(name) for name in small],
        )
    files = {}
    for name, sibling in chosen.items():
        if sibling.lfs is not None:
            files[name] = LockedFile(size=sibling.lfs.size, sha256=sibling.lfs.sha256)
            continue
        file = Path(folder, name)
        if git_hash(file.read_bytes()) != sibling.blob_id:
            raise ValueError(
                f"{file} differs from the hub's; delete {file.resolve()} and lock again"
            )
        files[name] = LockedFile(size=file.stat().st_size, sha256=sha256(file))
    return str(info.sha), files


def _select(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that match a pattern, in their order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RunFailed(
                f"no file matches {pattern!r}; correct `files` in {RESOURCES} (there are: "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
            )
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def _resolve_github(resource: Resource) -> tuple[str, dict[str, LockedFile]]:
    api, _ = _github()
    answer = get_session().get(
        f"{api}/repos/{resource.github}/commits/HEAD",
        headers={"Accept": "application/vnd.github.sha"},
    )
    hf_raise_for_status(answer)
    revision = answer.text.strip()
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in resource.files:
            file = Path(folder, name)
            _download_github(str(resource.github), revision, name, file)
            files[name] = LockedFile(size=file.stat().st_size, sha256=sha256(file))
    return revision, files


def _github() -> tuple[str, str]:
    """URLs of the API and of files."""
    server = os.environ.get("TAFS_GITHUB", "").rstrip("/")
    if server:
        return f"{server}/api/v3", f"{server}/raw"
    return "https://api.github.com", "https://raw.githubusercontent.com"


def fetch(name: str, lock: Path = LOCK) -> Path:
    """Download the missing files of a pinned resource and verify all of them (online).

    An interrupted download is continued by the next call, also within a file.

    Returns:
        The folder of the files.

    Raises:
        ValueError: the resource is not pinned, or a file is altered; names it and the remedy.
        RunFailed: it cannot be downloaded, or does not fit on the disk.
    """
    cached = Cached(name, lock)
    locked, folder = cached.locked, cached.folder
    missing = cached.missing()
    if missing:
        _check_space(folder, sum(locked.files[file].size for file in missing))
        with _in_one_line(locked):
            _download(locked, missing, folder)
    for file in cached.missing():
        remedy = lockfile.command("lock", name, lock)
        raise ValueError(f"{folder / file} is not in the repository; run {remedy}")
    states = cached.verify()
    if locked.hub is not None:
        # Programs that open a repository by name while offline read the commit from this file.
        main = folder.parents[1] / "refs" / "main"
        if not main.is_file() or main.read_text() != locked.revision:
            atomic_text(main, locked.revision, shared=True)
    cached.note(states)
    return folder


def _check_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunFailed(
            f"needs {_gigabytes(needed)}, but {existing} has only {_gigabytes(free)} free; "
            "make room or set HF_HOME to a folder on a larger disk"
        )


def _download(locked: Locked, files: Sequence[str], folder: Path) -> None:
    if locked.hub is None:
        for file in files:
            size = locked.files[file].size
            _download_github(str(locked.github), locked.revision, file, folder / file, size)
        return
    snapshot_download(
        locked.hub,
        repo_type=locked.type,
        revision=locked.revision,
        allow_patterns=[glob.escape(file) for file in files],
    )


def _download_github(
    repository: str, revision: str, name: str, target: Path, size: int | None = None
) -> None:
    _, files = _github()
    # A compressed response could not be resumed.
    headers = {"Accept-Encoding": "identity"}
    with atomic(target, shared=True) as path, path.open("wb") as temporary:
        url = f"{files}/{repository}/{revision}/{name}"
        http_get(url, temporary, headers=headers, expected_size=size)


@contextmanager
def _in_one_line(source: Source) -> Iterator[None]:
    """Convert errors of huggingface_hub to a RunFailed with a remedy."""
    # Errors of its transport and of Xet are not OSErrors.
    caught = (errors.HTTPError, errors.XetDownloadError, OSError, RuntimeError)
    try:
        yield
    except RunFailed:
        raise
    except (ValidationError, json.JSONDecodeError) as error:
        text = f"{_page(source)}: the answer is not that of a hub ({_one_line(error)})"
        raise RunFailed(f"{text}; check the connection and its proxies") from None
    except caught as error:
        raise RunFailed(_reason(error, _page(source))) from None


def _page(source: Source) -> str:
    if source.hub is None:
        return f"{_github()[1]}/{source.github}"
    kind = "datasets/" if source.type == "dataset" else ""
    return f"{constants.ENDPOINT}/{kind}{source.hub}"


def _reason(error: BaseException, page: str) -> str:
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{page}: HF_HUB_OFFLINE is set; unset it for this command"
    if isinstance(error, errors.GatedRepoError):
        return f"{page} is gated: set HF_TOKEN after accepting the licence there"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{page}: not found, or private; correct it in {RESOURCES} or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page}: the pinned revision no longer exists; lock it again"
    if isinstance(error, errors.HfHubHTTPError):
        # The query may contain a signature.
        url = str(error.response.url).partition("?")[0]
        status = error.response.status_code
        remedies = {
            401: "make a new HF_TOKEN at https://huggingface.co/settings/tokens",
            403: "the HF_TOKEN may not read it, or too many requests were made",
            404: f"correct it in {RESOURCES} or lock it again",
        }
        return f"{url}: HTTP status {status}; {remedies.get(status, 'try again later')}"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return (
            f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}; make room or set "
            "HF_HOME to a folder on a larger disk, then run the same command again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = f"{type(error).__name__}: {_one_line(error)}"
    return f"{page}: {text}; check the connection and try again"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _each(names: Iterable[str], work: Callable[[str], str]) -> None:
    """Do the work for each name and print its result; exit with 1 if any of them fails."""
    failed = False
    for name in names:
        try:
            print(f"{name}: {work(name)}", flush=True)
        except (ValueError, OSError, RunFailed) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = True
    if failed:
        sys.exit(1)


def _lock(names: Sequence[str], lock: Path, random_weights: bool, update: bool) -> None:
    resources = lockfile.read()
    for name in names:
        if name not in resources:
            raise ValueError(f"{RESOURCES}: has no {name!r} (available: {', '.join(resources)})")
    earlier = lockfile.read_lock(lock) if lock.is_file() else {}
    # Entries that cannot be resolved now stay pinned as before.
    kept = {name: entry for name, entry in earlier.items() if name in resources}

    def work(name: str) -> str:
        kept[name] = entry = resolve(resources[name], random_weights)
        lockfile.write(lock, kept)
        return f"{entry.revision}, {len(entry.files)} files, {_gigabytes(entry.size)}"

    def pinned(name: str) -> bool:
        entry, wanted = earlier.get(name), resources[name]
        return (
            entry is not None
            and (entry.hub, entry.github, entry.type) == (wanted.hub, wanted.github, wanted.type)
            and (entry.weights == "random") == random_weights
            and all(any(fnmatchcase(f, pattern) for f in entry.files) for pattern in wanted.files)
        )

    chosen = names or [name for name in sorted(resources) if update or not pinned(name)]
    _each(chosen, work)
    if not chosen:
        print(f"{lock}: everything is pinned; --update pins the latest revisions")


def _fetch(names: Sequence[str], lock: Path) -> None:
    _each(
        names or sorted(lockfile.read_lock(lock)), lambda name: f"verified in {fetch(name, lock)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tafs.assets.download",
        description="Pin and download the paper scale's models, rewards and prompts.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    lock = verbs.add_parser("lock", help=f"pin the entries of {RESOURCES}")
    fetch = verbs.add_parser("fetch", help="download and verify the pinned files")
    for verb in (lock, fetch):
        verb.add_argument(
            "names", nargs="*", metavar="NAME", help="default: all that are not done yet"
        )
        verb.add_argument("--lock", type=Path, default=LOCK, help=f"default: {LOCK}")
    lock.add_argument(
        "--random-weights",
        action="store_true",
        help="mark the entries, and all results made with them, as randomly initialised",
    )
    lock.add_argument(
        "--update", action="store_true", help="also pin entries again that are already pinned"
    )
    given = parser.parse_args()

    def work() -> None:
        if given.verb == "lock":
            _lock(given.names, given.lock, given.random_weights, given.update)
        else:
            _fetch(given.names, given.lock)

    try:
        run_cli(f"resources {given.verb}", work)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
