"""`tafs doctor`: what a scale needs of this machine, what is missing, and the remedy of each."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import get_hf_file_metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tafs.common.errors import one_line

OK, PROBLEM, UNKNOWN, UNUSED = "ok", "problem", "unknown", "not needed"
HUB_TIMEOUT, TOOL_TIMEOUT = 5.0, 20.0  # s
GB, MB = 1e9, 1e6


class Check(NamedTuple):
    """One finding."""

    name: str
    state: str  # OK, PROBLEM, UNKNOWN or UNUSED
    found: str
    remedy: str = ""  # of a problem


def checks(overrides: Mapping[str, Any]) -> Iterator[Check]:
    """All findings for a scale, each as soon as it is known.

    Args:
        overrides: `scale` and `results`, as `snakemake --config` takes them.
    """
    yield python(platform.python_version())
    yield packages(metadata.requires("tafs") or [])
    try:
        from tafs.assets import lockfile
        from tafs.orchestration import graph as graphs

        graph = graphs.read(overrides)
        fetched = [job.target for job in graph.jobs() if job.rule == "fetch"]
        resources = lockfile.read() if fetched else {}
        largest = graph.largest_memory()
    except (ValueError, OSError, ImportError) as error:
        remedy = "correct it; run `tafs` in a checkout of the project"
        yield Check("configuration", PROBLEM, one_line(str(error)), remedy)
        return
    config, scale = graph.plan.config, graph.scale
    yield Check("configuration", OK, f"scale {config.scale}, results in {graph.root}")
    cluster = partitions()
    slurm = cluster.state == OK and scale.device == "cuda"
    yield from gpus(scale.device == "cuda", scale.processes // scale.nodes, slurm)
    if scale.automatic and scale.gpu_memory is not None and not slurm:
        yield from gpu_memory(scale.gpu_memory)
    yield disk(graph, fetched)
    yield memory(*largest, slurm)
    yield from hub({name: resources[name] for name in fetched}, Path(scale.lock))
    if scale.evaluation.served:
        yield server(scale.evaluation.servers[scale.evaluation.judge][0])
    yield cluster
    yield tracking(Path(config.results) / "mlflow")


def python(version: str) -> Check:
    """Whether the package supports the Python version."""
    needed = metadata.metadata("tafs")["Requires-Python"]
    found = f"{version} in {sys.prefix}"
    if Version(version) in SpecifierSet(needed):
        return Check("python", OK, found)
    return Check("python", PROBLEM, found, f"install Python {needed}: make PYTHON=python3.11 setup")


def packages(requirements: Sequence[str]) -> Check:
    """Whether the requirements of the package and of the workflow are installed."""
    wrong, count = [], 0
    for one in map(Requirement, requirements):
        if one.marker and not any(one.marker.evaluate({"extra": e}) for e in ("", "workflow")):
            continue
        count += 1
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is not installed")
            continue
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} {version} is not {one.specifier}")
    if wrong:
        return Check("packages", PROBLEM, "; ".join(wrong), "run `make setup`")
    return Check("packages", OK, f"{count} requirements")


def _output(*command: str) -> str | None:
    """What a program prints; None if it is not installed or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TOOL_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def gpus(needed: bool, count: int, slurm: bool) -> Iterator[Check]:
    """The driver, and the GPUs that torch can use.

    Args:
        needed: whether the scale trains on GPUs.
        count: the GPUs of one machine that a training takes.
        slurm: whether jobs run on other machines.
    """
    import torch

    query = "--query-gpu=name,memory.total,driver_version"
    listed = (_output("nvidia-smi", query, "--format=csv,noheader") or "").splitlines()
    built = f"torch {torch.__version__}"
    if listed:
        driver = listed[0].rpartition(",")[2].strip()
        if torch.cuda.is_available():
            yield Check("driver", OK, f"NVIDIA {driver}, {built}")
        else:
            remedy = "install the torch build for this driver, or a newer driver"
            yield Check("driver", PROBLEM, f"{built} cannot use NVIDIA {driver}", remedy)
    else:
        yield Check("driver", UNUSED, f"nvidia-smi lists no GPU, {built}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f"{len(names)}: {', '.join(names)}" if names else "none"
    if not needed:
        yield Check("gpus", UNUSED, f"{found}; the scale runs on CPUs")
    elif len(names) >= count:
        yield Check("gpus", OK, found)
    elif slurm:
        yield Check("gpus", UNUSED, f"{found} here; jobs run on Slurm's nodes")
    else:
        remedy = "use a machine with them, or a scale with `device: cpu` such as shapes"
        yield Check("gpus", PROBLEM, f"{found}, but a training takes {count}", remedy)


def gpu_memory(given: float) -> Iterator[Check]:
    """Whether this machine's GPUs have the memory that the scale makes use of, in GB."""
    import torch

    sizes = [
        torch.cuda.get_device_properties(i).total_memory / GB
        for i in range(torch.cuda.device_count())
    ]
    if not sizes:
        return
    found = f"{min(sizes):.1f} GB, and the scale makes use of {given:g} GB"
    key = f"gpu_memory: {int(min(sizes))}"
    if min(sizes) < given:
        yield Check("gpu memory", PROBLEM, found, f"set {key} in the scale")
    else:
        faster = f"; {key} in the scale makes use of all" if min(sizes) > 1.2 * given else ""
        yield Check("gpu memory", OK, found + faster)


def disk(graph: Any, fetched: Sequence[str]) -> Check:
    """Whether the free space holds what `tafs plan` expects."""
    from tafs.orchestration.plan.estimate import Workload, downloads

    work = Workload(graph)
    disks = [work.disk(spec) for spec in graph.plan.runs.values()]
    needed = {Path(graph.root): float(sum(d.kept + d.state + d.images for d in disks))}
    if fetched:
        size, _ = downloads(Path(graph.scale.lock), fetched)
        needed[Path(constants.HF_HUB_CACHE)] = size
    found, short = [], []
    for folder, size in needed.items():
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        found.append(f"{free / GB:.1f} GB free for {folder}, {size / GB:.2f} GB needed at most")
        if free < size:
            short.append(folder)
    if short:
        remedy = "make room, or set `results` and HF_HOME to folders on a larger disk"
        return Check("disk", PROBLEM, "; ".join(found), remedy)
    return Check("disk", OK, "; ".join(found))


def memory(needed: float, job: str, slurm: bool) -> Check:
    """Whether the host's memory holds the largest job.

    Args:
        needed: MB that the job asks for.
        job: its name.
        slurm: whether jobs run on other machines.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed *= MB
    found = f"{total / GB:.1f} GB, {needed / GB:.1f} GB for {job}"
    if slurm:
        return Check("memory", UNUSED, f"{found}; jobs run on Slurm's nodes")
    if total >= needed:
        return Check("memory", OK, found)
    remedy = (
        "use a larger machine, or lower the scale's processes, evaluation.processes or memory_mb"
    )
    return Check("memory", PROBLEM, found, remedy)


def hub(resources: Mapping[str, Any], lock: Path) -> Iterator[Check]:
    """The pinned files, the token, the hub and the licences that the missing files need.

    Args:
        resources: of resources.yaml, that the scale downloads.
        lock: the scale's lock file.
    """
    from tafs.assets import lockfile
    from tafs.assets.cache import Cached

    if not resources:
        yield Check("models", UNUSED, "the embedded ones; nothing is downloaded")
        return
    pinned = lockfile.read_lock(lock) if lock.is_file() else {}
    if unpinned := [name for name in resources if name not in pinned]:
        found = f"{lock} does not pin {', '.join(unpinned)}"
        yield Check("models", PROBLEM, found, "run `make lock` with a network")
    else:
        yield Check("models", OK, f"{len(resources)} resources are pinned in {lock}")
    missing = {
        name: one
        for name, one in resources.items()
        if name in unpinned or Cached(name, lock).missing()
    }
    if not missing:
        yield Check("hub", UNUSED, "all files are downloaded")
        return
    gated = {name: one for name, one in missing.items() if one.gated}
    if not gated:
        yield Check("token", UNUSED, "no missing file needs one")
    elif get_token():
        yield Check("token", OK, "found")
    else:
        remedy = "set HF_TOKEN to one of https://huggingface.co/settings/tokens"
        yield Check("token", PROBLEM, f"none, but {', '.join(gated)} are gated", remedy)
    on_hub = next((one for one in missing.values() if one.hub), None)
    reached = on_hub is None or _allowed(on_hub) is not None
    if reached:
        yield Check("hub", OK, constants.ENDPOINT)
    else:
        yield Check("hub", UNKNOWN, f"{constants.ENDPOINT}: {_unreachable()}")
    for name, one in gated.items():
        page = f"{constants.ENDPOINT}/{one.hub}"
        allowed = _allowed(one) if reached else None
        if allowed is None:
            yield Check(f"licence {name}", UNKNOWN, f"{one.licence}: {_unreachable()}")
        elif allowed:
            yield Check(f"licence {name}", OK, one.licence)
        else:
            remedy = f"accept it on {page} with the account of HF_TOKEN"
            yield Check(f"licence {name}", PROBLEM, f"{one.licence}: not accepted", remedy)


def _allowed(resource: Any) -> bool | None:
    """Whether the hub gives the first plain file of a resource; None: it cannot be reached."""
    if constants.is_offline_mode():
        return None
    plain = next((file for file in resource.files if not set(file) & set("*?[")), "README.md")
    url = hf_hub_url(resource.hub, plain, repo_type=resource.type)
    try:
        get_hf_file_metadata(url, token=get_token(), timeout=HUB_TIMEOUT)
    except (hub_errors.GatedRepoError, hub_errors.RepositoryNotFoundError):
        return False
    except hub_errors.EntryNotFoundError:
        return True
    except (hub_errors.HTTPError, OSError):
        return None
    return True


def _unreachable() -> str:
    return "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "cannot be reached"


def server(program: str) -> Check:
    """Whether the program that serves a judge is installed."""
    if shutil.which(program):
        return Check("judge", OK, program)
    return Check("judge", PROBLEM, f"{program}: not found", "run `make judge`")


def partitions() -> Check:
    """Slurm's partitions with their GPUs."""
    if shutil.which("sinfo") is None:
        return Check("slurm", UNUSED, "sinfo is not installed here")
    listed = _output("sinfo", "--noheader", "--format=%R %G")
    if listed is None:
        return Check("slurm", UNKNOWN, "sinfo does not answer")
    found: dict[str, set[str]] = {}
    for line in listed.splitlines():
        name, _, generic = line.partition(" ")
        own = found.setdefault(name, set())
        own |= {g.partition("(")[0] for g in generic.strip().split(",") if g.startswith("gpu")}
    text = "; ".join(
        f"{name} ({', '.join(sorted(own)) or 'no GPUs'})" for name, own in sorted(found.items())
    )
    return Check("slurm", OK, f"{text or 'no partition'}; slurm/profile.yaml names the one in use")


def tracking(store: Path) -> Check:
    """Whether the store of `tafs sync` and `make ui` can be read and written."""
    database = store / "mlflow.db"
    if not database.exists():
        return Check("tracking", OK, f"{store}: made by the first `tafs sync`")
    remedy = f"move {store} away and run `tafs sync`, or correct its permissions"
    if not os.access(database, os.W_OK):
        return Check("tracking", PROBLEM, f"{database}: cannot be written", remedy)
    try:
        uri = f"{database.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as opened:
            [count] = opened.execute("SELECT count(*) FROM runs").fetchone()
    except sqlite3.Error as error:
        return Check("tracking", PROBLEM, f"{database}: {error}", remedy)
    return Check("tracking", OK, f"{store}: {count} runs")
