"""Estimates of FLOPs, time and disk space, computed by hand; schedules; the text of `tafs plan`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tafs.experiment import gpu_memory, needs
from tafs.orchestration import graph as graphs
from tafs.orchestration.graph import Graph, Job
from tafs.orchestration.plan import estimate
from tafs.orchestration.plan.estimate import DeviceJob, Rates, Speed, Workload
from tafs.orchestration.plan.report import record, report
from tafs.orchestration.plan.schedule import Task, makespan
from tafs.orchestration.plan.texts import amount
from tafs.runtime import receipts
from tafs.runtime.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
FLUX = "shapes-flux"
TAFS, FLOW = f"tafs_grpo.preference.{FLUX}.0", f"flow_grpo.preference.{FLUX}.0"


@pytest.fixture(scope="module")
def smoke() -> Graph:
    return graphs.read({"scale": "smoke"}, ROOT / "config.yaml")


@pytest.fixture
def work(smoke, tmp_path) -> Workload:
    moved = smoke.plan.config.model_copy(update={"results": str(tmp_path)})
    return Workload(Graph(dataclasses.replace(smoke.plan, config=moved)))


def test_an_evaluation_of_the_network_has_the_flops_of_its_products(work):
    """Five double and four single blocks on 3 x 3 image tokens and ten text tokens."""
    d, image, text, r = 128, 9, 10, work.graph.scale.lora.rank
    tokens = image + text
    attention = 2 * 2 * tokens**2 * d
    double = 2 * tokens * 12 * d**2 + 2 * 2 * 6 * d**2 + attention
    single = 2 * tokens * 12 * d**2 + 2 * 3 * d**2 + attention
    adapter = 2 * tokens * 2 * d * r * (5 * 4 + 4 * 3)
    ends = 2 * image * 32 * d * 2 + 2 * text * 128 * d
    conditions = 2 * (2 * (256 + d) + 64 + d + 2 * d) * d
    found = work.network(FLUX, 24)
    assert found.forward == 5 * double + 4 * single + adapter + ends + conditions
    assert found.adapter == 2 * d * r * (5 * 8 + 4 * 3)


def test_shorter_prompts_take_fewer_flops_and_less_memory_of_trained_models(paper):
    scale = paper.graph.scale.model_copy(update={"max_sequence_length": 128})
    config = paper.graph.plan.config
    config = config.model_copy(update={"scales": {**config.scales, "paper": scale}})
    runs = {
        name: run.model_copy(
            update={"assets": run.assets.model_copy(update={"max_sequence_length": 128})}
        )
        for name, run in paper.runs.items()
    }
    shorter = Workload(Graph(dataclasses.replace(paper.graph.plan, config=config, runs=runs)))
    assert shorter.architecture("flux-dev").tokens == 128
    assert shorter.architecture("sd35-medium").tokens == 77 + 128
    assert shorter.architecture("flux-schnell") == paper.architecture("flux-schnell")
    assert 0.7 < shorter.forward("flux-dev", 512) / paper.forward("flux-dev", 512) < 0.8
    name = "tafs_grpo.preference.flux-dev.0"
    needs = [gpu_memory.of_run(work.runs[name], 8).largest()[1] for work in (shorter, paper)]
    assert needs[0] < needs[1]


def test_an_iteration_costs_its_images_times_the_evaluations_of_the_method(work):
    spec = work.runs[TAFS]
    assert estimate.training_flops(spec, 2e9) == 2 * 4 * spec.forward_equivalents * 2e9
    evaluation = work.evaluations[TAFS]
    calls = sum(s.nfe * s.images_per_prompt for s in evaluation.settings)
    best = sum(s.nfe for s in evaluation.settings if s.sampler == "best")
    validation = 3 * 3 * best  # samplers and prompts
    assert estimate.evaluation_flops(evaluation, 10, 1e9) == (10 * calls + validation) * 1e9 > 0


def job(variant: str = "tafs_grpo", stage: str = "train", **values) -> DeviceJob:
    known = {"devices": 8, "flops": 8e15, **values}
    return DeviceJob(stage, f"{variant}.x", variant, FLUX, **known)


def test_a_job_takes_its_start_up_and_its_flops_divided_by_the_rate_of_its_devices():
    speed = Speed(Rates(training=1e13, judging=5e12), start_up=20.0, ratios={})
    assert speed.whole(job()) == 100.0 + 20.0
    assert speed.left(job(left=0.25)) == 25.0 + 20.0
    assert speed.left(job(left=0.0)) == 0.0
    assert speed.computing(job(flops=None)) == 0.0
    assert speed.whole(job(scoring=80.0)) == 110.0 + 20.0
    assert speed.whole(job(stage="evaluate")) == 200.0 + 20.0
    assert speed.ratio(job()) == (1.0, "modelled")


def test_measured_methods_have_their_own_ratio_and_others_the_median():
    ratios = {("train", "tafs_grpo", FLUX): 2.0, ("train", "flow_grpo", FLUX): 4.0}
    speed = Speed(Rates(1e13, 1e13), 0.0, {**ratios, ("evaluate", "base", FLUX): 5.0})
    assert speed.ratio(job()) == (2.0, "measured")
    assert speed.ratio(job("rg_lcd")) == (3.0, "scaled")
    assert speed.computing(job("rg_lcd")) == 300.0
    assert speed.ratio(job("base", "trajectory_rewards")) == (5.0, "scaled")
    other = dataclasses.replace(job("rg_lcd"), backbone="shapes-sd3")
    assert speed.ratio(other) == (1.0, "modelled")


def described(work: Workload, name: str) -> Path:
    folder = Path(work.graph.folder(name))
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(work.runs[name].to_json())
    return folder


def journalled(file: Path, seconds: list[float], fingerprint: str = "x") -> None:
    journal = Journal(file)
    journal.append("start", fingerprint=fingerprint)
    for number, total in enumerate(seconds):
        journal.append("iteration", iteration=number, seconds={"total": total}, rewards={})


def test_every_scored_image_is_decoded_and_scored_on_a_gpu(paper, work):
    spec = paper.runs["tafs_grpo.preference.flux-dev.0"]
    images = 1500 * 24 * 48 * 3  # TAFS-GRPO scores three images of each
    assert paper.scoring("train", spec) == pytest.approx(images * (0.0101 + 0.0053))  # compiled
    trajectories = 4 * 1000 * (0.147 + 0.0134)
    assert paper.scoring("trajectory_rewards", spec) == pytest.approx(trajectories)
    assert paper.scoring("evaluate", spec) > 24_576 * (0.147 + 0.0134)
    assert work.scoring("train", work.runs[TAFS]) == 0.0  # measured or nothing on the CPU


def test_rewards_are_differentiated_once_per_image_or_at_each_step(paper):
    images, scored = 1500 * 24 * 48, 0.0101 + 0.0053
    # Reward-Instruct draws 1 to 4 steps.
    for method, gradients in (("rg_lcd", 1), ("reward_instruct", 2.5)):
        spec = paper.runs[f"{method}.preference.flux-dev.0"]
        expected = images * (scored + gradients * 0.147)
        assert paper.scoring("train", spec) == pytest.approx(expected)
    without = {"method": "rg_lcd", "hyperparameters": {"reward_weight": 0.0}}
    distilled = spec.model_copy(update=without)
    assert paper.scoring("train", distilled) == pytest.approx(images * scored)


def test_a_slower_device_also_decodes_and_scores_more_slowly():
    h100 = Rates(training=4e14, judging=3e14)
    slow = Rates(training=1e14, judging=1e14, measured=h100)
    assert h100.seconds("train", 4e14, 5.0) == 1.0 + 5.0
    assert slow.seconds("train", 4e14, 5.0) == 4.0 + 4 * 5.0
    assert slow.seconds("evaluate", 4e14, 5.0) == 4.0 + 3 * 5.0
    assert Speed(slow, 0.0, {}).computing(job(devices=1, flops=4e14, scoring=5.0)) == 24.0


def test_the_seconds_of_an_h100_follow_the_rate_that_is_given(one_gpu):
    assumed = estimate.assumed_rates(one_gpu.graph.scale, one_gpu.runs.values())
    tenth = record({"scale": "one-gpu"}, tflops=assumed.training / 1e13)
    [whole, tenths] = [
        next(one["seconds_per_iteration"] for one in found["methods"] if one["method"] == "rg_lcd")
        for found in (record({"scale": "one-gpu"}), tenth)
    ]
    assert tenths == pytest.approx(10 * whole)


def test_trainings_are_measured_by_the_median_iteration_of_their_journals(work):
    journalled(described(work, TAFS) / "journal.jsonl", [90.0, 6.0, 2.0])
    rates = Rates(training=1e9, judging=2e9)
    modelled = 2 * 4 * 13 * work.forward(FLUX, 24) / 1e9
    ratios = estimate.measured(work, rates)
    assert ratios == {("train", "tafs_grpo", FLUX): 6.0 / modelled}
    [training] = work.jobs([Job("train", TAFS)], [Job("train", TAFS)])
    assert Speed(rates, 0.0, ratios).computing(training) == pytest.approx(2 * 6.0)


def test_evaluations_are_measured_by_their_logs(work):
    described(work, TAFS)
    log = Path(work.graph.root) / "logs" / "evaluate" / f"{TAFS}.log"
    log.parent.mkdir(parents=True)
    log.write_text('loading\n{"evaluated": "x", "seconds": {"sample": 2.0, "reward": 1.0}}\n')
    rates = Rates(training=1e9, judging=2e9)
    [evaluation] = work.jobs([Job("evaluate", TAFS)], [])
    ratios = estimate.measured(work, rates)
    assert list(ratios) == [("evaluate", "tafs_grpo", FLUX)]
    assert Speed(rates, 0.0, ratios).computing(evaluation) == pytest.approx(3.0)


def test_a_resume_state_of_the_same_settings_leaves_the_other_iterations(work):
    own = receipts.fingerprint(needs.training(work.runs[TAFS]))
    journalled(described(work, TAFS) / ".state" / "journal.jsonl", [1.0], own)
    journalled(described(work, FLOW) / ".state" / "journal.jsonl", [1.0], "of other settings")
    every = [Job("train", TAFS), Job("train", FLOW)]
    assert [job.left for job in work.jobs(every, every)] == [0.5, 1.0]
    assert [job.left for job in work.jobs(every, [])] == [0.0, 0.0]


def test_a_run_keeps_adapters_and_samples_and_has_states_while_it_trains(work):
    spec, evaluation = work.runs[TAFS], work.evaluations[TAFS]
    assert work.prompt_counts(spec.prompts, evaluation.prompts_per_tag) == (6, 6)  # one per task
    found = work.disk(spec)
    adapter = 4 * work.network(FLUX, 24).adapter
    assert found.adapters == adapter * (1 + len(spec.snapshots))
    assert found.samples == 6 * len(evaluation.settings) * 3 * 24 * 24
    assert (found.state, found.images) == (2 * 4 * adapter, 0)
    work.evaluations = {TAFS: evaluation.model_copy(update={"served": True})}
    drawn = sum(setting.images_per_prompt for setting in evaluation.settings)
    assert work.disk(spec).images == 6 * drawn * 3 * 24 * 24 // 2


def test_the_longest_task_starts_first():
    """3 and 2 + 2 on two devices; in the order given it would be 2, 2, then 3."""
    tasks = [Task("a", 2, 1), Task("b", 2, 1), Task("c", 3, 1)]
    assert makespan(tasks, nodes=2, per_node=1) == 4
    assert makespan(tasks, nodes=1, per_node=1) == 7
    assert makespan([], nodes=1, per_node=1) == 0


def test_a_task_waits_for_the_tasks_before_it():
    tasks = [Task("train", 2, 1), Task("evaluate", 5, 1, ("train",)), Task("other", 4, 1)]
    assert makespan(tasks, nodes=2, per_node=1) == 7
    done = [Task("evaluate", 5, 1, ("train",)), Task("other", 4, 1)]
    assert makespan(done, nodes=2, per_node=1) == 5


def test_a_training_takes_a_whole_node_and_small_jobs_share_one():
    tasks = [Task("train", 10, 8), *(Task(f"evaluate {n}", 4, 1) for n in range(8))]
    assert makespan(tasks, nodes=1, per_node=8) == 14
    assert makespan(tasks, nodes=2, per_node=8) == 10
    assert makespan([*tasks, Task("late", 9, 8, ("evaluate 0",))], nodes=2, per_node=8) == 13


def test_a_training_over_two_nodes_needs_both_of_them():
    tasks = [Task("train", 10, 16), Task("evaluate", 4, 1)]
    assert makespan(tasks, nodes=2, per_node=8) == 14
    assert makespan(tasks, nodes=3, per_node=8) == 10
    with pytest.raises(ValueError, match="--nodes 1: train needs 2; give at least as many"):
        makespan(tasks, nodes=1, per_node=8)


def test_a_plan_fits_a_terminal_of_100_columns_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = {"scale": "smoke", "results": str(tmp_path / "results")}
    text = report(overrides, nodes=2, price=2.0, verbose=True)
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line), text
    assert "     6 train: has not run" in lines
    assert f"         {TAFS}" in lines
    [stage] = [line.split() for line in lines if line.startswith("train ")]
    assert stage[:4] == ["train", "6", "0", "6"]
    total = [line.split() for line in lines if line.startswith("total ") and " B" not in line][-1]
    assert float(total[5]) == pytest.approx(2.0 * float(total[4]), rel=0.01)
    assert any(line.startswith("Wall time on 2 nodes of 1 core: ") for line in lines)
    assert "  Of 6 trainings 0 are measured, 0 are scaled, 6 are modelled." in lines
    assert not (tmp_path / "results").exists()


def test_the_paper_scale_is_planned_without_a_lock_file_and_without_diffusers():
    code = (
        "import json, sys\n"
        "from tafs.orchestration.plan.report import record, report\n"
        "print(report({'scale': 'paper'}, nodes=4, gpu_memory=80))\n"
        "print(json.dumps(record({'scale': 'paper'})['memory']))\n"
        "print('diffusers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, needs, imported = done.stdout.splitlines()
    assert imported == "False"
    assert max(map(len, lines)) <= 100
    assert "    16 train: has not run" in lines
    [wall] = [line for line in lines if line.startswith("Wall time on 4 nodes of 8 GPUs: ")]
    assert wall.endswith("; a training takes 8 GPUs, an evaluation 8.")
    assert not any("Unknown architecture" in line for line in lines)
    # 1,500 iterations of 24 x 48 images, 13 network evaluations each, at 56 % of an H100.
    row = next(line.split() for line in lines if line.startswith("tafs_final_advantage"))
    forward = 21_617_356_308_480  # computed by hand in tests/test_rehearse.py
    pace = 24 * 48 * 13 * forward / (8 * 0.56 * 989e12)
    # One image of each is decoded and scored in TF32.
    pace += 24 * 48 / 8 * (0.0101 + 0.0053)
    assert row[3:6] == [amount(pace), "modelled", amount((1500 * pace + 120) * 8 / 3600)]
    [row] = [line.split() for line in lines if line.startswith("tafs_grpo  ") and "clip_" in line]
    assert row[3:] == ["6", "69.9", "update", "48", "6"]
    [need] = [n for n in json.loads(needs) if n["method"] == "tafs_grpo" and "clip_" in n["task"]]
    need["bytes"] = amount(need["bytes"] / 1e9)
    assert list(map(str, need.values())) == row


@pytest.fixture(scope="module")
def paper() -> Workload:
    return Workload(graphs.read({"scale": "paper"}, ROOT / "config.yaml"))


@pytest.fixture(scope="module")
def one_gpu() -> Workload:
    return Workload(graphs.read({"scale": "one-gpu"}, ROOT / "config.yaml"))
