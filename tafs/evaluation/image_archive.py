"""Generated images in a zip of PNG files, for rewards that score them in another process."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tafs.common import files


class Key(NamedTuple):
    """Identifies an image of a run."""

    iteration: int
    sampler: str
    nfe: int
    prompt: int
    image: int

    @property
    def member(self) -> str:
        """The image's name in the archive."""
        return "/".join(str(part) for part in self) + ".png"

    @classmethod
    def of(cls, member: str) -> Key:
        """The key of a name that `member` gave; ValueError for any other name."""
        iteration, sampler, nfe, prompt, image = member.removesuffix(".png").split("/")
        return cls(int(iteration), sampler, int(nfe), int(prompt), int(image))


def pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3] on the CPU."""
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().contiguous()


def encode(image: Tensor) -> bytes:
    """A PNG file of an image, uint8 [H, W, 3]."""
    encoded = io.BytesIO()
    Image.fromarray(image.numpy()).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


class Archive(zipfile.ZipFile):
    """An archive of images."""

    def add(self, key: Key, encoded: bytes) -> None:
        """Add an image, a PNG file."""
        # ZipInfo has a fixed date, so that equal images give equal archives.
        self.writestr(zipfile.ZipInfo(key.member), encoded)


@contextmanager
def writing(file: Path) -> Iterator[Archive]:
    """Open an archive for writing; `file` appears when the block ends without an error."""
    # Not compressed, because PNG is.
    with files.atomic(file) as path, Archive(path, "w", zipfile.ZIP_STORED) as archive:
        yield archive


def join(archives: Sequence[Path], file: Path) -> None:
    """Write one archive with the images of several, in their order."""
    with writing(file) as joined:
        for archive in archives:
            with zipfile.ZipFile(archive) as part:
                for member in part.infolist():
                    joined.writestr(member, part.read(member))


def read(file: Path, batch: int, first: int = 0) -> Iterator[tuple[list[Key], Tensor]]:
    """Read the images from number `first` on in batches, in the order in which they were written.

    Yields:
        (keys, images [b, 3, H, W] in [0, 1]).

    Raises:
        FileNotFoundError, ValueError: the file is missing or not an archive of images; names it.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: not found; `python -m tafs.evaluation.evaluate` writes it"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            for low in range(first, len(members), batch):
                part = members[low : low + batch]
                decoded = (Image.open(io.BytesIO(archive.read(member))) for member in part)
                stacked = np.stack([np.asarray(image.convert("RGB")) for image in decoded])
                tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255
                yield [Key.of(member) for member in part], tensor
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # from the disk; Pillow's have no errno
            raise
        raise ValueError(
            f"{file}: not an archive of images ({error}); delete it and evaluate the run again"
        ) from None


def keys(file: Path) -> list[Key]:
    """The keys of all images, in the order in which they were written."""
    with zipfile.ZipFile(file) as archive:
        return [Key.of(member) for member in archive.namelist()]
