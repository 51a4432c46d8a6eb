"""Write the first version of a plug-in's file."""

from __future__ import annotations

import keyword
from pathlib import Path

from tafs.common import yaml_files
from tafs.common.errors import shown
from tafs.common.plugins import Group


def write(group: Group, name: str, folder: Path, text: str) -> Path:
    """Write NAME.py with this text into a folder and return the file.

    Raises:
        ValueError: the name is not a module name in lower case or is taken, or there is no folder.
        FileExistsError: the file exists.
    """
    if not yaml_files.NAME.fullmatch(name) or "-" in name:
        raise ValueError(
            f"{shown(name)} is not a valid name: use lower-case letters, digits and underscores"
        )
    if keyword.iskeyword(name) or keyword.iskeyword(name.capitalize()):
        raise ValueError(f"{name!r} is a Python keyword; choose another name")
    if name in group.names():
        raise ValueError(f"{name!r} is taken; choose another name")
    if not folder.is_dir():
        raise ValueError(f"{folder}/ does not exist; run this command in the project's folder")
    file = folder / f"{name}.py"
    with file.open("x", encoding="utf-8") as out:
        out.write(text)
    return file
