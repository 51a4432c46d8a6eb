"""An evaluation that is cut short is continued, and ends as one that was not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.killable_training import Process, prepare, stage, trained
from support.project_copy import ROOT

from tafs.common import errors
from tafs.evaluation import evaluate, image_archive, scores
from tafs.experiment import evaluations, validate
from tafs.runtime import checkpoint, run_dir

BATCH = 2  # of the six images of a setting


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> run_dir.RunDir:
    """A trained run that is to be judged by three settings, and whose images are kept."""
    run = trained(prepare(tmp_path_factory.mktemp("ready") / "run", 2, "tafs_grpo"))
    plan = evaluations.evaluations(validate.read(ROOT / "config.yaml", {"scale": "smoke"}))
    how = next(h for name, h in plan.items() if name.startswith("tafs_grpo"))
    settings = [{**s, "iteration": s["iteration"] and 1} for s in how["settings"]]
    content = {**how, "settings": settings, "batch": BATCH, "server": True}
    (run.folder / "evaluation.json").write_text(json.dumps(content))
    return run


def outcome(run: run_dir.RunDir) -> list[bytes]:
    files = [run.scores, run.samples, run.images]
    assert not any(run.folder.glob(".tmp-*"))
    return [file.read_bytes() for file in files]


@pytest.fixture(scope="module")
def undisturbed(ready, tmp_path_factory) -> run_dir.RunDir:
    run = copied(ready, tmp_path_factory.mktemp("undisturbed"))
    assert (process := evaluating(run)).wait() == 0, process.said
    return run


def copied(run: run_dir.RunDir, folder: Path) -> run_dir.RunDir:
    return run_dir.RunDir(Path(shutil.copytree(run.folder, folder / "run")))


def evaluating(run: run_dir.RunDir, killed_after: int = 0, **environment) -> Process:
    """With `killed_after` it keeps each batch at once, and kills itself after so many."""
    save, saved = scores.PartialScores.save, 0

    def counted(self, archive: Path | None) -> None:
        nonlocal saved
        save(self, archive)
        saved += 1
        if saved == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        if killed_after:
            evaluate.KEEP_S = 0.0
            scores.PartialScores.save = counted
        stage("evaluate", evaluate.evaluate, run)

    return Process(work, environment)


def batches(run: run_dir.RunDir) -> int:
    settings = run.evaluation["settings"]
    return len(settings) * -(-len(run.test_prompts()) // BATCH)


def test_the_images_of_all_settings_are_kept_in_their_order(undisturbed):
    keys = [key for part, _ in image_archive.read(undisturbed.images, 4) for key in part]
    settings = undisturbed.evaluation["settings"]
    assert len(keys) == len(settings) * len(undisturbed.test_prompts()) == len(set(keys))
    last = undisturbed.description["iterations"]
    expected = [(s["iteration"] or last, s["sampler"], s["nfe"]) for s in settings]
    assert list(dict.fromkeys(key[:3] for key in keys)) == expected


def test_jobs_with_time_for_one_batch_each_end_as_one_job(ready, undisturbed, tmp_path):
    run = copied(ready, tmp_path)
    spent = {"TAFS_MINUTES": "1", "TAFS_STARTED": str(int(time.time()) - 60)}
    codes = []
    while not codes or codes[-1] == errors.CONTINUE:
        process = evaluating(run, **spent)
        codes.append(process.wait())
        if codes[-1] == errors.CONTINUE:
            assert "to be continued: the time limit" in process.said
            assert not run.scores.exists()
    assert codes == [errors.CONTINUE] * (batches(run) - 1) + [0]
    assert outcome(run) == outcome(undisturbed)


def test_a_killed_evaluation_goes_on_from_what_it_has_kept(ready, undisturbed, tmp_path):
    run = copied(ready, tmp_path)
    assert evaluating(run, killed_after=2).wait() == -signal.SIGKILL
    before = {file: os.stat(file).st_mtime_ns for file in run.judged.glob("*/*.zip")}
    assert len(before) == 2
    assert (again := evaluating(run)).wait() == 0, again.said
    assert {file: os.stat(file).st_mtime_ns for file in before} == before
    assert outcome(run) == outcome(undisturbed)


@pytest.mark.parametrize("pattern", ["*/0*/" + checkpoint.TENSORS, "*/*.zip"])
def test_what_was_kept_and_is_damaged_is_judged_again(undisturbed, tmp_path, pattern):
    run = copied(undisturbed, tmp_path)
    for file in run.judged.glob(pattern):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert (process := evaluating(run)).wait() == 0, process.said
    assert outcome(run) == outcome(undisturbed)


def test_another_adapter_is_judged_anew(undisturbed, tmp_path):
    run = copied(undisturbed, tmp_path)
    fingerprint = run.judging_fingerprint()
    run.snapshot(1).write_bytes(b"another")
    assert run.judging_fingerprint() != fingerprint
