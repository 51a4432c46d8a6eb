"""A stage that runs out of GPU memory continues with half of the images per batch."""

import pytest
import torch

from tafs.common import errors
from tafs.runtime import memory
from tafs.runtime.run_dir import RunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path)


def exhausted(run: RunDir, batch: int) -> str:
    """Run a stage out of memory; return the message."""
    with pytest.raises(errors.ToBeContinued) as caught, memory.fitting(run, "train", batch):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    return str(caught.value)


def used(run: RunDir, batch: int, stage: str = "train") -> int:
    """The batch size that a stage is given which then fails for another reason."""
    with pytest.raises(errors.RunFailed), memory.fitting(run, stage, batch) as size:
        raise errors.RunFailed("other")
    return size


def test_half_of_the_images_are_tried_next(run):
    assert exhausted(run, 12) == (
        "out of GPU memory with 12 images per batch, to be continued with 6 (CUDA out of memory.)"
    )
    assert used(run, 12) == 6
    exhausted(run, 12)
    assert used(run, 12) == 3
    assert used(run, 2) == 2  # config.yaml asks for fewer
    assert used(run, 12, "evaluate") == 12


def test_a_single_image_is_the_end(run):
    exhausted(run, 3)
    with pytest.raises(torch.OutOfMemoryError), memory.fitting(run, "train", 3):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_finished_stage_starts_anew(run):
    exhausted(run, 12)
    with memory.fitting(run, "train", 12) as size:
        assert size == 6
    assert used(run, 12) == 12
