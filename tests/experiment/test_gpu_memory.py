"""The memory of trainings, and what a scale leaves to the memory of its GPUs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tafs import experiment
from tafs.common.yaml_files import ConfigError
from tafs.experiment import gpu_memory
from tafs.experiment.gpu_memory import TrainingMemory
from tafs.experiment.specs import RunSpec
from tafs.models import memory_model

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config.yaml"
TAFS = "tafs_grpo.preference.flux-dev.0"
AUTOMATIC = """    gradient_checkpointing: auto
    micro_batch: auto
"""


def planned(
    gigabytes: float | None, scale: str = "one-gpu", path: Path = SHIPPED
) -> Mapping[str, RunSpec]:
    return experiment.load({"scale": scale}, path, gigabytes).runs


@pytest.fixture(scope="module")
def paper() -> Mapping[str, RunSpec]:
    return planned(80, "paper")


def memory(spec: RunSpec, processes: int = 8) -> TrainingMemory:
    found = gpu_memory.of_run(spec, processes)
    assert found is not None
    return found


def test_the_memory_of_a_training_follows_its_run_and_the_sizes_of_its_downloads(paper):
    """PickScore 3.9, its tokenizer 0.01 and CLIP 1.7 GB; 33.7 GB are FLUX.1-dev with encoders."""
    found = memory(paper[TAFS])
    setting = found.setting
    assert (setting.micro_batch, setting.images, setting.trained_steps) == (6, 144, 3)
    assert (found.most, setting.kept_images, setting.reward_activations) == (48, 0, None)
    assert setting.rewards == pytest.approx(5.61e9)
    composition = memory(paper["tafs_grpo.composition.flux-dev.0"])
    # Beside them GenEval's detector, with a CLIP of its own, and HPSv2.1: twice its file.
    more = 0.3e9 + 1.7e9 + 2 * 1.972e9
    assert composition.setting.rewards == pytest.approx(5.61e9 + more, rel=1e-3)
    parameters = 11_901_408_320 + 83_819_683
    assert setting.text_encoders == pytest.approx(33.7e9 - 2 * parameters)
    training = paper[TAFS].training.model_copy(update={"keep_graphs": True})
    kept = memory(paper[TAFS].model_copy(update={"training": training}))
    assert kept.setting.kept_images == 48
    assert memory(paper["reward_instruct.preference.flux-dev.0"]).largest()[0] == "reward gradients"
    assert gpu_memory.of_run(paper["base.pickapic.flux-dev"], 8) is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_largest_micro_batch_fits_and_the_next_one_does_not(paper, checkpointing):
    found = memory(paper[TAFS])
    batch = found.fitting(60e9, checkpointing=checkpointing)
    peaks = []
    for number in (batch, batch + 1):
        changes = {"micro_batch": number, "gradient_checkpointing": checkpointing}
        setting = replace(found.setting, **changes)
        peaks.append(replace(found, setting=setting).largest()[1])
    assert 0 < peaks[0] <= 60e9 < peaks[1]
    assert found.fitting(1e9, checkpointing=checkpointing) == 0
    assert found.fitting(1e15, checkpointing=checkpointing) == found.most


def test_a_chosen_micro_batch_divides_an_update_and_one_that_is_given_stays(paper):
    found = memory(paper[TAFS])
    assert found.most == 48
    for gigabytes in range(40, 150, 5):
        available = gpu_memory.usable(gigabytes)
        checkpointing, batch = found.chosen(available, "none")
        fitting = found.fitting(available, checkpointing=checkpointing)
        assert 48 % batch == 0 and fitting / 2 < batch <= fitting
        # Without checkpointing an update is faster, if it gets as many images.
        assert checkpointing == (found.fitting(available, checkpointing=False) < 4)
    assert found.chosen(gpu_memory.usable(80), "none", True)[0]
    assert found.chosen(gpu_memory.usable(80), "none", None, 6) == (False, 6)
    assert found.chosen(gpu_memory.usable(80), "none", None, 8) == (True, 8)
    assert found.chosen(gpu_memory.usable(80), "none", False, 8) == (False, 0)


@pytest.mark.parametrize("gigabytes", [24, 32, 48, 80, 141])
def test_every_training_fits_with_the_values_that_follow_from_the_memory(gigabytes):
    runs = planned(gigabytes)
    trainings = {name: memory(spec, 1) for name, spec in runs.items() if spec.trained}
    assert len(trainings) == 8
    available = gpu_memory.usable(gigabytes)
    for name, found in trainings.items():
        assets = runs[name].assets
        fitting = found.fitting(available, checkpointing=assets.gradient_checkpointing)
        assert 1 <= found.setting.micro_batch <= fitting
    if gigabytes >= 80:
        assert not any(spec.assets.gradient_checkpointing for spec in runs.values() if spec.trained)


def test_weights_are_quantised_where_whole_ones_do_not_fit_and_as_little_as_possible():
    known = [memory(spec, 1) for spec in planned(80).values() if spec.trained]
    formats = [gpu_memory.least_quantized(known, gpu_memory.usable(gb)) for gb in range(1, 49)]
    order = {None: 0, "nf4": 1, "int8": 2, "none": 3}
    ranks = [order[chosen] for chosen in formats]
    assert ranks == sorted(ranks) and {*ranks} == {0, 1, 2, 3}


def test_the_memory_decides_no_outcome():
    small, large = planned(48), planned(80)
    assert any(small[name].batch != spec.batch for name, spec in large.items())
    assert {name: spec.decisive() for name, spec in small.items()} == {
        name: spec.decisive() for name, spec in large.items()
    }


@pytest.fixture
def automatic(tmp_path):
    """Writes the shipped configuration with other lines of one-gpu in place of AUTOMATIC."""

    def write(lines: str) -> Path:
        head, name, tail = SHIPPED.read_text(encoding="utf-8").partition("  one-gpu:\n")
        assert tail.count(AUTOMATIC) == 1
        path = tmp_path / "config.yaml"
        path.write_text(head + name + tail.replace(AUTOMATIC, lines), encoding="utf-8")
        shutil.copy(ROOT / "claims.yaml", tmp_path)
        return path

    return write


def test_values_that_are_given_stay_and_the_others_follow(automatic):
    runs = planned(48, path=automatic("    gradient_checkpointing: auto\n    micro_batch: 3\n"))
    assert {spec.batch for spec in runs.values() if spec.trained} == {3}
    runs = planned(80, path=automatic("    gradient_checkpointing: true\n    micro_batch: auto\n"))
    assert {spec.assets.gradient_checkpointing for spec in runs.values()} == {True}
    assert min(spec.batch for spec in runs.values() if spec.trained) > 12
    runs = planned(6, path=automatic("    gradient_checkpointing: true\n    micro_batch: 4\n"))
    assert {spec.batch for spec in runs.values() if spec.trained} == {4}


def refusal(gigabytes, path=SHIPPED):
    with pytest.raises(ConfigError) as caught:
        planned(gigabytes, path=path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("gigabytes", "lines", "number", "remedy"),
    [
        (6, AUTOMATIC, 1, "use a larger GPU, or leave their tables out of `experiments`"),
        (18, AUTOMATIC, 1, "set quantize: int8"),
        (18, f"    quantize: int8\n{AUTOMATIC}", None, None),
        (
            24,
            "    gradient_checkpointing: false\n    micro_batch: 12\n".replace("false", "auto"),
            12,
            "set micro_batch to auto",
        ),
        (
            24,
            "    gradient_checkpointing: false\n    micro_batch: auto\n",
            1,
            "set gradient_checkpointing to auto",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_with_a_remedy_that_helps(
    automatic, gigabytes, lines, number, remedy
):
    path = automatic(lines)
    if remedy is None:
        assert planned(gigabytes, path=path)
        return
    start, _, said = refusal(gigabytes, path).partition("; ")
    assert said == remedy
    assert start.startswith(
        f"config.yaml: scales.one-gpu.gpu_memory: {gigabytes} GB do not hold a micro-batch of "
        f"{number} in "
    )
    assert re.search(r"[.]0( and in \d more)?$", start)


def test_automatic_values_need_the_memory_of_a_gpu_and_a_model_whose_memory_is_known(
    automatic, monkeypatch
):
    path = automatic(AUTOMATIC)
    head, name, tail = path.read_text(encoding="utf-8").partition("  one-gpu:\n")
    [line] = [line for line in tail.splitlines() if line.startswith("    gpu_memory:")]
    path.write_text(head + name + tail.replace(f"{line}\n", "", 1), encoding="utf-8")
    assert refusal(None, path).endswith(
        "scales.one-gpu.gpu_memory: is missing; gradient_checkpointing: auto needs it, the GB of "
        "a GPU"
    )
    blocks = {k: v for k, v in memory_model.BLOCKS.items() if k != "Flux2KleinPipeline"}
    monkeypatch.setattr(memory_model, "BLOCKS", blocks)
    assert refusal(80) == (
        "config.yaml: scales.one-gpu.gradient_checkpointing: 'auto' needs a model of the memory of "
        "'flux2-klein-base-4b', which there is not; give a value"
    )


@pytest.mark.parametrize("key", ["gradient_checkpointing", "micro_batch"])
def test_a_wrong_value_is_told_from_auto(automatic, key):
    lines = AUTOMATIC.replace(f"{key}: auto", f"{key}: automatic")
    assert f"scales.one-gpu.{key}: input should be" in refusal(80, automatic(lines))
