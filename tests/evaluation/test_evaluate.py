"""Evaluation: what is scored, resuming, snapshots, altered adapters, golden scores."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from support import toy
from support.evaluated import BATCH, copied, write
from support.killable_training import Process, flip_bit, stage

from tafs.assets.sources import ShapesAssets
from tafs.common import errors
from tafs.evaluation import (
    check_rewards,
    evaluate,
    generate,
    image_archive,
    sample,
    scores,
    scoring,
)
from tafs.experiment import needs, run_inputs
from tafs.experiment.specs import BEST, PIPELINE, EvalSetting, RunSpec
from tafs.models import base
from tafs.rewards import golden
from tafs.runtime import checkpoint, gpus, progress, receipts
from tafs.runtime.run_dir import RunDir

KEY = ["iteration", "sampler", "nfe", "prompt", "image"]


def outcome(run: RunDir) -> list[bytes]:
    assert not any(run.folder.glob(".tmp-*"))
    listed = json.loads(run.images.read_bytes())
    assert len(listed) == len(list(run.folder.rglob("*.zip")))  # no image is there twice
    batches = [f"{k} {x.tolist()}".encode() for k, x in image_archive.read(run.images, 4)]
    return [run.scores.read_bytes(), run.samples.read_bytes(), *batches]


def settings(run: RunDir) -> tuple[EvalSetting, ...]:
    return run_inputs.eval_spec(run).settings


def prompts(run: RunDir) -> list[Any]:
    return run_inputs.test_prompts(run_inputs.run_spec(run), run_inputs.eval_spec(run))


def evaluating(run: RunDir, *options: str, killed_after: int = 0) -> Process:
    """Evaluate in a fork; with `killed_after` it saves every batch, and kills itself after some."""
    save, saved = scores.PartialScores.save, 0

    def counted(self: scores.PartialScores, archive: Path | None) -> None:
        nonlocal saved
        save(self, archive)
        saved += 1
        if saved == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        if killed_after:
            evaluate.SAVE_EVERY_S = 0.0
            scores.PartialScores.save = counted  # type: ignore[method-assign]
        stage("evaluate", evaluate.evaluate, run, options)

    return Process(work)


def test_every_image_of_every_setting_is_scored_once_by_every_metric(uninterrupted):
    table = pd.read_parquet(uninterrupted.scores)
    spec, count = run_inputs.run_spec(uninterrupted), len(prompts(uninterrupted))
    assert not table.duplicated([*KEY, "metric"]).any()
    metrics = run_inputs.asset_source(spec).metrics(spec.prompts)
    found = table.groupby(["iteration", "sampler", "nfe", "metric"], observed=True).size()
    expected = {
        (s.iteration or spec.iterations, s.sampler, s.nfe, metric): count * s.images_per_prompt
        for s in settings(uninterrupted)
        for metric in metrics
    }
    assert found.to_dict() == expected


def choices(run: RunDir) -> list[dict[str, Any]]:
    return json.loads(run.samplers.read_text())


def test_every_best_setting_has_the_sampler_that_validation_prefers(uninterrupted):
    spec, evaluation = run_inputs.run_spec(uninterrupted), run_inputs.eval_spec(uninterrupted)
    found = {(one["iteration"], one["nfe"]): one for one in choices(uninterrupted)}
    best = [s for s in evaluation.settings if s.sampler == BEST]
    assert set(found) == {(s.iteration or spec.iterations, s.nfe) for s in best}
    for one in found.values():
        assert set(one["quality"]) == set(evaluation.samplers)
        assert one["quality"][one["sampler"]] == max(one["quality"].values())
    # One Euler step has the same grid from 1 to 0, and so do all samplers.
    assert len({*found[spec.iterations, 1]["quality"].values()}) == 1


@pytest.mark.parametrize("iteration", [None, 1])
def test_scores_are_those_of_the_settings_model(uninterrupted, iteration):
    """Of the final adapter, or of the snapshot."""
    spec, evaluation = run_inputs.run_spec(uninterrupted), run_inputs.eval_spec(uninterrupted)
    [setting] = [
        s
        for s in settings(uninterrupted)
        if (s.iteration, s.nfe, s.sampler) == (iteration, 4, BEST)
    ]
    after = iteration or spec.iterations
    [chosen] = [
        one["sampler"]
        for one in choices(uninterrupted)
        if one["iteration"] == after and one["nfe"] == 4
    ]
    setting = setting.model_copy(update={"sampler": chosen})
    source, known = run_inputs.asset_source(spec), prompts(uninterrupted)
    model = source.model(spec.backbone, evaluation.resolution)
    file = uninterrupted.adapter if iteration is None else uninterrupted.snapshot(iteration)
    model.load_adapter(file)
    images = generate.generate(model, [p.text for p in known], setting, BATCH)
    rewards = source.rewards(["clip", "geneval"], strict_geneval=True)
    table = pd.read_parquet(uninterrupted.scores)
    rows = table.query("iteration == @after and nfe == 4 and sampler == 'best'")
    for metric, values in rewards.report(rewards.score(images, known)).items():
        found = torch.tensor(rows[rows["metric"] == metric]["value"].to_numpy())
        torch.testing.assert_close(found, values.double(), rtol=1e-5, atol=1e-6)


def test_a_run_is_sampled_with_the_sampler_that_its_evaluation_chose(uninterrupted):
    """With the same seed and prompts, the images are those that were scored."""
    sampled, texts = sample.of_run(uninterrupted.folder), [p.text for p in prompts(uninterrupted)]
    chosen = sampled.sampler(None, 4)
    [judged] = [c for c in choices(uninterrupted) if c["nfe"] == 4 and c["iteration"] == 2]
    assert chosen == judged["sampler"]
    found = sample.images(sampled, texts, 4, chosen, generate.EVALUATION_SEED)
    stored = load_file(uninterrupted.samples)
    assert torch.equal(found[stored["prompts"].long()], stored[f"{BEST}-4"])


def test_scores_do_not_depend_on_where_the_metrics_wait_while_prompts_are_encoded(
    uninterrupted, tmp_path, monkeypatch
):
    run, moved, to = copied(uninterrupted, tmp_path), [], torch.nn.Module.to

    def counted(module: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        moved.append(module)
        return to(module, *given, **named)

    monkeypatch.setattr(base, "_fit", lambda *_: False)
    local = evaluate._local(run.folder)
    monkeypatch.setattr(torch.nn.Module, "to", counted)
    setting = EvalSetting(sampler="ode", nfe=1, images_per_prompt=1)
    work = scoring.Work(setting, prompts(run), BATCH, generate.EVALUATION_SEED)
    found = [batch.scores for batch in local.score(work)]
    networks = local.rewards.networks
    assert len(networks) == 5  # all metrics but GenEval
    assert [sum(m is network for m in moved) for network in networks] == [2] * 5
    monkeypatch.setattr(base, "_fit", lambda *_: True)
    for batch, same in zip(evaluate._local(run.folder).score(work), found, strict=True):
        assert batch.scores.keys() == same.keys()
        assert all(torch.equal(batch.scores[name], same[name]) for name in same)


def test_images_that_two_settings_share_are_drawn_once(ready, tmp_path, monkeypatch):
    run = copied(ready, tmp_path)
    write(run, samplers=("ode_uniform",), served=False)
    drawn = []
    original = generate.sample

    def watched(model, texts, setting, batch, **options):
        drawn.append((setting.sampler, setting.nfe, setting.iteration))
        return original(model, texts, setting, batch, **options)

    monkeypatch.setattr(generate, "sample", watched)
    evaluate.evaluate(run)
    assert len(drawn) == len(set(drawn)) == len(settings(run)) - 1
    table = pd.read_parquet(run.scores)
    final = table[(table["nfe"] == 4) & (table["iteration"] == run_inputs.run_spec(run).iterations)]
    best, common = (
        final[final["sampler"] == name]["value"].tolist() for name in (BEST, "ode_uniform")
    )
    assert best == common


def test_samples_hold_the_images_of_every_setting_with_their_captions(uninterrupted):
    samples = load_file(uninterrupted.samples)
    judged = settings(uninterrupted)
    assert set(samples) == {"prompts", *(s.images for s in judged)}
    assert len(samples) == 1 + len(judged) and any("@" in name for name in samples)
    with safe_open(uninterrupted.samples, "pt") as file:
        captions = json.loads(file.metadata()["captions"])
    known, shown = prompts(uninterrupted), samples["prompts"].tolist()
    assert captions == [known[index].text for index in shown]
    archive = {k: p for keys, part in image_archive.read(uninterrupted.images, 8)
               for k, p in zip(keys, part, strict=True)}  # fmt: skip
    for setting in judged:
        kept = samples[setting.images].permute(0, 3, 1, 2).float() / 255
        for index, image in zip(shown, kept, strict=True):
            after = 2 if setting.iteration is None else setting.iteration
            key = image_archive.Key(after, setting.sampler, setting.nfe, index, 0)
            assert torch.equal(archive[key], image)


def test_the_archive_holds_the_images_of_all_settings_in_their_order(uninterrupted):
    keys = [key for part, _ in image_archive.read(uninterrupted.images, 4) for key in part]
    assert len(keys) == len(settings(uninterrupted)) * len(prompts(uninterrupted)) == len(set(keys))
    expected = [(s.iteration or 2, s.sampler, s.nfe) for s in settings(uninterrupted)]
    assert list(dict.fromkeys(key[:3] for key in keys)) == expected


def test_start_noise_does_not_depend_on_setting_or_first_batch(ready):
    spec, evaluation = run_inputs.run_spec(ready), run_inputs.eval_spec(ready)
    model = run_inputs.asset_source(spec).model(spec.backbone, evaluation.resolution)
    texts = ["a red circle", "a blue star", "two green squares"]
    one, two = (EvalSetting(sampler="ode", nfe=2, images_per_prompt=n) for n in (1, 2))
    few, many = (generate.generate(model, texts, setting, batch=2) for setting in (one, two))
    torch.testing.assert_close(few, many[::2])
    [(keys, rest)] = generate.sample(model, texts, two, batch=2, first=4)
    assert keys == [(2, 0), (2, 1)]
    assert torch.equal(rest, many[4:])
    assert torch.is_grad_enabled()


def test_a_published_pipeline_samples_with_its_own_steps():
    calls: list[tuple[list[str], list[int], int]] = []

    class Pipeline:
        def generate(self, texts: list[str], generators: list[Any], steps: int) -> torch.Tensor:
            calls.append((texts, [g.initial_seed() for g in generators], steps))
            return torch.zeros(len(texts), 3, 2, 2)

    setting = EvalSetting(sampler=PIPELINE, nfe=20, images_per_prompt=1)
    images = generate.generate(Pipeline(), ["a", "b", "c"], setting, batch=2)
    assert images.shape == (3, 3, 2, 2)
    assert [(texts, steps) for texts, _, steps in calls] == [(["a", "b"], 20), (["c"], 20)]
    assert len({seed for _, seeds, _ in calls for seed in seeds}) == 3


def test_an_untrained_model_is_evaluated_without_an_adapter(ready, tmp_path):
    run = copied(ready, tmp_path)
    spec = run_inputs.run_spec(run)
    base = RunSpec(**{**spec.model_dump(), "method": "base", "training": None, "snapshots": ()})
    (run.folder / "run.json").write_text(base.to_json())
    run.adapter.unlink()
    final = tuple(s for s in settings(run) if s.iteration is None)
    write(run, settings=final, served=False)
    evaluate.evaluate(run)
    assert set(pd.read_parquet(run.scores)["iteration"]) == {0}
    assert not run.images.exists()


def test_jobs_with_time_for_one_batch_give_the_same_files(ready, uninterrupted, tmp_path):
    run = copied(ready, tmp_path)
    batches = len(settings(run)) * -(-len(prompts(run)) // BATCH)
    # Of three samplers that are compared, two have jobs of their own.
    jobs = batches + 2 * sum(setting.sampler == BEST for setting in settings(run))
    expired = ("--minutes=1", f"--started={time.time() - 60}")
    codes = []
    while not codes or codes[-1] == errors.CONTINUE:
        process = evaluating(run, *expired)
        codes.append(process.wait())
        if codes[-1] == errors.CONTINUE:
            assert "to be continued: the time limit" in process.said
            assert not run.scores.exists()
    assert codes == [errors.CONTINUE] * (jobs - 1) + [0], process.said
    assert outcome(run) == outcome(uninterrupted)


def test_a_killed_evaluation_continues_from_its_saved_scores(ready, uninterrupted, tmp_path):
    run = copied(ready, tmp_path)
    assert evaluating(run, killed_after=3).wait() == -signal.SIGKILL
    saved = {file: file.stat().st_mtime_ns for file in run.eval_state.glob("*/*.zip")}
    assert len(saved) == 2
    next(iter(saved)).with_name("99.zip").touch()  # that a kill left before its state was saved
    evaluate.evaluate(run)
    assert {file: file.stat().st_mtime_ns for file in saved} == saved
    assert outcome(run) == outcome(uninterrupted)


def test_two_processes_continue_the_evaluation_of_one_with_the_same_files(
    ready, uninterrupted, tmp_path
):
    run = copied(ready, tmp_path)
    assert evaluating(run, killed_after=2).wait() == -signal.SIGKILL
    evaluate.evaluate(run, processes=2)
    assert outcome(run) == outcome(uninterrupted)
    assert choices(run) == choices(uninterrupted)


@pytest.mark.parametrize(
    "make, error, said",
    [
        (os.abort, errors.RunFailed, "process 0 of 1 has ended with exit code -6; "),
        (toy.exhausted, torch.OutOfMemoryError, "CUDA out of memory"),
        (list, errors.RunFailed, "AttributeError: 'list' object has no attribute 'score'"),
    ],
)
def test_the_failure_of_a_process_is_that_of_the_evaluation(make, error, said):
    work = scoring.Work(EvalSetting(sampler="ode", nfe=1, images_per_prompt=1), ["a"], 1, 0)
    shared = scoring.Shared(make, 1)
    with pytest.raises(error, match=said):
        list(shared.score(work))
    shared.close()


def test_every_process_sees_its_own_gpu_and_the_batches_come_in_their_order(monkeypatch):
    monkeypatch.setenv(gpus.VARIABLE, "3,GPU-5")
    setting = EvalSetting(sampler="ode", nfe=1, images_per_prompt=1)
    with scoring.scorer(toy.Seeing, 2) as scorer:
        found = [scored.files for scored in scorer.score(scoring.Work(setting, "abcde", 2, 0))]
    assert found == [[b"3"], [b"GPU-5"], [b"3"]]
    assert os.environ[gpus.VARIABLE] == "3,GPU-5"


def test_images_are_encoded_while_the_next_batch_is_sampled(ready, monkeypatch):
    encode, following = image_archive.encode, threading.Event()

    def encoded(image: torch.Tensor) -> bytes:
        assert following.wait(60), "the next batch waits for this one's images"
        return encode(image)

    def hear(_: str, done: int, total: int) -> None:
        if done == total:
            following.set()

    monkeypatch.setattr(image_archive, "encode", encoded)
    setting = EvalSetting(sampler="ode_uniform", nfe=1, images_per_prompt=1)
    work = scoring.Work(setting, prompts(ready)[:3], 2, 0, encoded=True)
    with progress.heard_by(hear):
        first, last = evaluate._local(ready.folder).score(work)
    assert first.keys + last.keys == [(0, 0), (1, 0), (2, 0)]
    kept = [Image.open(io.BytesIO(file)).size for file in first.files + last.files]
    assert kept == [(24, 24)] * 3


@pytest.mark.parametrize("pattern", ["*/0*/" + checkpoint.TENSORS, "*/*.zip"])
def test_damaged_saved_scores_are_computed_again(uninterrupted, tmp_path, pattern):
    run = copied(uninterrupted, tmp_path)
    damaged = list(run.eval_state.glob(pattern))
    assert len(damaged) >= len(settings(run))
    for file in damaged:
        flip_bit(file)
    evaluate.evaluate(run)
    assert outcome(run) == outcome(uninterrupted)


def test_another_adapter_or_setting_invalidates_the_saved_scores(uninterrupted, tmp_path):
    run = copied(uninterrupted, tmp_path)
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    own = needs.evaluation(run, spec, evaluation)

    def differences(**changes: int) -> list[str]:
        other = evaluation.model_copy(update=changes)
        return receipts.differences(own, needs.evaluation(run, spec, other))

    assert differences(batch=3) == []
    assert differences(resolution=32) == [f"resolution: {evaluation.resolution} -> 32"]
    with receipts.replacing(run.folder, "train", {}, [run.adapter, run.snapshot(1)]):
        run.snapshot(1).write_bytes(b"another")
    [difference] = receipts.differences(own, needs.evaluation(run, spec, evaluation))
    assert difference.startswith("snapshots/1.safetensors: ")


@pytest.mark.parametrize("name", ["adapter.safetensors", "snapshots/1.safetensors"])
def test_an_altered_adapter_is_refused(ready, tmp_path, name):
    run = copied(ready, tmp_path)
    flip_bit(run.folder / name)
    with pytest.raises(ValueError, match=f"{name}: "):
        evaluate.evaluate(run)
    assert not run.scores.exists()


def test_rewards_must_reproduce_their_golden_scores(ready, tmp_path, monkeypatch):
    run, file, out = copied(ready, tmp_path), tmp_path / "golden.json", tmp_path / "out.json"
    write(run, served=False)
    with pytest.raises(ValueError, match="its assets 'shapes' have no golden scores"):
        check_rewards.check_rewards(run, out)
    monkeypatch.setattr(ShapesAssets, "golden_scores", file)
    monkeypatch.setattr(golden, "SIDE", 24)  # the embedded models' image size
    check_rewards.check_rewards(run, out)
    found, stored = json.loads(out.read_text()), json.loads(file.read_text())
    assert set(found) == set(stored)
    for name, record in found.items():
        assert record["version"] is not None and [record["scores"]] == [*stored[name].values()]
    evaluate.evaluate(run)
    [expected] = stored["clip"].values()
    expected["disc"] += 0.1
    file.write_text(json.dumps(stored))
    for work in (lambda: evaluate.evaluate(run), lambda: check_rewards.check_rewards(run, out)):
        with pytest.raises(errors.RunFailed, match="reward clip: the golden image 'disc' scores"):
            work()


def test_an_evaluation_out_of_memory_continues_with_smaller_batches(
    ready, uninterrupted, tmp_path, monkeypatch
):
    run = copied(ready, tmp_path)
    sample = generate.sample

    def exhausted(model: Any, texts: Any, setting: Any, batch: int, **options: Any) -> Any:
        if batch > BATCH // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(model, texts, setting, batch, **options)

    monkeypatch.setattr(generate, "sample", exhausted)
    with pytest.raises(errors.ToBeContinued, match=f"to be continued with {BATCH // 2}"):
        evaluate.evaluate(run)
    evaluate.evaluate(run)
    found, expected = (pd.read_parquet(of.scores) for of in (run, uninterrupted))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)
