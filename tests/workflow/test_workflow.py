"""The whole workflow at smoke scale in a copy of the project, and what a change reruns."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from support.paper_metrics import METRICS
from support.project_copy import NEEDED, Project, copied, states

from tafs.experiment import run_inputs
from tafs.runtime import journal
from tafs.runtime.run_dir import RunDir

FLOW, TAFS = "flow_grpo.preference.shapes-flux.0", "tafs_grpo.preference.shapes-flux.0"
BASE = "base.shapes.shapes-flux"
METHODS = ("dance_grpo", "mix_grpo", "flow_grpo", "rg_lcd", "reward_instruct", "tafs_grpo")
TRAINED = [f"{name}.preference.shapes-flux.0" for name in METHODS]
REPORTED = {("compare", ""), ("track", ""), ("all", "")}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """`snakemake all` has run here, with an absolute results folder."""
    results = tmp_path_factory.mktemp("results") / "absolute"
    place = copied(tmp_path_factory.mktemp("project"), results)
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    (place.results / "said.txt").write_text(done.stderr)
    return place


def run_dir(project: Project, name: str) -> RunDir:
    return RunDir(project.smoke / "runs" / name)


def test_every_output_exists_and_is_not_empty(project):
    tables = ("table2", "equal_compute", "gains", "table7")
    formats = ("csv", "html", "md", "parquet", "tex")
    expected = [f"tables/{table}.{suffix}" for table in tables for suffix in formats]
    expected += [f"provenance/{table}.json" for table in tables]
    figures = ("figure1", "steps", "pareto", "learning_curves", "hacking", "profiles", "compute")
    expected += [f"figures/{name}.{suffix}" for name in figures for suffix in ("png", "pdf")]
    trained = ("adapter.safetensors", "journal.jsonl", "snapshots/1.safetensors")
    expected += [f"runs/{run}/{name}" for run in TRAINED for name in trained]
    judged = ("run.json", "evaluation.json", "scores.parquet", "samples.safetensors")
    expected += [f"runs/{run}/{name}" for run in (BASE, *TRAINED) for name in judged]
    trajectories = ("trajectory_rewards.parquet", "trajectories.safetensors")
    expected += [f"runs/{BASE}/{name}" for name in trajectories]
    expected += ["report_spec.json", "claims.md", "claims.json", "benchmarks/compare.tsv"]
    expected += [f"benchmarks/train/{FLOW}.tsv"]
    files = [project.smoke / name for name in expected]
    assert [file for file in files if not file.is_file() or not file.stat().st_size] == []
    assert (project.results / "mlflow" / "mlflow.db").stat().st_size > 0
    for file in (project.smoke / "figures").iterdir():
        assert file.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[file.suffix])


@pytest.mark.parametrize("run", [BASE, FLOW, TAFS])
def test_scores_are_those_that_the_evaluation_asks_for(project, run):
    """The asked number of images per prompt at each iteration, sampler and number of steps."""
    folder = run_dir(project, run)
    spec, evaluation = run_inputs.run_spec(folder), run_inputs.eval_spec(folder)
    asked = {
        (s.iteration or spec.iterations, s.sampler, s.nfe): s.images_per_prompt
        for s in evaluation.settings
    }
    scores = pd.read_parquet(folder.scores)
    groups = scores.groupby(["iteration", "sampler", "nfe"], observed=True)
    assert groups["image"].nunique().to_dict() == asked
    assert groups["prompt"].nunique().nunique() == 1
    assert {iteration for iteration, _, _ in asked} == {*spec.snapshots, spec.iterations}
    assert set(scores["metric"]) == set(METRICS)
    assert scores["value"].notna().all()
    axes = ["prompt", "iteration", "nfe", "sampler", "image", "metric"]
    assert not scores.duplicated(axes).any()


def test_trajectory_rewards_hold_every_step_of_every_prompt(project):
    folder = run_dir(project, BASE)
    asked = run_inputs.eval_spec(folder).trajectories
    scores = pd.read_parquet(folder.trajectory_rewards)
    assert scores["value"].notna().all()
    assert not scores.duplicated(["prompt", "step", "metric"]).any()
    assert set(scores["step"]) == set(range(1, asked.nfe + 1))
    assert len(scores) == asked.nfe * asked.prompts * len(METRICS)
    kept = load_file(folder.trajectory_images)
    assert kept["images"].shape == (len(kept["prompts"]), asked.nfe, 24, 24, 3)
    assert 0 < len(kept["prompts"]) <= asked.prompts


@pytest.mark.parametrize("run", [FLOW, TAFS])
def test_every_iteration_is_recorded_and_changes_the_adapter(project, run):
    folder = run_dir(project, run)
    spec = run_inputs.run_spec(folder)
    assert spec.snapshots == (1,)
    records = journal.iterations(folder.journal)
    assert [record["iteration"] for record in records] == list(range(spec.iterations)) != []
    adapter = load_file(folder.adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_only_results_are_left_and_the_last_line_says_where_they_are(project):
    assert list(project.smoke.glob("runs/*/.state")) == []
    assert list(project.smoke.glob("runs/*/.progress/*")) == []
    assert {file.name for file in project.folder.iterdir()} == {*NEEDED, ".snakemake"}
    said = (project.results / "said.txt").read_text().splitlines()
    assert said[-1].startswith("done in ")
    assert said[-1].endswith(f"{project.smoke}/tables/ and {project.smoke}/figures/")
    assert "Select jobs to execute..." not in said


def test_a_second_call_has_nothing_to_do(project):
    before = states(project.results)
    done = project.snakemake("all")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stderr
    assert states(project.results) == before


def of_runs(stages: str, runs: Iterable[str]) -> set[tuple[str, str]]:
    return {(stage, run) for stage in stages.split() for run in runs}


EVALUATED = of_runs("describe_evaluation evaluate", [BASE, *TRAINED])


@pytest.mark.parametrize(
    "file, old, new, rerun",
    [
        (  # an edited method: its runs
            *("baselines/flow_grpo.py", "METHOD = FlowGrpo", "METHOD = FlowGrpo  # x"),
            of_runs("train evaluate", [FLOW]),
        ),
        (  # a changed hyperparameter: the runs of its method
            *("config.yaml", "\n  tafs_grpo:\n", "\n  tafs_grpo: {max_grad_norm: 0.5}\n"),
            of_runs("describe train evaluate", [TAFS]),
        ),
        (  # a changed evaluation: every run, without a training
            *("config.yaml", "images_per_prompt: 1\n      prompts: 1"),
            "images_per_prompt: 2\n      prompts: 1",
            EVALUATED,
        ),
    ],
)
def test_a_change_reruns_only_what_depends_on_it(project, file, old, new, rerun):
    with project.edited(file, old, new):
        assert project.planned() == {*rerun, *REPORTED}


def test_finished_results_need_no_work_from_another_clone(project, tmp_path):
    clone = shutil.copytree(project.folder, tmp_path / "clone", copy_function=shutil.copyfile)
    results = shutil.copytree(project.results, tmp_path / "results elsewhere")
    assert Project(clone, results).planned() == set()


def test_one_more_seed_adds_its_runs_and_keeps_the_others(project):
    runs = [run.removesuffix("0") + "1" for run in TRAINED]
    new = of_runs("describe describe_evaluation train evaluate", runs)
    assert project.planned("--config", "seeds=2") == {*new, ("report_spec", ""), *REPORTED}
    assert project.planned("--config", "seeds=1") == set()


def own_lines(stderr: str) -> list[str]:
    """Standard error without Snakemake's announcement of its profile."""
    return [line for line in stderr.splitlines() if "workflow specific profile" not in line]


def test_an_unknown_key_in_the_configuration_is_named_in_one_line(project):
    before = states(project.results)
    with project.edited("config.yaml", "  smoke:\n    assets", "  smoke:\n    asets"):
        done = project.snakemake("all")
    assert (done.returncode, done.stdout) == (2, "")
    assert own_lines(done.stderr) == [
        "config.yaml: unknown key 'scales.smoke.asets'; did you mean 'assets'?"
    ]
    assert states(project.results) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "scael=shapes",
            "--config scael: only scale, results, method, seeds can be set",
        ),
        ("seeds=0", "--config seeds=0: give a number from 1 to 1000"),
        ("seeds=", "--config seeds=: give a number from 1 to 1000"),
    ],
)
def test_a_wrong_option_on_the_command_line_is_named_in_one_line(project, given, said):
    done = project.snakemake("all", "--config", given)
    [line] = own_lines(done.stderr)
    assert (done.returncode, line.startswith(said)) == (2, True)


def test_a_lock_that_cannot_be_written_is_one_line_and_starts_no_job(project, tmp_path):
    place = Project(project.folder, tmp_path)
    lock = place.smoke / ".locks" / "all"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(tmp_path / "elsewhere")
    done = place.snakemake("all")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith(f"{place.smoke}: ")]
    assert line.endswith(f"'{lock}'; make it writable for you")
    assert "Traceback" not in done.stderr
    assert {file.name for file in place.smoke.iterdir()} == {".locks", ".snakemake"}


def test_a_failed_run_is_named_and_the_other_results_are_kept(project, tmp_path):
    other = Project(project.folder, tmp_path / "results")
    shutil.copytree(project.smoke, other.smoke)
    before = states(other.smoke)
    raising = """
def broken(*_):
    raise RuntimeError("no advantage in sight")

FlowGrpo.assign_credit = broken
METHOD = FlowGrpo
"""
    with other.edited("baselines/flow_grpo.py", "METHOD = FlowGrpo\n", raising):
        done = other.snakemake("all")
    assert done.returncode == 1
    said = done.stderr.splitlines()
    log = other.smoke / "logs" / "train" / f"{FLOW}.log"
    at = said.index(f"FAILED train {FLOW} ({log})")
    assert "no advantage in sight" in said[at + 1]
    assert any(re.match(r"stopped after \d+:\d\d with 1 failed", line) for line in said)
    after = states(other.smoke)
    records = {f for f in before if f.parts[0] == ".snakemake" or f == Path(".locks/all")}
    own = {f for f in before if f.stem == FLOW or {FLOW, ".locks"} <= {*f.parts}}
    kept = before.keys() - own - records
    # The failed run's earlier adapter too.
    assert {file: after.get(file) for file in kept} == {file: before[file] for file in kept}
    assert "train: 1 to run again (method source: " in done.stderr


def test_a_failed_copy_to_mlflow_is_reported_and_does_not_fail_the_workflow(project, tmp_path):
    other = Project(project.folder, tmp_path / "results")
    shutil.copytree(project.smoke, other.smoke)
    (other.smoke / "tracked.html").unlink()
    (other.results / "mlflow").write_text("a file instead of the store")
    done = other.snakemake("all")
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("tracking: ")]
    assert str(other.results / "mlflow") in line
    assert "MLflow's copy is incomplete; `tafs sync` repeats it" in done.stderr
