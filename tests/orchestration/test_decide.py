"""`snakemake decide` adds the runs that open claims need, and nothing else."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.dry_run import dry_run
from support.finished import finish, finish_all
from support.project_copy import half_decided

from tafs.experiment import looks
from tafs.orchestration import graph as graphs
from tafs.orchestration import verdicts
from tafs.orchestration.graph import Graph, Job

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """The scale smoke, whose looks are at two and three seeds, with its own results finished."""
    monkeypatch.chdir(ROOT)
    found = graphs.read({"scale": "smoke", "results": str(tmp_path / "results")})
    finish_all(found)
    return found


def runs(method: str, seeds: Sequence[int]) -> list[str]:
    return [f"{method}.preference.shapes-flux.{seed}" for seed in seeds]


def read_by(graph: Graph, look: str) -> set[str]:
    return {job.target for job in graph.inputs(Job(look)) if job.rule == "train"}


def look(graph: Graph, *open_claims: str) -> None:
    """Finish the first look and its runs, with these claims still open."""
    for job in graph.inputs(Job("look_1")):
        finish(graph, job)
    file = looks.result(graph.plan.root, graph.plan.decide, 1)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"open": open_claims}), encoding="utf-8")
    finish(graph, Job("look_1"))


def test_the_runs_of_a_scale_are_the_same_with_more_seeds() -> None:
    for scale in ("smoke", "shapes"):
        plan = graphs.read({"scale": scale}, ROOT / "config.yaml").plan
        assert plan.budget is not None
        assert plan.runs.items() <= plan.budget.runs.items()
        assert plan.evaluations.items() <= plan.budget.evaluations.items()


def test_the_first_look_needs_its_seeds_of_every_method_that_a_claim_names(smoke: Graph) -> None:
    methods = ("tafs_grpo", "flow_grpo", "mix_grpo", "dance_grpo", "rg_lcd", "reward_instruct")
    assert read_by(smoke, "look_1") == {run for m in methods for run in runs(m, (0, 1))}
    assert read_by(smoke, "look_2") == set()  # not known yet
    assert "correlation" in smoke.plan.decide.claims
    assert not {"training_time", "annealing"} & {*smoke.plan.decide.claims}


@pytest.mark.parametrize(
    ("open_claims", "compared"),
    [
        ([], ()),
        (["in_domain_clip"], ("tafs_grpo", "flow_grpo")),
        (["base", "full_steps"], ("tafs_grpo",)),
        (["equal_compute", "base"], ("tafs_grpo", "flow_grpo")),
    ],
)
def test_the_next_look_needs_the_runs_of_open_claims_alone(
    smoke: Graph, open_claims: list[str], compared: tuple[str, ...]
) -> None:
    look(smoke, *open_claims)
    assert read_by(smoke, "look_2") == {r for m in compared for r in runs(m, (0, 1, 2))}


def test_snakemake_adds_the_runs_of_the_next_look(smoke: Graph) -> None:
    look(smoke, "in_domain_clip")
    new = Counter(
        Job(rule, run)
        for method in ("tafs_grpo", "flow_grpo")
        for run in runs(method, [2])
        for rule in ("describe", "describe_evaluation", "train", "evaluate")
    )
    found = dry_run("smoke", smoke.results, target="decide")
    assert found == new + Counter(map(Job, ("look_2", "decide")))


def test_the_target_all_neither_asks_for_more_seeds_nor_runs_again_because_of_them(
    smoke: Graph,
) -> None:
    assert verdicts.pending(smoke) == []
    look(smoke, "in_domain_clip")
    for job in smoke.inputs(Job("look_2")):
        finish(smoke, job)
    finish(smoke, Job("look_2"))
    assert verdicts.pending(smoke) == []
    assert {
        one.job for one in verdicts.pending(smoke, jobs=[Job("look_2"), Job("decide")])
    } == set()


def test_a_changed_run_is_judged_again_from_the_first_look_on(smoke: Graph) -> None:
    look(smoke)
    finish(smoke, Job("look_2"))
    jobs = [*map(Job, (*smoke.looks, "decide"))]
    assert verdicts.pending(smoke, jobs=jobs) == []
    scores = Path(smoke.folder(runs("flow_grpo", [1])[0])) / "scores.parquet"
    scores.write_text("others", encoding="utf-8")
    finish(smoke, Job("evaluate", scores.parent.name))
    found = verdicts.pending(smoke, jobs=jobs)
    assert [one.job.rule for one in found] == ["look_1", "look_2", "decide"]
    assert found[1].reason == "follows look_1"


def test_a_scale_without_looks_refuses_the_target_in_one_line(tmp_path: Path) -> None:
    assert graphs.read({"scale": "paper"}, ROOT / "config.yaml").looks == []
    command = ["snakemake", "decide", "--dry-run", "--config", "scale=paper", f"results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("config.yaml: scales.paper.decide: is not set; ")


def test_seeds_are_trained_until_claims_are_decided_or_the_budget_is_used(tmp_path: Path) -> None:
    place = half_decided(tmp_path)
    done = place.snakemake("all", "decide")
    assert done.returncode == 0, done.stderr
    assert sorted(place.runs("tafs_grpo")) == runs("tafs_grpo", (0, 1, 2))
    assert json.loads((place.smoke / "looks" / "1.json").read_bytes())["open"] == ["same"]
    outcome = json.loads((place.smoke / "decisions.json").read_bytes())
    found = {
        one["id"]: (one["verdict"], one["look"], one["seeds"], one["open"])
        for one in outcome["claims"]
    }
    assert found == {"same": ("undecided", 2, 3, False), "sure": ("reproduced", 1, 2, False)}
    text = (place.smoke / "decisions.md").read_text(encoding="utf-8")
    assert "looked at with 2 and 3 seeds until decided" in text
    assert "| **reproduced** | 1 | 2 | 3.82 % | 3.82 % | CLIP: " in text
    shown = json.loads((place.smoke / "claims.json").read_bytes())
    assert {c["n_seeds"] for one in shown for c in one["comparisons"]} == {1}
    assert "Nothing to be done" in place.snakemake("all", "decide").stderr
