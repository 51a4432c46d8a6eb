"""One of several processes, of which the second fails as MODE says while the others wait for it.

Unlike a training it imports no model, which would take longer than the rest of the test.
"""

from __future__ import annotations

import os

from tafs.runtime import distributed, main
from tafs.runtime.deadline import Deadline
from tafs.runtime.run_dir import RunDir


def fail(run: RunDir, deadline: Deadline) -> None:
    with distributed.connected() as processes:
        processes.any(False)
        if processes.rank != 1:
            processes.any(False)
        if os.environ["MODE"] == "killed":
            os.kill(os.getpid(), 9)
        wrong = os.environ["MODE"] == "wrong"
        raise ValueError("the learning rate is wrong") if wrong else KeyError("missing")


if __name__ == "__main__":
    main.run_stage("train", fail)
