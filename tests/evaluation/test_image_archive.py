"""Archives of images: they are read as they were written, and equal images give equal bytes."""

import errno
import zipfile

import pytest
import torch

from tafs.evaluation import image_archive

KEYS = [image_archive.Key(3, "ode", 4, prompt, 0) for prompt in range(5)]


def pictures() -> torch.Tensor:
    return torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture
def listed(tmp_path):
    """The list of two archives, of two and three images."""
    pixels = image_archive.pixels(pictures())
    archives = [tmp_path / "state" / "a.zip", tmp_path / "state" / "b.zip"]
    for file, part in zip(archives, (slice(2), slice(2, 5)), strict=True):
        with image_archive.writing(file) as archive:
            for key, image in zip(KEYS[part], pixels[part], strict=True):
                archive.add(key, image_archive.encode(image))
    image_archive.write_list(tmp_path / "images.json", archives)
    return tmp_path / "images.json"


@pytest.mark.parametrize("first", range(6))
def test_images_are_read_in_batches_across_archives_from_any_one_on(listed, first):
    parts = list(image_archive.read(listed, 2, first))
    assert [key for keys, _ in parts for key in keys] == KEYS[first:]
    assert [len(keys) for keys, _ in parts] == [len(KEYS[n : n + 2]) for n in range(first, 5, 2)]
    for (_, images), expected in zip(parts, pictures()[first:].split(2), strict=bool(parts)):
        torch.testing.assert_close(images, expected)
    assert image_archive.keys(listed) == KEYS


def test_equal_images_give_equal_archives(listed, tmp_path):
    with image_archive.writing(tmp_path / "c.zip") as archive:
        for key, image in zip(KEYS[:2], image_archive.pixels(pictures()), strict=False):
            archive.add(key, image_archive.encode(image))
    assert (tmp_path / "c.zip").read_bytes() == (tmp_path / "state" / "a.zip").read_bytes()


def test_a_failure_leaves_no_archive_and_removes_what_a_kill_left(tmp_path):
    left = tmp_path / ".tmp-1-0.zip"
    left.write_bytes(b"half")
    with pytest.raises(RuntimeError), image_archive.writing(tmp_path / "0.zip"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_wrong_file_is_named(listed, tmp_path):
    archive = tmp_path / "state" / "b.zip"
    with zipfile.ZipFile(archive, "w") as other:
        other.writestr(KEYS[0].member, b"not a PNG")
    for content in (archive.read_bytes(), b"x"):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"b.zip: not an archive of images .*images.json, and"):
            list(image_archive.read(listed, 2))
    archive.unlink()
    with pytest.raises(FileNotFoundError, match="b.zip: not found; delete images.json, and the"):
        list(image_archive.read(listed, 2))
    listed.write_text("1")
    with pytest.raises(ValueError, match="images.json: not a list of archives"):
        next(image_archive.read(listed, 2))
    listed.unlink()
    with pytest.raises(FileNotFoundError, match="images.json: not found"):
        next(image_archive.read(listed, 2))


def test_an_unreadable_disk_is_not_a_wrong_archive(listed, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        next(image_archive.read(listed, 2))
