"""What a scale takes: FLOPs, seconds, disk and schedules by hand, and Snakemake's own reasons."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tafs.common import errors
from tafs.experiment import runs, validate
from tafs.models import catalog, flops
from tafs.orchestration import graph as workflow
from tafs.orchestration.plan import dry_run, estimate
from tafs.orchestration.plan.dry_run import Pending
from tafs.orchestration.plan.estimate import Job, Networks, Speed, Work
from tafs.orchestration.plan.report import amount, report, size
from tafs.orchestration.plan.schedule import Task, makespan
from tafs.runtime.journal import Journal
from tafs.runtime.progress import duration

ROOT = Path(__file__).resolve().parents[2]
FLUX = "shapes-flux"
TAFS, FLOW = f"tafs_grpo.preference.{FLUX}.0", f"flow_grpo.preference.{FLUX}.0"


def graph(results: Path, **overrides) -> workflow.Plan:
    return workflow.read(
        {"scale": "smoke", "results": str(results), **overrides}, ROOT / "config.yaml"
    )


# -- what is computed ------------------------------------------------------------------------------


def test_an_evaluation_has_the_flops_of_its_products():
    """Five double and four single blocks on 3 x 3 image tokens and ten of the prompt."""
    scale = validate.read(ROOT / "config.yaml", {"scale": "smoke"}).active
    d, image, text, r = 128, 9, 10, scale.lora.rank
    tokens = image + text
    attention = 2 * 2 * tokens**2 * d
    double = 2 * tokens * 12 * d**2 + 2 * 2 * 6 * d**2 + attention
    single = 2 * tokens * 12 * d**2 + 2 * 3 * d**2 + attention
    adapter = 2 * tokens * 2 * d * r * (5 * 4 + 4 * 3)
    ends = 2 * image * 32 * d * 2 + 2 * text * 128 * d
    conditions = 2 * (2 * (256 + d) + 64 + d + 2 * d) * d
    networks = Networks(scale)
    expected = 5 * double + 4 * single + adapter + ends + conditions
    assert networks.forward(FLUX, 24) == expected
    assert networks.adapter(FLUX) == 2 * d * r * (5 * 8 + 4 * 3)


@pytest.mark.parametrize(
    "name, parameters", [("sd35-large", 8_056_627_520), ("flux-schnell", 11_891_178_560)]
)
def test_models_that_are_only_compared_have_their_published_sizes(name, parameters):
    model = catalog.read()[name]
    backbone = flops.build(
        flops.CLASSES[model.pipeline],
        flops.PUBLISHED[model.resource],
        model,
        resolution=1024,
        dtype=torch.bfloat16,
        device=flops.META,
        lora_rank=None,
    )
    assert sum(p.numel() for p in backbone.transformer.parameters()) == parameters


def test_an_unknown_architecture_is_not_modelled():
    scale = validate.read(ROOT / "config.yaml", {"scale": "paper"}).active
    assert Networks(scale).forward("hidream-full", 1024) is None


def test_an_iteration_costs_its_images_times_the_methods_evaluations():
    settings = {"prompts_per_iteration": 24, "group_size": 48}
    description = {"settings": settings, "forward_equivalents": 13}
    assert estimate.training_flops(description, 2e9) == 24 * 48 * 13 * 2e9


def test_an_evaluation_costs_its_images_times_their_steps():
    settings = [{"nfe": 4, "images_per_prompt": 4}, {"nfe": 28, "images_per_prompt": 1}]
    assert estimate.evaluation_flops({"settings": settings}, 10, 1e9) == 10 * (16 + 28) * 1e9


# -- how long it takes -----------------------------------------------------------------------------


def job(variant: str = "tafs_grpo", stage: str = "train", **values) -> Job:
    return Job(stage, f"{variant}.x", variant, FLUX, **{"devices": 8, "flops": 8e15, **values})


def test_a_job_takes_its_flops_over_the_rate_of_its_devices_and_its_start():
    speed = Speed(rate=1e13, start_up=20.0, ratios={})
    assert speed.whole(job()) == 100.0 + 20.0
    assert speed.left(job(left=0.25)) == 25.0 + 20.0
    assert speed.left(job(left=0.0)) == 0.0
    assert speed.computing(job(flops=None)) == 0.0
    assert speed.ratio(job()) == (1.0, "modelled")


def test_a_measured_method_corrects_itself_and_others_are_scaled_by_the_median():
    ratios = {("train", "tafs_grpo", FLUX): 2.0, ("train", "flow_grpo", FLUX): 4.0}
    speed = Speed(rate=1e13, start_up=0.0, ratios=ratios)
    assert speed.ratio(job()) == (2.0, "measured")
    assert speed.ratio(job("rg_lcd")) == (3.0, "scaled")
    assert speed.computing(job("rg_lcd")) == 300.0
    assert speed.ratio(job("rg_lcd", "evaluate")) == (1.0, "modelled")
    other = dataclasses.replace(job("rg_lcd"), backbone="shapes-sd3")
    assert speed.ratio(other) == (1.0, "modelled")


def test_correlating_is_scaled_by_what_evaluations_took():
    speed = Speed(rate=1e13, start_up=0.0, ratios={("evaluate", "base", FLUX): 5.0})
    assert speed.ratio(job("base", "trajectory_rewards")) == (5.0, "scaled")


def described(plan: workflow.Plan, name: str) -> Path:
    folder = Path(plan.root) / "runs" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(plan.description(name))
    return folder


def journalled(file: Path, seconds: list[float], fingerprint: str = "x") -> None:
    journal = Journal(file)
    journal.append("start", fingerprint=fingerprint)
    for number, total in enumerate(seconds):
        journal.append("iteration", iteration=number, seconds={"total": total}, rewards={})


def test_the_median_iteration_of_the_journals_stands_against_the_model(tmp_path):
    plan = graph(tmp_path)
    journalled(described(plan, TAFS) / "journal.jsonl", [90.0, 6.0, 2.0])
    work, rate = Work(plan), 1e9
    modelled = 2 * 4 * 13 * work.networks.forward(FLUX, 24) / rate
    ratios = estimate.measured(work, rate)
    assert ratios == {("train", "tafs_grpo", FLUX): 6.0 / modelled}
    [training] = work.jobs([Pending("train", TAFS, "")], [Pending("train", TAFS, "")])
    assert Speed(rate, 0.0, ratios).computing(training) == pytest.approx(2 * 6.0)


def test_an_evaluations_log_stands_against_the_model(tmp_path):
    plan = graph(tmp_path)
    described(plan, TAFS)
    log = Path(plan.root) / "logs" / "evaluate" / f"{TAFS}.log"
    log.parent.mkdir(parents=True)
    log.write_text('loading\n{"evaluated": "x", "seconds": {"sample": 2.0, "reward": 1.0}}\n')
    work, rate = Work(plan), 1e9
    [evaluation] = work.jobs([Pending("evaluate", TAFS, "")], [])
    ratios = estimate.measured(work, rate)
    assert list(ratios) == [("evaluate", "tafs_grpo", FLUX)]
    assert Speed(rate, 0.0, ratios).computing(evaluation) == pytest.approx(3.0)


def test_a_training_that_was_stopped_has_only_its_other_iterations_left(tmp_path):
    plan = graph(tmp_path)
    of = {"description": json.loads(plan.description(TAFS))}
    own = runs.fingerprint(of["description"], Path(plan.method_source(TAFS)))
    journalled(described(plan, TAFS) / ".state" / "journal.jsonl", [1.0], own)
    journalled(described(plan, FLOW) / ".state" / "journal.jsonl", [1.0], "of other settings")
    every = [Pending("train", TAFS, ""), Pending("train", FLOW, "")]
    assert [job.left for job in Work(plan).jobs(every, every)] == [0.5, 1.0]
    assert [job.left for job in Work(plan).jobs(every, [])] == [0.0, 0.0]


# -- disk ------------------------------------------------------------------------------------------


def test_a_run_takes_its_adapters_its_samples_and_while_it_trains_its_states(tmp_path):
    plan = graph(tmp_path)
    work, run = Work(plan), plan.runs[TAFS]
    _, count, shown = work.judged(run)
    assert (count, shown) == (6, 6)  # one of each of GenEval's tasks
    finals = [s for s in work.evaluations[TAFS]["settings"] if s["iteration"] is None]
    found = estimate.disk(work, run, served=True)
    adapter = 4 * work.networks.adapter(FLUX)
    assert found.adapters == adapter * (1 + len(run.snapshots))
    assert found.samples == 6 * len(finals) * 3 * 24 * 24
    assert found.state == 2 * 4 * adapter
    drawn = sum(s["images_per_prompt"] for s in work.evaluations[TAFS]["settings"])
    assert found.images == 6 * drawn * 3 * 24 * 24 // 2
    assert estimate.disk(work, run, served=False).images == 0


# -- schedules -------------------------------------------------------------------------------------


def test_the_longest_task_starts_first():
    """3 and 2 + 2 on two devices; in the order given it would be 2, 2, then 3."""
    tasks = [Task("a", 2, 1), Task("b", 2, 1), Task("c", 3, 1)]
    assert makespan(tasks, nodes=2, per_node=1) == 4
    assert makespan(tasks, nodes=1, per_node=1) == 7
    assert makespan([], nodes=1, per_node=1) == 0


def test_a_task_waits_for_those_before_it():
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
    with pytest.raises(ValueError, match="nodes: train needs 2 of them, 1 are given"):
        makespan(tasks, nodes=1, per_node=8)


# -- Snakemake's account ---------------------------------------------------------------------------

SNAKEFILE = """
rule all:
    input: [f"runs/{run}/scores" for run in config["runs"].split("+")]
rule train:
    input: "runs/{run}/run.json", "method.py"
    output: "runs/{run}/adapter"
    shell: "touch {output}"
rule evaluate:
    input: "runs/{run}/adapter"
    output: "runs/{run}/scores"
    shell: "touch {output}"
"""


def aged(file: Path, seconds: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (seconds, seconds))


def test_the_reasons_are_snakemakes_own(tmp_path, monkeypatch):
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    aged(tmp_path / "method.py", 100)
    for run in ("new", "old", "kept"):
        aged(tmp_path / f"runs/{run}/run.json", 300 if run == "old" else 100)
    for run in ("old", "kept"):
        aged(tmp_path / f"runs/{run}/adapter", 200)
        aged(tmp_path / f"runs/{run}/scores", 250)
    monkeypatch.chdir(tmp_path)
    found = {(j.rule, j.about): j.summary for j in dry_run.jobs({"runs": "new+old+kept"})}
    assert found == {
        ("train", "new"): "missing output files",
        ("evaluate", "new"): "missing output files",
        ("train", "old"): "updated input files (run.json)",
        ("evaluate", "old"): "input files updated by another job",
        ("all", ""): "input files updated by another job",
    }
    everything = {(j.rule, j.about) for j in dry_run.jobs({"runs": "new+old+kept"}, forced=True)}
    assert len(everything) == 7
    assert dry_run.jobs({"runs": "kept"}) == []
    with pytest.raises(errors.RunFailed, match="snakemake --dry-run: .*run.json"):
        dry_run.jobs({"runs": "nowhere"})


def test_an_output_of_another_form_is_refused():
    with pytest.raises(errors.RunFailed, match="1 jobs can be read of 2; its output"):
        dry_run.parse("total   2\nrule a:\n    reason: Missing output files: x\n")


# -- the report ------------------------------------------------------------------------------------


def test_a_real_dry_run_is_reported_in_a_terminal_of_100_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = {"scale": "smoke", "results": str(tmp_path / "results")}
    text = report(overrides, nodes=2, price=2.0, verbose=True)
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line), text
    assert "     6 train: missing output files" in lines
    assert f"         {TAFS}" in lines
    [stage] = [line.split() for line in lines if line.startswith("train ")]
    assert stage[:4] == ["train", "6", "0", "6"]
    [total] = [line.split() for line in lines if line.startswith("total ") and " B" not in line][
        -1:
    ]
    assert float(total[5]) == pytest.approx(2.0 * float(total[4]), rel=0.01)
    assert any(line.startswith("Wall time on 2 nodes of 1 core: ") for line in lines)
    assert "  Of 6 trainings 0 are measured, 0 are scaled, 6 are modelled." in lines
    assert not (tmp_path / "results").exists()


def test_the_papers_scale_is_planned_without_a_lock_file():
    command = [sys.executable, "-m", "tafs.cli", "plan", "--scale", "paper", "--nodes", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "    15 train: missing output files" in lines
    assert any(line.startswith("Wall time on 4 nodes of 8 GPUs: ") for line in lines)
    # 1,500 iterations of 24 x 48 images, 13 evaluations each, at 40 % of an H100.
    row = next(line.split() for line in lines if line.startswith("tafs_final_advantage"))
    forward = 21_617_356_308_480  # by hand in tests/test_rehearse.py
    pace = 24 * 48 * 13 * forward / (8 * 0.4 * 989e12)
    assert row[3:6] == [amount(pace), "modelled", amount((1500 * pace + 120) * 8 / 3600)]


def test_numbers_are_short_and_keep_what_counts():
    assert [amount(x) for x in (0, 0.01234, 4.567, 78.94, 1234.5)] == [
        *("0", "0.0123", "4.57", "78.9", "1,234")
    ]
    assert [size(x) for x in (12, 1.5e6, 416.9e9, 2e12)] == ["12 B", "1.5 MB", "417 GB", "2 TB"]
    assert [duration(x) for x in (1255, 7500, 878_400)] == ["20 min 55 s", "2 h 5 min", "10 d 4 h"]
