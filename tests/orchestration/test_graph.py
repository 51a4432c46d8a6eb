"""The graph lists exactly Snakemake's jobs, with their inputs and resources."""

import dataclasses
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML
from support import project_copy
from support.dry_run import dry_run

from tafs.assets import lockfile
from tafs.assets.lockfile import Locked, LockedFile
from tafs.common.yaml_files import ConfigError
from tafs.orchestration import graph as graphs
from tafs.orchestration.graph import Graph

ROOT = Path(__file__).resolve().parents[2]
TAFS = "tafs_grpo.preference.flux-dev.0"


@pytest.fixture(scope="module")
def paper() -> Graph:
    return graphs.read({"scale": "paper"}, ROOT / "config.yaml")


def with_scale(graph: Graph, **changes) -> Graph:
    """The graph with other settings of its scale."""
    config = graph.plan.config
    scale = config.active.model_copy(update=changes)
    changed = config.model_copy(update={"scales": {**config.scales, config.scale: scale}})
    return Graph(dataclasses.replace(graph.plan, config=changed))


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_the_jobs_are_those_of_a_forced_dry_run(scale, tmp_path, monkeypatch):
    expected = dry_run(scale, tmp_path, "--forceall")
    overrides = {"scale": scale, "results": str(tmp_path)}
    monkeypatch.chdir(ROOT)
    assert Counter(graphs.read(overrides).jobs()) == expected
    assert list(tmp_path.iterdir()) == []


def test_jobs_wait_for_the_downloads_that_they_read(paper):
    names = [Path(mark).name for mark in paper.fetched(TAFS)]
    assert names == ["clip-vit-h-14", "clip-vit-l-14", "flux-dev", "pickapic", "pickscore"]
    judging = {Path(mark).name for mark in paper.fetched(TAFS, judging=True)}
    assert {"flux-dev", "pickapic", "hpsv2", "imagereward"} <= judging
    assert not judging & {"unifiedreward", "mask2former"}
    assert "unifiedreward" in {Path(mark).name for mark in paper.served_inputs}
    assert graphs.read({"scale": "smoke"}, ROOT / "config.yaml").reward_check == []


def test_without_a_server_the_metric_that_it_scores_is_neither_downloaded_nor_checked(paper):
    one_gpu = graphs.read({"scale": "one-gpu"}, ROOT / "config.yaml")
    served, none = ({Path(mark).name for mark in g.check_inputs} for g in (paper, one_gpu))
    assert served - none == {"unifiedreward", "siglip"}
    assert none < served
    assert {job.target for job in one_gpu.jobs() if job.rule == "fetch"}.isdisjoint(served - none)


def test_trainings_and_evaluations_take_all_gpus_of_a_node_and_other_stages_one(paper):
    train = paper.resources("train")
    assert (train["gpu"], train["nodes"], train["train_processes"]) == (8, 1, 8)
    evaluate = paper.resources("evaluate")
    assert (evaluate["gpu"], evaluate["nodes"], evaluate["evaluate_processes"]) == (8, 1, 8)
    assert paper.resources("score_served")["gpu"] == 1
    evaluation = paper.scale.evaluation.model_copy(update={"processes": 2})
    assert with_scale(paper, evaluation=evaluation).resources("evaluate")["gpu"] == 2


def test_training_on_several_nodes_asks_for_gpus_per_node(paper):
    two = with_scale(paper, processes=16, nodes=2)
    train, evaluate = two.resources("train"), two.resources("evaluate")
    assert train["gres"] == "gpu:8" and "gpu" not in train
    assert train.items() >= {"mpi": "srun", "nodes": 2, "tasks": 2}.items()
    assert (evaluate["gpu"], evaluate["nodes"]) == (8, 1) and "mpi" not in evaluate


def asked(graph: Graph, stage: str, run: str = "", attempt: int = 1) -> int:
    """MB of host memory that Snakemake asks for."""
    wildcards = SimpleNamespace(run=run) if run else SimpleNamespace()
    return graph.resources(stage)["mem_mb"](wildcards, attempt)


EMBEDDINGS = 4 * 1024**3 / 1e6
BASE_HIDREAM, BASE_SD35 = "base.geneval.hidream-full", "base.geneval.sd35-medium"
# PickScore, CLIP and the small file of the former's tokenizer; HPSv2.1, ImageReward with its
# tokenizer, and GenEval's detector.
TRAINED_REWARDS, OTHER_METRICS = 3.9 + 1.7 + 0.01, 1.97 + 1.8 + 0.01 + 0.3


def test_jobs_ask_for_the_host_memory_of_the_files_that_their_run_loads(paper):
    """In GB: 3 of libraries, and 4 GiB of embeddings for models that are trained."""
    flux, rewards = 33.7, TRAINED_REWARDS
    whole = 8 * (3000 + EMBEDDINGS + 1000 * (flux + rewards))
    assert asked(paper, "train", TAFS) == pytest.approx(whole, abs=8)
    metrics = rewards + OTHER_METRICS
    hidream = 8 * (3000 + 1000 * (48.2 + 16.1 + metrics))  # with its Llama
    assert asked(paper, "evaluate", BASE_HIDREAM) == pytest.approx(hidream, abs=8)
    sd35 = 8 * (3000 + EMBEDDINGS + 1000 * (16.3 + metrics))
    assert asked(paper, "evaluate", BASE_SD35) == pytest.approx(sd35, abs=8)
    assert asked(paper, "trajectory_rewards", BASE_SD35) == pytest.approx(sd35 / 8, abs=1)
    assert paper.largest_memory() == (
        asked(paper, "evaluate", BASE_HIDREAM),
        "evaluate " + BASE_HIDREAM,
    )
    two = with_scale(paper, processes=16, nodes=2)
    assert asked(two, "train", TAFS) == asked(paper, "train", TAFS)  # on each node
    wide = with_scale(paper, dtype="float32")
    assert asked(wide, "train", TAFS) == pytest.approx(whole + 8 * 1000 * flux, abs=8)


def test_half_as_much_memory_is_added_with_each_attempt(paper):
    first = asked(paper, "train", TAFS)
    assert [asked(paper, "train", TAFS, n) for n in (2, 3)] == [first * 3 // 2, first * 2]


def test_judges_and_golden_scores_ask_for_the_memory_of_their_files(paper):
    server = 5 * 3000  # one process of ours and four of the server
    judge = 16.1 + 3.5
    assert asked(paper, "score_served", TAFS) == pytest.approx(server + 1000 * judge, abs=1)
    every = judge + TRAINED_REWARDS + OTHER_METRICS
    assert asked(paper, "check_rewards") == pytest.approx(server + 1000 * every, abs=1)
    one_gpu = graphs.read({"scale": "one-gpu"}, ROOT / "config.yaml")
    alone = 3000 + 1000 * (every - judge)
    assert asked(one_gpu, "check_rewards") == pytest.approx(alone, abs=1)
    largest = asked(one_gpu, "evaluate", BASE_SD35)
    assert asked(one_gpu, "tune_method") == largest == one_gpu.largest_memory()[0]


def test_a_locks_sizes_are_taken_before_those_of_the_catalogue(paper, tmp_path):
    lock = tmp_path / "resources.lock.yaml"
    file = LockedFile(size=10**9, sha256="0" * 64)
    files = {"transformer/a.safetensors": file, "vae/b.safetensors": file}
    pinned = Locked(hub="black-forest-labs/FLUX.1-dev", revision="0" * 40, files=files)
    lockfile.write(lock, {"flux-dev": pinned})
    locked = with_scale(paper, lock=str(lock))
    found = 8 * (3000 + EMBEDDINGS + 2000 + 1000 * TRAINED_REWARDS)  # the rewards are not pinned
    assert asked(locked, "train", TAFS) == pytest.approx(found, abs=8)


def test_a_file_of_unknown_size_is_named(paper, monkeypatch):
    known = lockfile.read()
    monkeypatch.setattr(
        lockfile, "read", lambda: {k: v for k, v in known.items() if k != "flux-dev"}
    )
    with pytest.raises(
        ConfigError, match="flux-dev: its size is unknown; add it to resources.yaml"
    ):
        asked(with_scale(paper, nodes=1), "train", TAFS)


def test_snakemake_names_a_file_of_unknown_size_in_one_line(tmp_path):
    project = project_copy.copied(tmp_path, tmp_path / "results")
    command = ["snakemake", "all", "--dry-run", "--config", "scale=paper"]
    with project.edited("resources.yaml", "\nsana-sprint:\n", "\nsana-print:\n"):
        done = subprocess.run(
            command, cwd=tmp_path, env=project.environment, capture_output=True, text=True
        )
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said == "sana-sprint: its size is unknown; add it to resources.yaml"
    assert "Traceback" not in done.stderr


def test_a_scale_without_experiments_asks_for_nothing(paper):
    nothing = dataclasses.replace(with_scale(paper, assets="shapes").plan, runs={})
    assert Graph(nothing).largest_memory() == (0, "no job")


def test_embedded_scales_ask_for_3000_mb_and_a_number_that_is_given_is_kept(paper):
    shapes = graphs.read({"scale": "shapes"}, ROOT / "config.yaml")
    assert shapes.largest_memory()[0] == 3000
    given = with_scale(paper, memory_mb=60_000)
    assert asked(given, "evaluate", BASE_HIDREAM) == asked(given, "train", TAFS) == 480_000
    assert asked(given, "score_served", TAFS) == 60_000


def test_the_servers_command_reaches_the_jobs_quoted(paper):
    server = ("it's", "{folder}")
    evaluation = paper.scale.evaluation.model_copy(update={"server": server})
    found = with_scale(paper, evaluation=evaluation).environment
    command = """["it'"'"'s", "{folder}"]"""
    assert found.format().startswith(
        f"""HF_HUB_OFFLINE=1 TAFS_SERVER='{{"unifiedreward": {command}, "unifiedreward2": ["""
    )


@pytest.mark.parametrize(
    "given, used",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
def test_gpu_jobs_allocate_memory_in_segments_that_grow_unless_the_user_says_how(
    paper, given, used
):
    command = f"export {paper.environment.format()}; printenv PYTORCH_ALLOC_CONF"
    around = {"PATH": os.environ["PATH"], **given}
    assert subprocess.check_output(["bash", "-c", command], env=around, text=True) == f"{used}\n"
    assert "ALLOC" not in with_scale(paper, device="cpu").environment


def test_the_slurm_profile_limits_the_time_of_exactly_the_long_rules():
    profile = YAML(typ="safe").load(ROOT / "slurm" / "profile.yaml")
    rules = "".join(file.read_text() for file in (ROOT / "workflow" / "rules").glob("*.smk"))
    assert set(profile["set-resources"]) == set(re.findall(r'GRAPH\.resources\("(\w+)"\)', rules))
    assert profile["group-components"] == ["evaluations=4"]
