"""registry."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tafs.common.errors import shown
from tafs.methods.base import Method

STRICT = ConfigDict(strict=True, allow_inf_nan=False)


LARGEST = 10**6  # of a whole number: more steps or updates than anyone takes


def sources() -> dict[str, str]:
    """Name -> importable module of every method, without importing any.

    They come from tafs/, baselines/ and installed packages' entry points in the group
    `tafs.methods` (NAME = "package.module").

    Raises:
        ValueError: two files claim one name; names both.
    """
    import baselines

    found = {"tafs_grpo": "tafs.methods.tafs_grpo"}
    for info in pkgutil.iter_modules(baselines.__path__):
        found[info.name] = f"baselines.{info.name}"
    for point in installed():
        if found.setdefault(point.name, point.module) != point.module:
            raise ValueError(
                f"method {point.name!r} is defined twice: by {found[point.name]} and {point.module}"
            )
    return dict(sorted(found.items()))


@cache
def installed() -> tuple[EntryPoint, ...]:
    """The methods of other packages; a plan asks often, and each answer opens hundreds of files."""
    return tuple(entry_points(group="tafs.methods"))


def source_file(name: str) -> Path:
    """The file of a method; a change to it reruns that method's runs.

    Raises:
        ValueError: no such method; lists those there are.
    """
    spec = importlib.util.find_spec(_module(name))
    if spec is None or spec.origin is None:
        raise ValueError(f"method {name!r}: its source file was not found")
    return Path(spec.origin)


def method_class(name: str) -> type[Method]:
    """The dataclass METHOD of a method's file.

    Raises:
        ValueError: no such method, or its file is broken or defines no METHOD; names it.
    """
    path = _module(name)
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a method's file may raise
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source_file(name)}: cannot be imported ({problem})") from error
    found = getattr(module, "METHOD", None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"{source_file(name)}: defines no METHOD derived from tafs.methods.base.Method"
        )
    return found


def create(name: str, parameters: dict[str, Any]) -> Method:
    """The method with its hyperparameters.

    Raises:
        ValueError: an unknown hyperparameter, or a value of another type or out of range; names it.
    """
    found = method_class(name)
    known = {f.name for f in dataclasses.fields(found)}
    kinds = get_type_hints(found)
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(
                f"unknown hyperparameter {shown(key)} (available: {', '.join(sorted(known))})"
            )
        # Else `true` would count as 1, and a word be refused by whatever first compares it.
        try:
            TypeAdapter(kinds[key], config=STRICT).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            problem = f"{problem[0].lower()}{problem[1:]}"
            raise ValueError(f"{key}: {problem} (got {shown(value)})") from None
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{key}: {value} is too large; give at most {LARGEST}")
    return found(**parameters)


def _module(name: str) -> str:
    available = sources()
    if name not in available:
        raise ValueError(f"unknown method {name!r} (available: {', '.join(available)})")
    return available[name]
