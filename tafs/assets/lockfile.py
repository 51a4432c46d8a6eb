"""resources.yaml, which names the published files, and the lock file, which pins them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML

from tafs.common import yaml_files
from tafs.common.files import atomic_text

RESOURCES = Path("resources.yaml")
LOCK = Path("resources.lock.yaml")


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\\" in path:
        raise ValueError("is not a path inside a repository")
    return path


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Repository = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
FilePath = Annotated[str, AfterValidator(_inside)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """A repository OWNER/NAME on the Hugging Face hub or on GitHub."""

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
    """Size and SHA-256 of a file."""

    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Locked(Source):
    """An entry of the lock file: a commit, and those of its files that are used."""

    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    files: Annotated[dict[FilePath, LockedFile], Field(min_length=1)]
    weights: Literal["random"] | None = None  # randomly initialised; marks the results

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files.values())


class _Resources(BaseModel):
    entries: dict[Name, Resource]


class _Locked(BaseModel):
    entries: dict[Name, Locked]


File = TypeVar("File", _Resources, _Locked)


def read(file: Path = RESOURCES) -> dict[str, Resource]:
    """Read resources.yaml; a ConfigError names the file, the key and the remedy."""
    return _read(file, _Resources).entries


def read_lock(file: Path = LOCK) -> dict[str, Locked]:
    """Read a lock file; a ConfigError or ValueError names the file, the key and the remedy."""
    if not file.is_file():
        raise ValueError(f"{file}: not found; run `make lock` on a machine with a network")
    return _read_lock(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read_lock(file: Path, _: int) -> dict[str, Locked]:
    """Read a lock file once per modification time: a plan reads hundreds of its entries."""
    return _read(file, _Locked).entries


def _read(file: Path, kind: type[File]) -> File:
    try:
        return kind(entries=yaml_files.load_yaml(file, dict))
    except ValidationError as error:
        problem = yaml_files.first_problem(error, kind).replace("entries.", "", 1)
        raise yaml_files.ConfigError(f"{file}: {problem}") from None


def write(file: Path, entries: Mapping[str, Locked]) -> None:
    """Write a lock file, sorted by name."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1000
    content = {
        name: entries[name].model_dump(exclude_none=True, mode="json") for name in sorted(entries)
    }
    text = io.StringIO()
    if content:
        yaml.dump(content, text)
    comment = "# Written by `python -m tafs.assets.download lock` from resources.yaml.\n"
    atomic_text(file, comment + text.getvalue())


def entry(name: str, lock: Path = LOCK) -> Locked:
    """A resource's entry in a lock file; a ValueError names the command that pins it."""
    entries = read_lock(lock)
    if name not in entries:
        raise ValueError(f"{lock}: {name!r} is not pinned; run {command('lock', name, lock)}")
    return entries[name]


def command(verb: str, name: str, lock: Path = LOCK) -> str:
    """The command that pins ("lock") or downloads ("fetch") a resource, for messages."""
    option = "" if lock == LOCK else f" --lock {lock}"
    return f"`python -m tafs.assets.download {verb} {name}{option}`"
