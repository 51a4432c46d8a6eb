"""A real Slurm on one machine: `python tests/support/slurm_cluster.py FOLDER`, until Ctrl-C.

Needs root and Debian's slurm-wlm and munge. Its nodes have declared GPUs, which jobs can request
but not use. All files are in the folder, except the links /etc/slurm/slurm.conf and gres.conf,
which are removed afterwards. It does not start on a machine that has a Slurm of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
ETC = Path("/etc/slurm")
GPUS = 8  # per node
PATIENCE = 60.0  # s for a daemon to start or stop
PORTS = 17001  # port of the first node's daemon; the others follow

SLURM_CONF = """\
ClusterName=one-machine
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
GresTypes=gpu
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Sockets=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:h100:{gpus} State=UNKNOWN"
)


def missing() -> str:
    """What prevents a Slurm on this machine; "" if nothing does."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in PROGRAMS if not find(name)]
    if absent:
        return f"{', '.join(absent)} not found (apt-get install slurm-wlm munge)"
    if (ETC / "slurm.conf").exists() and not left_over(ETC / "slurm.conf"):
        return f"{ETC}/slurm.conf exists: this machine has a Slurm"
    return ""


def left_over(file: Path) -> bool:
    """Whether a file is the link of a cluster that was killed."""
    if not file.is_symlink():
        return False
    pid = file.resolve().parent.parent / "run" / "slurmctld.pid"
    return not (pid.is_file() and Path(f"/proc/{pid.read_text().strip()}").exists())


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")


@dataclass
class Cluster:
    """A cluster whose daemons run from `start` to `stop`.

    Args:
        folder: for all its files; its path must be short, because it holds sockets.
    """

    folder: Path
    names: tuple[str, ...] = ("h100-0", "h100-1")  # of the nodes
    _munged: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start all daemons.

        Raises:
            RuntimeError: the machine lacks something, or a daemon does not start.
        """
        if missing():
            raise RuntimeError(f"no Slurm can be started: {missing()}")
        for name in ("etc", "run", "log", "spool", "state", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(GPUS):
            device = self.folder / "dev" / f"nvidia{number}"
            if not device.exists():  # a regular file would not appear in CUDA_VISIBLE_DEVICES
                os.mknod(device, 0o600 | 0o020000, os.makedev(195, number))
        host = socket.gethostname()
        nodes = [
            NODE.format(name=name, host=host, port=PORTS + number, gpus=GPUS)
            for number, name in enumerate(self.names)
        ]
        text = SLURM_CONF.format(host=host, folder=self.folder, nodes="\n".join(nodes))
        gres = f"Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        ETC.mkdir(exist_ok=True)
        for name, content in (("slurm.conf", text), ("gres.conf", gres)):
            (self.folder / "etc" / name).write_text(content)
            # The executor's inner srun does not get SLURM_CONF.
            if left_over(ETC / name):
                (ETC / name).unlink()
            (ETC / name).symlink_to(self.folder / "etc" / name)
        place = Path("/run/munge/munge.socket.2")
        place.parent.mkdir(exist_ok=True)
        shutil.chown(place.parent, "munge", "munge")
        place.unlink(missing_ok=True)  # left by a cluster that was killed
        munged = ["runuser", "-u", "munge", "--", find("munged"), "--foreground"]
        with (self.folder / "log" / "munged.log").open("ab") as log:
            self._munged = subprocess.Popen([str(p) for p in munged], stdout=log, stderr=log)
        wait(place.exists, "munged")
        self.start_controller()
        for name in self.names:
            subprocess.run([str(find("slurmd")), "-N", name], check=True)
        wait(lambda: set(self.states()) == {"idle"}, "the nodes")

    def start_controller(self) -> None:
        subprocess.run([str(find("slurmctld")), "-i"], check=True)
        wait(lambda: bool(self.states(quiet=True)), "slurmctld")

    def states(self, quiet: bool = False) -> list[str]:
        """The states of the nodes."""
        asked = ["sinfo", "-h", "-N", "-p", "gpu", "-o", "%T"]
        done = subprocess.run(asked, capture_output=True, text=True, check=not quiet)
        return done.stdout.split()

    def jobs(self) -> dict[str, str]:
        """The state of every job that Slurm knows, by id."""
        asked = ["squeue", "-h", "-t", "all", "-o", "%i %T"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        return dict(line.split() for line in done.stdout.splitlines())

    def end(self, daemon: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon, `slurmctld` or `slurmd.NODE`, by the process id in its file."""
        file = self.folder / "run" / f"{daemon}.pid"
        if not file.exists():
            return
        pid = int(file.read_text())
        with suppress(ProcessLookupError):
            os.kill(pid, how)
            wait(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {daemon}")
        file.unlink(missing_ok=True)

    def stop(self) -> None:
        """End all jobs and daemons, and remove the links."""
        if self.states(quiet=True):
            subprocess.run(["scancel", "--user=root"], check=False)
        for daemon in (*(f"slurmd.{name}" for name in self.names), "slurmctld"):
            self.end(daemon)
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait(PATIENCE)
        for name in ("slurm.conf", "gres.conf"):
            link = ETC / name
            if link.is_symlink() and link.resolve() == self.folder / "etc" / name:
                link.unlink()

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait(ready: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until `ready`.

    Raises:
        RuntimeError: after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm: {what} did not happen in {seconds:g} s")
        time.sleep(0.1)


def main() -> None:
    if len(sys.argv) != 2:
        print("usage: python tests/support/slurm_cluster.py FOLDER", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Cluster(Path(sys.argv[1]).resolve()) as cluster:
            print(f"{len(cluster.names)} nodes are idle; Ctrl-C ends them", flush=True)
            signal.pause()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
