"""A stage that runs out of GPU memory continues with half of the images per batch."""

import pytest
import torch

from tafs.common import errors
from tafs.runtime import memory
from tafs.runtime.run_dir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def exhausted(run: RunDir, batch: int, alike: str = "model") -> str:
    """Run a stage out of memory; return the message."""
    with (
        pytest.raises(errors.ToBeContinued) as caught,
        memory.fitting(run, "train", batch, alike),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    return str(caught.value)


def used(run: RunDir, batch: int, stage: str = "train", alike: str = "model") -> int:
    """The batch size that a stage is given."""
    with memory.fitting(run, stage, batch, alike) as size:
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


def test_any_name_of_a_model_is_a_file(run):
    exhausted(run, 12, alike="/a/folder of pipelines/" + "x" * 300)
    assert used(run, 12, alike="/a/folder of pipelines/" + "x" * 300) == 6
    [file] = (run.folder.parent / ".memory").iterdir()
    assert file.parent == run.folder.parent / ".memory"


def test_a_single_image_is_the_end(run):
    exhausted(run, 3)
    with pytest.raises(torch.OutOfMemoryError), memory.fitting(run, "train", 3, "model"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
