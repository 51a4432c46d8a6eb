"""Which options a job gets from a profile, with the Slurm executor's own code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from snakemake import cli
from snakemake.executors import dryrun
from snakemake.iocontainers import ResourceList
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from support import project_copy

from tafs.orchestration import snakemake_hooks as hooks

FOR_ONE_GPU = {"trajectory_rewards", "score_served", "check_rewards"}
WITHOUT_GPU = {"check_base", "compare", "track"}
LOCAL = {"all", "describe", "describe_evaluation", "fetch", "report_spec"}
GPU_OPTION = re.compile(r"--(?:gres|gpus|ntasks-per-gpu|cpus-per-gpu)\b.*")
OTHERS = ("run_uuid", "slurm_logfile", "comment_str", "account", "workdir")
EVERYWHERE = ["gpu_model=h100", "constraint=ib", "qos=long", "tasks=1", "cpus_per_task=2"]


@pytest.fixture
def submitted(tmp_path, monkeypatch) -> Callable[..., dict[str, list[str]]]:
    """Rule -> sbatch's options for one of its jobs at the paper's scale."""
    folder = project_copy.copied(tmp_path, tmp_path / "results").folder
    jobs: dict[str, Any] = {}
    show = dryrun.Executor.printjob

    def collect(executor: Any, job: Any) -> None:
        jobs[str(job.rule)] = job
        show(executor, job)

    def submit(nodes: int, *arguments: str) -> dict[str, list[str]]:
        file = folder / "config.yaml"
        text = file.read_text()
        assert text.count("    processes: 8\n") == 1
        file.write_text(
            text.replace("    processes: 8\n", f"    processes: 8\n    nodes: {nodes}\n")
        )
        # The defaults of the profile, and more.
        profile = folder / "slurm" / "profile.yaml"
        text = profile.read_text()
        more = "".join(f"  - {setting}\n" for setting in EVERYWHERE)
        profile.write_text(text.replace("default-resources:\n", f"default-resources:\n{more}"))
        with pytest.raises(SystemExit) as ended:
            cli.main(["all", "--profile", "slurm", "--dry-run", "--forceall", *arguments])
        assert ended.value.code == 0
        return {
            rule: shlex.split(
                get_submit_command(
                    job,
                    # As the executor's `get_partition_arg`.
                    dict.fromkeys(OTHERS, "")
                    | {"partition": f" -p {job.resources['slurm_partition']}"},
                )
                + hooks.gpu_options(job)
            )
            for rule, job in jobs.items()
            if rule not in LOCAL
        }

    monkeypatch.chdir(folder)
    monkeypatch.setattr(dryrun.Executor, "printjob", collect)
    return submit


def gpu_options(options: list[str]) -> list[str]:
    return [option for option in options if GPU_OPTION.fullmatch(option)]


@pytest.mark.parametrize(
    ("nodes", "training"),
    [
        (1, ["--cpus-per-gpu=8", "--gpus=h100:8"]),
        (2, ["--cpus-per-gpu=8", "--gres=gpu:h100:4"]),
    ],
)
def test_a_profiles_gpu_model_reaches_the_jobs_with_gpus_once(submitted, nodes, training):
    found = submitted(nodes)
    assert set(found) == {"train", "evaluate", *FOR_ONE_GPU, *WITHOUT_GPU}
    assert gpu_options(found["evaluate"]) == ["--cpus-per-gpu=8", f"--gpus=h100:{8 // nodes}"]
    assert gpu_options(found["train"]) == training
    assert f"--nodes={nodes}" in found["train"]
    assert ("--ntasks=2" in found["train"]) == (nodes == 2)
    for rule in FOR_ONE_GPU:
        assert gpu_options(found[rule]) == ["--cpus-per-gpu=8", "--gpus=h100:1"], rule
    assert all("--nodes=1" in found[rule] for rule in {"evaluate", *FOR_ONE_GPU})
    for rule in WITHOUT_GPU:
        assert gpu_options(found[rule]) == [], rule
        assert {"--ntasks=1", "--cpus-per-task=2"} <= set(found[rule])
    for rule, options in found.items():
        assert shlex.join(options).count(" -C ib --qos=long ") == 1, rule


def test_a_setting_of_one_rule_reaches_only_its_jobs(submitted):
    settings = ("gpu_model=a100", "cpus_per_gpu=4", "qos=urgent", "runtime=60", "mem_mb=7000")
    found = submitted(1, "--set-resources", *(f"train:{setting}" for setting in settings))
    assert gpu_options(found["train"]) == ["--cpus-per-gpu=4", "--gpus=a100:8"]
    assert " -t 60 -C ib --qos=urgent --mem 7000 " in shlex.join(found.pop("train"))
    for rule, options in found.items():
        assert not {"--qos=urgent", "--cpus-per-gpu=4", "60", "7000"} & set(options), rule


def test_jobs_without_gpus_can_be_sent_to_a_partition_of_their_own(submitted):
    settings = (f"{rule}:slurm_partition=cpu" for rule in sorted(WITHOUT_GPU))
    for rule, options in submitted(1, "--set-resources", *settings).items():
        apart = rule in WITHOUT_GPU
        assert options[options.index("-p") + 1] == ("cpu" if apart else "gpu"), rule
        assert bool(gpu_options(options)) != apart, rule


def test_a_node_that_has_failed_is_not_excluded_but_those_of_the_user_are():
    kind = type("Executor", (), {"_failed_nodes": {"h100-0"}, "__module__": hooks.SLURM})
    workflow = SimpleNamespace(scheduler=SimpleNamespace(_executor=kind()))
    executor = hooks.slurm_executor(workflow)
    executor._failed_nodes.add("h100-1")
    job = SimpleNamespace(resources=ResourceList(fromdict={}), threads=1, is_group=lambda: False)
    command = get_submit_command(
        job, dict.fromkeys((*OTHERS, "partition"), ""), failed_nodes=executor._failed_nodes
    )
    assert command.endswith(" --exclude=h100-0") or " --exclude=h100-0 " in command


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"gpu": 8, "gres": "gpu:h100:8"}, " --gpus=h100:8"),
        ({"gpu": 8, "gres": "gpu:h100:4", "gpu_model": "a100"}, " --gpus=h100:4"),
        ({"gres": "gpu:8", "gpu_model": "h100"}, " --gres=gpu:h100:8"),
        ({"gres": "gpu", "gpu_model": "h100"}, " --gres=gpu:h100:1"),
        ({"gres": "gpu:h100:8", "gpu_model": "a100"}, " --gres=gpu:h100:8"),
        (
            {"gpu": 2, "gres": "lscratch:10", "gpu_model": "h100"},
            " --gres=lscratch:10 --gpus=h100:2",
        ),
        ({"gres": "lscratch:10", "gpu_model": "h100"}, " --gres=lscratch:10"),
        ({"gpu": 2}, " --gpus=2"),
        ({}, ""),
    ],
)
def test_gpus_are_in_one_option_of_sbatch(resources, expected):
    job = type("Job", (), {"resources": ResourceList(fromdict=resources)})
    assert hooks.gpu_options(job) == expected


def test_a_malformed_gres_is_refused_by_name():
    job = type("Job", (), {"resources": ResourceList(fromdict={"gres": "gpu:h100:x,1"})})
    with pytest.raises(Exception, match="Invalid GRES format: gpu:h100:x,1"):
        hooks.gpu_options(job)
