"""What finished work was made from, and the files that it wrote: FOLDER/receipts/STAGE.json.

The workflow decides by receipts what is done. They travel with the files, so a copied or moved
folder, another clone, another machine or a restored archive needs no work again, whatever the
times of its files are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tafs.common import files

# What an outcome depends on, by dotted names: settings, and digests of weights and files.
Needs = Mapping[str, JsonValue]

SHOWN = 12  # characters of a digest in a message
LIMIT = 60  # characters of any other value


class WrittenFile(BaseModel):
    """A file as it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Receipt(BaseModel):
    """The record of a finished stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    needs: dict[str, JsonValue]
    files: dict[str, WrittenFile]  # by path in the folder

    def missing(self, folder: Path) -> list[str]:
        """The files that are missing or have another size."""
        return [name for name, file in self.files.items() if _size(folder / name) != file.bytes]


def path(folder: Path, stage: str) -> Path:
    return folder / "receipts" / f"{stage}.json"


def read(folder: Path, stage: str) -> Receipt | None:
    """The receipt of a stage; None if there is none, or not a whole one.

    Raises:
        OSError: it cannot be read; names it.
    """
    file = path(folder, stage)
    try:
        files.check_readable(file)
        return Receipt.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


@contextmanager
def replacing(folder: Path, stage: str, needs: Needs, written: Sequence[Path]) -> Iterator[None]:
    """Replace a stage's files and then its receipt.

    The old receipt is removed first, so that a receipt always describes the files beside it.

    Args:
        folder: of the run or of the scale.
        written: the files in `folder` that the block writes; the block may add to a list.

    Raises:
        OSError: a file was not written, or the receipt cannot be.
    """
    file = path(folder, stage)
    file.unlink(missing_ok=True)
    yield
    names = {one.relative_to(folder).as_posix(): one for one in written}
    record = Receipt(
        needs=dict(needs),
        files={
            name: WrittenFile(bytes=one.stat().st_size, sha256=files.sha256(one))
            for name, one in sorted(names.items())
        },
    )
    files.atomic_text(file, record.model_dump_json(indent=1) + "\n")


def fingerprint(needs: Needs) -> str:
    """SHA-256 over all needs: the identity of an outcome."""
    return hashlib.sha256(json.dumps(dict(needs), sort_keys=True).encode()).hexdigest()


def differences(old: Needs, new: Needs) -> list[str]:
    """Every key whose value differs, with both values: "seed: 1 -> 2"."""
    return [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in sorted({*old, *new})
        if key not in old or key not in new or old[key] != new[key]
    ]


def _shown(needs: Needs, key: str) -> str:
    if key not in needs:
        return "none"
    value = needs[key]
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:SHOWN]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LIMIT else f"{text[: LIMIT - 3]}..."


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
