"""What the paper's scale downloads: pinned to revisions, verified by SHA-256, then used offline.

resources.yaml names the repositories. Two commands need the network, jobs do not:

    python -m tafs.resources lock [NAME...]     revisions and SHA-256 -> resources.lock.yaml
    python -m tafs.resources fetch [NAME...]    the locked files -> Hugging Face's cache, verified

Files of the hub lie in Hugging Face's own cache, those of GitHub in $HF_HOME/tafs/files; what was
verified is noted in $HF_HOME/tafs/verified. HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_ENDPOINT mean
what they mean to huggingface_hub. TAFS_GITHUB replaces github.com by a GitHub Enterprise Server,
which has its API at /api/v3 and its files at /raw.
"""

from __future__ import annotations

import argparse
import errno
import glob
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tafs import config, failures
from tafs.digest import sha256

RESOURCES = Path("resources.yaml")
LOCK = Path("resources.lock.yaml")
LONGEST = 1 << 20  # bytes of either file
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\\" in path:
        raise ValueError("is no path inside a repository")
    return path


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Repository = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
FilePath = Annotated[str, AfterValidator(_inside)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """A repository, OWNER/NAME, on the Hugging Face hub or on GitHub."""

    hub: Repository | None = None
    github: Repository | None = None
    type: Literal["model", "dataset"] = "model"  # on the hub

    @model_validator(mode="after")
    def _is_one(self) -> Source:
        if (self.hub is None) == (self.github is None):
            raise ValueError("needs either 'hub' or 'github'")
        return self


class Resource(Source):
    """An entry of resources.yaml."""

    files: Annotated[tuple[FilePath, ...], Field(min_length=1)]  # glob patterns; paths on GitHub
    licence: str
    gated: bool
    gigabytes: Annotated[float, Field(gt=0)]
    used_for: str

    @model_validator(mode="after")
    def _can_be_listed(self) -> Resource:
        if self.github is not None and any(set(file) & set("*?[") for file in self.files):
            raise ValueError("files on GitHub are plain paths, not patterns")
        return self


class LockedFile(_Strict):
    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Locked(Source):
    """An entry of resources.lock.yaml: a commit and the files of it that are used."""

    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    files: Annotated[dict[FilePath, LockedFile], Field(min_length=1)]
    weights: Literal["random"] | None = None  # results made with them are marked

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


Entry = TypeVar("Entry", bound=Source)
ALL_RESOURCES = TypeAdapter(dict[Name, Resource])
ALL_LOCKED = TypeAdapter(dict[Name, Locked])


# -- what jobs ask ---------------------------------------------------------------------------------


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


# -- the two files ---------------------------------------------------------------------------------


def read(file: Path = RESOURCES) -> dict[str, Resource]:
    """resources.yaml.

    Raises:
        ConfigError: one line that names the file, the key and the remedy.
    """
    return _read(file, ALL_RESOURCES, list(Resource.model_fields))


def read_lock(file: Path = LOCK) -> dict[str, Locked]:
    """resources.lock.yaml.

    Raises:
        ConfigError: as `read`.
        ValueError: there is none.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such lock file; run `make lock` where there is a network")
    return _read_lock(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_lock(file: Path, _: int) -> dict[str, Locked]:
    """Once for each state of the file: a plan asks for hundreds of entries."""
    return _read(file, ALL_LOCKED, list(Locked.model_fields))


def _read(file: Path, kind: TypeAdapter[dict[str, Entry]], keys: Sequence[str]) -> dict[str, Entry]:
    raw = config.load_yaml(file, dict, LONGEST)
    try:
        return kind.validate_python(raw)
    except ValidationError as error:
        raise config.ConfigError(f"{file}: {config.first_problem(error, keys)}") from None


def _write_lock(file: Path, entries: Mapping[str, Locked]) -> None:
    content = {
        name: entry.model_dump(exclude_none=True, mode="json") for name, entry in entries.items()
    }
    text = "# Written by `python -m tafs.resources lock` from resources.yaml.\n"
    if content:
        text += yaml.safe_dump(content, width=1000)
    with _appearing_whole(file) as temporary:
        temporary.write(text.encode())


def _entry(name: str, lock: Path) -> Locked:
    entries = read_lock(lock)
    if name not in entries:
        raise ValueError(f"{lock}: has no {name!r}; run {_command('lock', name, lock)}")
    return entries[name]


def _command(verb: str, name: str, lock: Path) -> str:
    option = "" if lock == LOCK else f" --lock {lock}"
    return f"`python -m tafs.resources {verb} {name}{option}`"


# -- where files lie -------------------------------------------------------------------------------


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


@contextmanager
def _appearing_whole(file: Path) -> Iterator[BinaryIO]:
    """A new file that is on the disk entirely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("w+b") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# -- locking ---------------------------------------------------------------------------------------


def resolve(resource: Resource, random_weights: bool = False) -> Locked:
    """The present commit of a resource's repository, with its files' sizes and SHA-256 (online).

    Raises:
        ValueError: a cached file is altered.
        RunFailed: the repository cannot be read, or a pattern matches none of its files.
    """
    with _in_one_line(resource):
        revision, files = (_resolve_hub if resource.hub else _resolve_github)(resource)
        return Locked(
            hub=resource.hub,
            github=resource.github,
            type=resource.type,
            revision=revision,
            files=files,
            weights="random" if random_weights else None,
        )


def _resolve_hub(resource: Resource) -> tuple[str, dict[str, LockedFile]]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.sha import git_hash

    repository = str(resource.hub)
    info: Any = HfApi().repo_info(repository, repo_type=resource.type, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen = {name: siblings[name] for name in _select(resource.files, sorted(siblings))}
    # The hub knows the SHA-256 of large files; of small ones only git's hash.
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
        content = file.read_bytes()
        if git_hash(content) != sibling.blob_id:
            raise ValueError(f"{file} is not the hub's; delete {file.resolve()} and lock again")
        digest = hashlib.sha256(content).hexdigest()
        files[name] = LockedFile(size=len(content), sha256=digest)
    return str(info.sha), files


def _select(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that a pattern matches, in their order."""
    chosen = set()
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise failures.RunFailed(
                f"no file matches {pattern!r}; correct `files` in {RESOURCES} (there are: "
                f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
            )
        chosen.update(matches)
    return [name for name in names if name in chosen]


def _resolve_github(resource: Resource) -> tuple[str, dict[str, LockedFile]]:
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

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
    """The addresses of the API and of files."""
    server = os.environ.get("TAFS_GITHUB", "").rstrip("/")
    if server:
        return f"{server}/api/v3", f"{server}/raw"
    return "https://api.github.com", "https://raw.githubusercontent.com"


# -- fetching --------------------------------------------------------------------------------------


def fetch(name: str, lock: Path = LOCK) -> Path:
    """Download and verify what is missing of a locked resource (online); the folder of its files.

    What an interrupted download completed is kept: within a file the client resumes, and a later
    call gets the files that are still missing.

    Raises:
        ValueError: it is not locked, or a file is altered; names it and the remedy.
        RunFailed: it cannot be downloaded, or does not fit on the disk.
    """
    locked = _entry(name, lock)
    folder, verified = _folder(locked), _verified(name, locked)
    missing = [file for file in locked.files if not (folder / file).exists()]
    if missing:
        _check_space(folder, sum(locked.files[file].size for file in missing))
        with _in_one_line(locked):
            _download(locked, missing, folder)
    for file, expected in locked.files.items():
        if _state(folder / file, expected) is None:
            remedy = _command("lock", name, lock)
            raise ValueError(f"{folder / file} is not in the repository; run {remedy}")
    states = _verify_changed(locked, verified, _command("fetch", name, lock))
    if locked.hub is not None:
        # Programs that open a repository by its name alone, offline, read the commit from here.
        main = folder.parents[1] / "refs" / "main"
        if not main.is_file() or main.read_text() != locked.revision:
            with _appearing_whole(main) as temporary:
                temporary.write(locked.revision.encode())
    _note(name, locked, verified, states)
    return folder


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


def _check_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    disk = os.statvfs(existing)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise failures.RunFailed(
            f"needs {_gigabytes(needed)}, but {existing} has only {_gigabytes(free)} free; "
            "make room or set HF_HOME to a folder on a larger disk"
        )


def _download(locked: Locked, files: Sequence[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

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
    from huggingface_hub.file_download import http_get

    _, files = _github()
    # A compressed answer could not be resumed.
    headers = {"Accept-Encoding": "identity"}
    with _appearing_whole(target) as temporary:
        url = f"{files}/{repository}/{revision}/{name}"
        http_get(url, temporary, headers=headers, expected_size=size)


# -- failures --------------------------------------------------------------------------------------


@contextmanager
def _in_one_line(source: Source) -> Iterator[None]:
    """Turn what huggingface_hub raises into a RunFailed that says what to do."""
    from huggingface_hub import errors

    # Its transport's errors and Xet's are no OSErrors.
    caught = (errors.HTTPError, errors.XetDownloadError, OSError, RuntimeError)
    try:
        yield
    except failures.RunFailed:
        raise
    except (ValidationError, json.JSONDecodeError) as error:
        text = f"{_page(source)}: the answer is not a hub's ({_one_line(error)})"
        raise failures.RunFailed(f"{text}; check the connection and its proxies") from None
    except caught as error:
        raise failures.RunFailed(_reason(error, _page(source))) from None


def _page(source: Source) -> str:
    from huggingface_hub import constants

    if source.hub is None:
        return f"{_github()[1]}/{source.github}"
    kind = "datasets/" if source.type == "dataset" else ""
    return f"{constants.ENDPOINT}/{kind}{source.hub}"


def _reason(error: BaseException, page: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{page}: HF_HUB_OFFLINE is set; unset it for this command"
    if isinstance(error, errors.GatedRepoError):
        return f"{page} is gated: set HF_TOKEN after accepting the licence there"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{page}: not found, or private; correct it in {RESOURCES} or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page}: no longer has the locked revision; lock it again"
    if isinstance(error, errors.HfHubHTTPError):
        # What follows the path may be a signature.
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
            "HF_HOME to a folder on a larger disk, the same command continues"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = f"{type(error).__name__}: {_one_line(error)}"
    return f"{page}: {text}; check the connection and try again"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# -- the command -----------------------------------------------------------------------------------


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _each(names: Iterable[str], work: Callable[[str], str]) -> None:
    """Do the work for each name and print a line of it; exit with 1 if it fails for any."""
    failed = False
    for name in names:
        try:
            print(f"{name}: {work(name)}", flush=True)
        except (ValueError, OSError, failures.RunFailed) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = True
    if failed:
        sys.exit(1)


def _lock(names: Sequence[str], lock: Path, random_weights: bool, update: bool) -> None:
    resources = read()
    for name in names:
        if name not in resources:
            raise ValueError(f"{RESOURCES}: has no {name!r} (available: {', '.join(resources)})")
    earlier = read_lock(lock) if lock.is_file() else {}
    # What cannot be resolved today stays pinned as it was.
    kept = {name: entry for name, entry in earlier.items() if name in resources}

    def work(name: str) -> str:
        kept[name] = entry = resolve(resources[name], random_weights)
        _write_lock(lock, kept)
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
        print(f"{lock}: pins everything; --update pins what is there today")


def _fetch(names: Sequence[str], lock: Path) -> None:
    _each(names or sorted(read_lock(lock)), lambda name: f"verified in {fetch(name, lock)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tafs.resources", description="Pin and download the paper scale's models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    lock = verbs.add_parser("lock", help=f"pin what {RESOURCES} names")
    fetch = verbs.add_parser("fetch", help="download and verify what is pinned")
    for verb in (lock, fetch):
        verb.add_argument("names", nargs="*", metavar="NAME", help="default: all there is to do")
        verb.add_argument("--lock", type=Path, default=LOCK, help=f"default: {LOCK}")
    lock.add_argument(
        "--random-weights",
        action="store_true",
        help="mark the entries as randomly initialised, and so all results made with them",
    )
    lock.add_argument("--update", action="store_true", help="pin again what is pinned already")
    given = parser.parse_args()

    def work() -> None:
        if given.verb == "lock":
            _lock(given.names, given.lock, given.random_weights, given.update)
        else:
            _fetch(given.names, given.lock)

    try:
        failures.fail_in_one_line(f"resources {given.verb}", work)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
