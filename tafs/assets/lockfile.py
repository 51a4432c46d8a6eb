"""lockfile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeVar

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

from tafs.common import yaml_files
from tafs.common.files import _appearing_whole

RESOURCES = Path("resources.yaml")


LOCK = Path("resources.lock.yaml")


LONGEST = 1 << 20  # bytes of either file


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
    raw = yaml_files.load_yaml(file, dict, LONGEST)
    try:
        return kind.validate_python(raw)
    except ValidationError as error:
        raise yaml_files.ConfigError(f"{file}: {yaml_files.first_problem(error, keys)}") from None


def _write_lock(file: Path, entries: Mapping[str, Locked]) -> None:
    content = {
        name: entry.model_dump(exclude_none=True, mode="json") for name, entry in entries.items()
    }
    text = "# Written by `python -m tafs.assets.download lock` from resources.yaml.\n"
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
    return f"`python -m tafs.assets.download {verb} {name}{option}`"
