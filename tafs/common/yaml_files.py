"""Reading YAML files, with errors in one line that name the file, the key and the remedy."""

from __future__ import annotations

import copy
import difflib
import re
import typing
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tafs.common.errors import one_line, shown

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class ConfigError(ValueError):
    """A mistake in a configuration file, in one line of printable characters."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text, 600))


def load_yaml(path: Path, kind: type) -> Any:
    """The content of a YAML 1.2 file: a mapping (`dict`) or a list.

    Duplicate keys are refused, and 3e-4 is a number.

    Raises:
        ConfigError: the file cannot be read or is not YAML of this kind; names it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); put a file there") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    try:
        raw = copy.deepcopy(_parsed(text))
    except (YAMLError, ValueError, KeyError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        where = path if mark is None else f"{path}: line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if isinstance(error, DuplicateKeyError):
            key = problem.removeprefix('found duplicate key "').partition('"')[0]
            raise ConfigError(f"{where}: {key!r} is given twice; keep one of them") from None
        raise ConfigError(f"{where}: is not YAML ({problem}); correct it there") from None
    if not isinstance(raw, kind):
        wanted = "mapping of keys to values" if kind is dict else "list"
        raise ConfigError(f"{path}: does not hold a {wanted}; write one")
    return raw


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """Parse YAML; a process reads the same files several times, and parsing is slow."""
    return YAML(typ="safe", pure=True).load(text)


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake as `key.path: what is wrong (remedy)`.

    Args:
        model: the model that was validated; it says which keys there are.
    """
    problems = error.errors()
    # A misspelt key is both unknown and missing: what was written says more.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    # "[key]" marks a wrong key of a mapping, other names in brackets the kind of a value.
    parts = [str(part) for part in first["loc"] if not str(part).startswith("[")]
    path = ".".join(one_line(part, 80) for part in parts)
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}{suggestion(parts[-1], _known_keys(model, first['loc']))}"
    if first["type"] == "missing":
        return f"missing key {path!r}; add it"
    problem = one_line(first["msg"].removeprefix("Value error, "))
    if first.get("ctx", {}).get("pattern") == f"^{NAME.pattern}$":
        problem = "should be a name: a letter, then up to 63 of a-z, 0-9, '_' and '-'"
    return f"{path}: {problem[0].lower() + problem[1:]} (got {shown(first['input'])})"


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that are allowed beside the one at `location`, a path into `model`."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = _model_inside(field.annotation) or model
    return list(model.model_fields)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, or that the values of its mapping or sequence are."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_model_inside(argument) for argument in typing.get_args(annotation))
    return next((found for found in inside if found), None)


def suggestion(name: str, available: Sequence[str]) -> str:
    """What `name` was probably meant to be, to be put behind an error about it."""
    close = difflib.get_close_matches(name[:100], available, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = sorted(available)
    return f" (available: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
