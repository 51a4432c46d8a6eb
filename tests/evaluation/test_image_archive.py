"""Archives of images: they are read as they were written, and equal images give equal bytes."""

import errno
import zipfile

import pytest
import torch

from tafs.evaluation import image_archive

KEYS = [image_archive.Key(3, "ode", 4, prompt, 0) for prompt in range(5)]


def pictures() -> torch.Tensor:
    return torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255


def write(file) -> bytes:
    with image_archive.writing(file) as archive:
        for key, pixels in zip(KEYS, image_archive.pixels(pictures()), strict=True):
            archive.add(key, image_archive.encode(pixels))
    return file.read_bytes()


def test_images_are_read_in_batches_in_their_order_and_equal_images_are_equal_archives(tmp_path):
    assert write(tmp_path / "images.zip") == write(tmp_path / "b.zip")
    parts = list(image_archive.read(tmp_path / "images.zip", 2))
    assert [key for keys, _ in parts for key in keys] == KEYS
    assert [len(keys) for keys, _ in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([part for _, part in parts]), pictures())


def test_a_failure_leaves_no_archive_and_removes_what_a_kill_left(tmp_path):
    left = tmp_path / ".tmp-1-images.zip"
    left.write_bytes(b"half")
    with pytest.raises(RuntimeError), image_archive.writing(tmp_path / "images.zip"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_wrong_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="images.zip: not found"):
        next(image_archive.read(tmp_path / "images.zip", 2))
    (tmp_path / "images.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match="images.zip: not an archive of images"):
        next(image_archive.read(tmp_path / "images.zip", 2))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(KEYS[0].member, b"not a PNG")
    with pytest.raises(ValueError, match="images.zip: not an archive of images"):
        next(image_archive.read(tmp_path / "images.zip", 2))


def test_an_unreadable_disk_is_not_a_wrong_archive(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    write(tmp_path / "images.zip")
    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        next(image_archive.read(tmp_path / "images.zip", 2))
