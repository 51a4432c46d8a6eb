"""A stage that runs out of GPU memory continues with half of the images per batch."""

import pytest
import torch

from tafs.common import errors
from tafs.runtime import memory
from tafs.runtime.run_dir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def fitting(run: RunDir, batch: int, *, stage="train", alike="model", **settings):
    return memory.fitting(run, stage, batch, alike, settings)


def exhausted(run: RunDir, batch: int, **given) -> str:
    """Run a stage out of memory; return the message."""
    with (
        pytest.raises(errors.ToBeContinued) as caught,
        fitting(run, batch, **given),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    return str(caught.value)


def used(run: RunDir, batch: int, **given) -> int:
    """The batch size that a stage is given."""
    with fitting(run, batch, **given) as size:
        return size


def test_half_of_the_images_are_tried_next(run, capsys):
    assert exhausted(run, 12) == (
        "out of GPU memory with 12 images per batch, to be continued with 6 (CUDA out of memory.)"
    )
    assert capsys.readouterr().err == ""
    assert used(run, 12) == 6
    file = memory.kept(run, "train", "model")
    assert capsys.readouterr().err == (
        f"train {run.folder}: 6 images per batch in place of 12, which did not fit in the GPU's "
        f"memory; delete {file} to try again\n"
    )
    exhausted(run, 12)
    assert used(run, 12) == 3
    file.unlink()
    assert used(run, 12) == 12


def test_runs_that_are_alike_begin_with_what_fitted_and_others_do_not(run):
    exhausted(run, 12)
    other = RunDir(run.folder.with_name("other"))
    assert used(other, 12) == 6
    assert used(other, 12, alike="larger model") == 12
    assert used(other, 12, stage="evaluate") == 12


def test_a_batch_that_is_newly_asked_for_is_tried(run):
    exhausted(run, 12)
    assert [used(run, batch) for batch in (4, 24, 12)] == [4, 24, 6]


def test_other_settings_or_another_gpu_are_tried(run, monkeypatch):
    exhausted(run, 12, resolution=512)
    assert used(run, 12, resolution=512) == 6
    assert used(run, 12, resolution=256) == 12
    monkeypatch.setattr(memory, "_gpu", lambda: 80 * 10**9)
    assert used(run, 12, resolution=512) == 12


def test_the_least_of_runs_that_end_together_is_kept(run):
    with pytest.raises(errors.ToBeContinued, match="to be continued with 3 "), fitting(run, 12):
        exhausted(run, 12)
        exhausted(run, 12)
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert used(run, 12) == 3


def test_any_name_of_a_model_is_a_file(run):
    exhausted(run, 12, alike="/a/folder of pipelines/" + "x" * 300)
    assert used(run, 12, alike="/a/folder of pipelines/" + "x" * 300) == 6
    [file] = (run.folder.parent / ".memory").iterdir()
    assert file.parent == run.folder.parent / ".memory"


def test_a_single_image_is_the_end_and_the_next_attempt_starts_anew(run):
    exhausted(run, 3)
    assert used(run, 3) == 1
    with pytest.raises(torch.OutOfMemoryError), fitting(run, 3):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert used(run, 3) == 3
