"""Metrics behind a server: `python -m tafs.evaluation.served RUN_DIR` scores the images of an evaluation.

The command of the environment variable TAFS_SERVER is started on a free port of 127.0.0.1 and
stopped at the end. Reads images.zip and writes served_scores.parquet, in the layout of scores.parquet.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket

import pandas as pd

from tafs.assets import cache
from tafs.common import errors
from tafs.evaluation import image_archive
from tafs.evaluation import scores as scores_
from tafs.rewards import golden, unifiedreward
from tafs.rewards.metrics import RESOURCES, SERVED
from tafs.runtime import checkpoint, run_dir
from tafs.runtime import main as main_
from tafs.runtime.progress import Reporter

START_TIMEOUT_S = 1800  # a 7B model is read from disk and compiled
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
AT_ONCE = 64  # images in flight


@contextmanager
def serving(command: Sequence[str], folder: Path, log: Path) -> Iterator[str]:
    """The server's address, as long as the block lasts.

    Args:
        command: {folder} and {port} are filled in.
        log: what it says.

    Raises:
        failures.RunFailed: it did not start, or ended early; with its last line.
    """
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    filled = [part.format(folder=folder, port=port) for part in command]
    url = f"http://127.0.0.1:{port}"
    with log.open("w+b") as output:
        try:
            server = subprocess.Popen(
                filled,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise errors.RunFailed(f"{filled[0]}: cannot be started ({error.strerror})") from None
        try:
            try:
                unifiedreward.wait_ready(url, START_TIMEOUT_S, alive=lambda: server.poll() is None)
            except errors.RunFailed as error:
                output.seek(0)
                said = output.read()[-2000:].decode(errors="replace").strip().splitlines()
                raise errors.RunFailed(f"{error}; it said: {said[-1] if said else ''}") from None
            yield url
        finally:
            _end(server, signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                _end(server, signal.SIGKILL)
                server.wait()


def _end_with_parent() -> None:
    """Have the kernel end this process where the one that started it is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(server: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """The server and the processes that it has started, as far as they are still there."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, how)


@contextmanager
def served(run: run_dir.RunDir, images: int) -> Iterator[unifiedreward.UnifiedReward]:
    """The reward behind the server of TAFS_SERVER, for so many images, while the block lasts."""
    lock = Path(run.description["settings"]["lock"])
    folders = [cache.path(resource, lock) for resource in RESOURCES[SERVED]]
    with serving(_command(), folders[0], run.folder / "server.log") as url:
        yield unifiedreward.UnifiedReward(url, images=images)


def _command() -> list[str]:
    """The server's command, a JSON list: the workflow takes it from config.yaml."""
    try:
        command = json.loads(os.environ.get("TAFS_SERVER", ""))
    except ValueError:
        command = None
    if not isinstance(command, list) or not all(isinstance(part, str) for part in command):
        raise ValueError(
            "TAFS_SERVER: holds no command as a JSON list; snakemake sets it from "
            "evaluation.server in config.yaml"
        )
    return command


def score_served(run: run_dir.RunDir) -> None:
    """Write the run's served_scores.

    Raises:
        FileNotFoundError: the run has no images; names the file.
        failures.RunFailed: the server failed, left too many images without a score, or fails its golden scores.
    """
    evaluation, prompts, world = run.evaluation, run.test_prompts(), run.world
    total = sum(s["images_per_prompt"] for s in evaluation["settings"]) * len(prompts)
    reporter = Reporter(run.folder, "score_served", total)
    rows = []
    with served(run, total) as scorer:
        reward = scorer.reward()
        if world.golden_scores is not None:
            golden.verify(
                [reward], {reward.name: world.reward_digest(reward.name)}, world.golden_scores
            )
        for keys, batch in image_archive.read(run.images, AT_ONCE):
            image_prompts = [prompts[key.prompt] for key in keys]
            scores = reward.report(reward.score(batch, image_prompts))
            rows += [
                {**key._asdict(), "tag": owner.tag, "metric": reward.name, "value": value}
                for key, owner, value in zip(
                    keys, image_prompts, scores.double().tolist(), strict=True
                )
            ]
            reporter.advance(steps=len(keys))
        print(json.dumps(scorer.record()))
    scores_.write_table(run, run.served_scores, pd.DataFrame(rows))
    checkpoint.clear(run.judged)
    reporter.finish()


def main() -> None:
    main_.run_stage("score_served", score_served)


if __name__ == "__main__":
    main()
