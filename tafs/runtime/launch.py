"""Start a training: `python -m tafs.runtime.launch RUN_DIR [--processes N] [--nodes N]`.

The number of processes is not part of a run's description; a training may be continued with
another one. Several processes are started by torchelastic, the library behind torchrun, one agent
per machine. The agent reports the failure that made the other processes fail.
"""

from __future__ import annotations

import builtins
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from functools import partial

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tafs.common import errors
from tafs.runtime import gpus
from tafs.runtime.distributed import PeerLost
from tafs.runtime.main import arguments
from tafs.runtime.run_dir import RunDir

MODULE = "tafs.training.train"
PORT, PORTS = 29500, 1000  # the agents meet on a port that depends on the Slurm job
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # forwarded to the processes


def main() -> None:
    parser = arguments("train")
    parser.add_argument("--processes", type=int, default=1, help="number that train together")
    parser.add_argument("--nodes", type=int, default=1, help="machines; more than 1 need Slurm")
    parser.add_argument("--meet", default="", metavar="HOST:PORT", help="set by this command")
    options = parser.parse_args()
    if not 1 <= options.nodes <= options.processes or options.processes % options.nodes:
        parser.error("--processes must be a positive multiple of --nodes")
    run = RunDir(options.run_dir)
    command = [str(run.folder), f"--minutes={options.minutes}"]
    command += [] if options.started is None else [f"--started={options.started}"]

    def work() -> None:
        if not options.meet:
            # The first process takes the lock. It is awaited here, because the other processes
            # would give up waiting for the first one.
            with run.alone("train"):
                pass
        if options.nodes > 1 and not options.meet:
            program = on_machines(options.processes, options.nodes, first_machine(), command)
            os.execvp(program[0], program)
        # Slurm assigns the GPUs of several machines.
        if options.nodes == 1 and run.device == "cuda":
            gpus.claim(options.processes)
        if options.processes == 1:
            sys.argv = ["train", *command]
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        else:
            run_processes(options.processes // options.nodes, options.nodes, options.meet, command)

    errors.run_cli(f"train {run.folder}", work, partial(run.note_failure, "train"))


def run_processes(count: int, nodes: int, meet: str, command: Sequence[str]) -> None:
    """Run `count` training processes on this machine, which is one of `nodes`.

    Args:
        meet: the host and port where the machines' agents meet; "" for one machine.
        command: the arguments of every process.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    with tempfile.TemporaryDirectory(prefix="tafs-") as logs:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=count,
            run_id=_slurm_job() if meet else str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint=meet or "localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=SIGNALS,
        )
        try:
            elastic_launch(config, sys.executable)("-m", MODULE, *command)
        except ChildFailedError as error:
            if any(failure.exitcode == errors.CONTINUE for failure in error.failures.values()):
                sys.exit(errors.CONTINUE)  # the first process has said so
            raise cause(error.failures) from None
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            raise errors.ToBeContinued(f"ended by {name}; the same command continues it") from None
        except RendezvousError as error:
            raise errors.RunFailed(
                f"the processes could not be connected: {str(error).splitlines()[0]}"
            ) from None


def cause(failures: Mapping[int, ProcessFailure]) -> errors.RunFailed | ValueError:
    """Return the error that made the other processes fail, as one line that names its process.

    The failures' times are whole seconds and cannot tell a cause from its consequences, which are
    lost peers and the agent's SIGTERM.
    """

    def described(failure: ProcessFailure) -> str:
        recorded = failure.error_file_data["message"]
        if isinstance(recorded, dict):  # by torchelastic's `record`
            return str(recorded["message"])
        if failure.exitcode < 0:
            return f"ended by {failure.signal_name()}"
        return f"ended with exit code {failure.exitcode}"

    def order(rank: int) -> tuple[bool, int]:
        failure = failures[rank]
        lost = described(failure).startswith(f"{PeerLost.__name__}: ")
        return lost or failure.exitcode == -signal.SIGTERM, failure.timestamp

    rank = min(failures, key=order)
    bad_input = failures[rank].exitcode == errors.BAD_INPUT
    text = described(failures[rank])
    kind, _, message = text.partition(": ")
    if message and (bad_input or not hasattr(builtins, kind)):
        text = message  # the names of this package's errors say nothing more
    return (ValueError if bad_input else errors.RunFailed)(f"process {rank}: {text}")


def on_machines(processes: int, nodes: int, first: str, command: Sequence[str]) -> list[str]:
    """Return the command that starts this module on every machine of the Slurm job."""
    meet = f"{first}:{PORT + int(_slurm_job()) % PORTS}"
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        *(sys.executable, "-m", "tafs.runtime.launch", *command),
        *(f"--processes={processes}", f"--nodes={nodes}", f"--meet={meet}"),
    ]


def first_machine() -> str:
    """Return the first machine of this Slurm job; Snakemake's job step hides Slurm's list."""
    try:
        query = ["squeue", "--noheader", "--jobs", _slurm_job(), "--format", "%N"]
        nodes = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL).strip()
        query = ["scontrol", "show", "hostnames", nodes]
        return subprocess.check_output(query, text=True).splitlines()[0]
    except (OSError, IndexError, subprocess.CalledProcessError):
        raise errors.RunFailed(
            "several nodes train a run only in a Slurm job; set the scale's nodes to 1"
        ) from None


def _slurm_job() -> str:
    return os.environ.get("SLURM_JOB_ID", "0")


if __name__ == "__main__":
    main()
