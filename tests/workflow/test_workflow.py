"""The graph, run once at smoke scale in a copy of the project, and what reruns after a change."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from support.project_copy import NEEDED, Workplace, copied, states

from tafs.rewards.metrics import METRICS
from tafs.runtime import journal

FLOW, TAFS = "flow_grpo.preference.shapes-flux.0", "tafs_grpo.preference.shapes-flux.0"
BASE = "base.shapes.shapes-flux"
METHODS = ("dance_grpo", "mix_grpo", "flow_grpo", "rg_lcd", "reward_instruct", "tafs_grpo")
TRAINED = [f"{name}.preference.shapes-flux.0" for name in METHODS]
COMPARED = {("compare", ""), ("track", ""), ("all", "")}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """The whole graph has run here, once for all tests."""
    results = tmp_path_factory.mktemp("results") / "absolute"
    place = copied(tmp_path_factory.mktemp("project"), results)
    done = place.snakemake("all")
    assert done.returncode == 0, done.stderr
    (place.results / "said.txt").write_text(done.stderr)
    return place


# -- what one call leaves behind -------------------------------------------------------------------


def test_every_promised_file_is_there_and_not_empty(workplace):
    tables = ("table2", "equal_compute", "gains", "table7")
    promised = [
        f"tables/{table}.{suffix}"
        for table in tables
        for suffix in ("csv", "html", "md", "parquet", "tex")
    ]
    promised += [f"provenance/{table}.json" for table in tables]
    figures = ("figure1", "steps", "pareto", "learning_curves", "hacking", "profiles", "compute")
    promised += [f"figures/{name}.{suffix}" for name in figures for suffix in ("png", "pdf")]
    trained = ("adapter.safetensors", "journal.jsonl", "snapshots/1.safetensors")
    promised += [f"runs/{run}/{name}" for run in TRAINED for name in trained]
    judged = ("run.json", "evaluation.json", "scores.parquet", "samples.safetensors")
    promised += [f"runs/{run}/{name}" for run in (BASE, *TRAINED) for name in judged]
    promised += [f"runs/{BASE}/trajectory_rewards.parquet"]
    promised += ["report_spec.json", "claims.md", "claims.json"]
    stages = ("describe", "describe_evaluation", "train", "evaluate")
    promised += [f"logs/{stage}/{FLOW}.log" for stage in stages]
    promised += [f"logs/trajectory_rewards/{BASE}.log"]
    missing = [name for name in promised if not (workplace.smoke / name).is_file()]
    assert missing == []
    empty = [n for n in promised if (workplace.smoke / n).stat().st_size == 0 and "log" not in n]
    assert empty == []
    assert (workplace.results / "mlflow" / "mlflow.db").stat().st_size > 0


def test_images_and_documents_are_what_their_names_say(workplace):
    for file in (workplace.smoke / "figures").iterdir():
        starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
        assert file.read_bytes().startswith(starts[file.suffix]), file.name


@pytest.mark.parametrize("run", [BASE, FLOW, TAFS])
def test_scores_are_a_long_table_of_all_six_metrics(workplace, run):
    scores = pd.read_parquet(workplace.smoke / "runs" / run / "scores.parquet")
    assert {"run", "seed", "prompt", "nfe", "sampler", "image", "metric", "value"} <= set(scores)
    assert set(scores["metric"]) == set(METRICS)
    assert set(scores["run"]) == {run}
    assert scores["value"].notna().all()
    axes = ["prompt", "iteration", "nfe", "sampler", "image", "metric"]
    assert not scores.duplicated(axes).any()


@pytest.mark.parametrize("run", [BASE, FLOW, TAFS])
def test_scores_are_those_that_the_evaluation_asks_for(workplace, run):
    """At every model, sampler and number of steps as many images a prompt, and no others."""
    folder = workplace.smoke / "runs" / run
    description, evaluation = (
        json.loads((folder / name).read_text()) for name in ("run.json", "evaluation.json")
    )
    asked = {
        (s["iteration"] or description["iterations"], s["sampler"], s["nfe"]): s[
            "images_per_prompt"
        ]
        for s in evaluation["settings"]
    }
    scores = pd.read_parquet(folder / "scores.parquet")
    groups = scores.groupby(["iteration", "sampler", "nfe"], observed=True)
    assert groups["image"].nunique().to_dict() == asked
    assert groups["prompt"].nunique().nunique() == 1
    assert sorted({i for i, _, _ in asked}) == sorted(
        {*description["snapshots"], description["iterations"]}
    )


def test_step_scores_hold_every_image_of_a_trajectory_a_training_prompt(workplace):
    folder = workplace.smoke / "runs" / BASE
    asked = json.loads((folder / "evaluation.json").read_text())["correlation"]
    scores = pd.read_parquet(folder / "trajectory_rewards.parquet")
    assert set(scores["metric"]) == set(METRICS)
    assert scores["value"].notna().all()
    assert not scores.duplicated(["prompt", "step", "metric"]).any()
    assert set(scores["step"]) == set(range(1, asked["nfe"] + 1))
    assert set(scores["prompt"]) == set(range(asked["prompts"]))
    assert len(scores) == asked["nfe"] * asked["prompts"] * len(METRICS)


def test_run_json_does_not_say_how_a_run_is_judged(workplace):
    described = json.loads((workplace.smoke / "runs" / TAFS / "run.json").read_text())
    assert "evaluation" not in described["settings"]
    assert described["snapshots"] == [1]


def test_the_journals_tell_every_iteration(workplace):
    for run in (FLOW, TAFS):
        folder = workplace.smoke / "runs" / run
        description = json.loads((folder / "run.json").read_text())
        records = journal.iterations(folder / "journal.jsonl")
        assert [r["iteration"] for r in records] == list(range(description["iterations"])) != []


def test_the_adapters_were_trained(workplace):
    for run in (FLOW, TAFS):
        adapter = load_file(workplace.smoke / "runs" / run / "adapter.safetensors")
        assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_nothing_but_results_is_left_behind(workplace):
    assert list(workplace.smoke.glob("runs/*/.state")) == []
    assert list(workplace.smoke.glob("runs/*/.progress/*")) == []
    here = {file.name for file in workplace.folder.iterdir()}
    assert here == {*NEEDED, ".snakemake"}


def test_the_last_line_says_where_the_results_are(workplace):
    said = (workplace.results / "said.txt").read_text().splitlines()
    assert said[-1].startswith("done in ")
    assert said[-1].endswith(f"{workplace.smoke}/tables/ and {workplace.smoke}/figures/")
    assert "Select jobs to execute..." not in said


# -- what a change reruns --------------------------------------------------------------------------


def test_a_second_call_has_nothing_to_do(workplace):
    before = states(workplace.results)
    done = workplace.snakemake("all")
    assert done.returncode == 0
    assert "Nothing to be done" in done.stderr
    assert states(workplace.results) == before


def test_an_edited_method_reruns_its_own_runs_and_no_others(workplace):
    with workplace.edited("baselines/flow_grpo.py", "METHOD = FlowGrpo", "METHOD = FlowGrpo  # so"):
        own = {
            (stage, run) for stage in ("train", "evaluate") for run in workplace.runs("flow_grpo")
        }
        assert workplace.planned() == {*own, *COMPARED}


def test_a_changed_hyperparameter_reruns_its_methods_runs_and_no_others(workplace):
    old, new = "\n  tafs_grpo:\n", "\n  tafs_grpo: {max_grad_norm: 0.5}\n"
    with workplace.edited("config.yaml", old, new):
        stages = ("describe", "train", "evaluate")
        own = {(stage, run) for stage in stages for run in workplace.runs("tafs_grpo")}
        assert workplace.planned() == {*own, *COMPARED}


def test_a_changed_evaluation_judges_every_run_again_and_trains_none(workplace):
    old, new = "images_per_prompt: 1\n      prompts: 1", "images_per_prompt: 2\n      prompts: 1"
    with workplace.edited("config.yaml", old, new):
        stages = ("describe_evaluation", "evaluate")
        judged = {(stage, run) for stage in stages for run in (BASE, *TRAINED)}
        assert workplace.planned() == {*judged, ("trajectory_rewards", BASE), *COMPARED}


def test_one_more_seed_plans_its_runs_and_keeps_the_first_ones(workplace):
    stages = ("describe", "describe_evaluation", "train", "evaluate")
    new = {(stage, run.removesuffix("0") + "1") for stage in stages for run in TRAINED}
    planned = workplace.planned("--config", "seeds=2")
    assert planned == {*new, ("contents", ""), *COMPARED}
    assert workplace.planned("--config", "seeds=1") == set()


# -- what goes wrong -------------------------------------------------------------------------------


def own_lines(stderr: str) -> list[str]:
    """Standard error without Snakemake's announcement of its profile."""
    return [line for line in stderr.splitlines() if "workflow specific profile" not in line]


def test_a_misspelt_key_is_one_line_that_names_it_and_starts_no_job(workplace):
    before = states(workplace.results)
    with workplace.edited("config.yaml", "  smoke:\n    world", "  smoke:\n    wrld"):
        done = workplace.snakemake("all")
    assert done.returncode == 2
    assert done.stdout == ""
    assert own_lines(done.stderr) == [
        "config.yaml: unknown key 'scales.smoke.wrld'; did you mean 'world'?"
    ]
    assert states(workplace.results) == before


def test_a_lock_that_cannot_be_written_is_one_line_and_starts_no_job(workplace, tmp_path):
    place = Workplace(workplace.folder, tmp_path)
    lock = place.smoke / ".locks" / "all"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(tmp_path / "elsewhere")
    done = place.snakemake("all")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith(f"{place.smoke}: ")]
    assert line.endswith(f"'{lock}'; make it writable for you")
    assert "Traceback" not in done.stderr
    assert list(place.smoke.iterdir()) == [lock.parent]


def test_an_unknown_key_on_the_command_line_is_one_line_that_names_it(workplace):
    done = workplace.snakemake("all", "--config", "scael=shapes")
    assert done.returncode == 2
    [line] = own_lines(done.stderr)
    assert line.startswith("--config scael: only scale, results, method, seeds can be given")


@pytest.mark.parametrize(
    ("given", "said"),
    [("0", "0"), ("x", "x"), ("true", "true"), ("True", "True"), ("1001", "1001"), ("", "None")],
)
def test_what_is_no_number_of_seeds_is_one_line_and_starts_no_job(workplace, given, said):
    before = states(workplace.results)
    done = workplace.snakemake("all", "--config", f"seeds={given}")
    assert done.returncode == 2
    assert own_lines(done.stderr) == [f"--config seeds={said}: give a number from 1 to 1000"]
    assert states(workplace.results) == before


def test_a_failing_run_is_named_and_leaves_the_other_results_as_they_were(workplace, tmp_path):
    other = Workplace(workplace.folder, tmp_path / "results")
    shutil.copytree(workplace.smoke, other.smoke)
    before = states(other.smoke)
    raising = """
def broken(*_):
    raise RuntimeError("no advantage in sight")

FlowGrpo.assign = broken
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
    own = {file for file in before if FLOW in file.parts or file.stem == FLOW}
    own.add(Path(".locks/all"))
    assert {file: after.get(file) for file in before.keys() - own} == {
        file: before[file] for file in before.keys() - own
    }
    assert not (other.smoke / "runs" / FLOW / "adapter.safetensors").exists()


def test_a_tracking_copy_that_fails_is_one_line_and_keeps_no_table_back(workplace, tmp_path):
    other = Workplace(workplace.folder, tmp_path / "results")
    shutil.copytree(workplace.smoke, other.smoke)
    shutil.rmtree(other.smoke / "tables")
    (other.smoke / "tracked").unlink()
    (other.results / "mlflow").write_text("where the store should be")
    done = other.snakemake("all")
    assert done.returncode == 1
    assert "stopped after" in done.stderr and "with 1 failed" in done.stderr
    assert (other.smoke / "tables" / "table2.md").stat().st_size > 0
    assert not (other.smoke / "tracked").exists()
    (line,) = (other.smoke / "logs" / "track.log").read_text().splitlines()
    assert line.startswith("tracking: ")
    assert str(other.results / "mlflow") in line
