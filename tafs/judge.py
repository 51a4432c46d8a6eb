"""Metrics behind a server: `python -m tafs.judge RUN_DIR` scores the images of an evaluation.

The command that evaluation.json names is started on a free port of 127.0.0.1 and stopped at the
end. Reads images.zip and writes judgements.parquet, in the layout of scores.parquet.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from tempfile import TemporaryFile

import pandas as pd

from tafs import evaluate, failures, images, resources, rundir
from tafs.progress import Reporter
from tafs.rewards import SERVED, canary, unifiedreward
from tafs.rewards.registry import Reward

START_TIMEOUT_S = 1800  # a 7B model is read from disk and compiled


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[str]:
    """The server's address, as long as the block lasts.

    Args:
        command: {folder} and {port} are filled in.

    Raises:
        failures.RunFailed: it did not start, or ended early; with its last line.
    """
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    filled = [part.format(folder=folder, port=port) for part in command]
    url = f"http://127.0.0.1:{port}"
    with TemporaryFile() as output:
        try:
            server = subprocess.Popen(filled, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise failures.RunFailed(f"{filled[0]}: cannot be started ({error.strerror})") from None
        try:
            try:
                unifiedreward.wait_ready(url, START_TIMEOUT_S, alive=lambda: server.poll() is None)
            except failures.RunFailed as error:
                output.seek(0)
                said = output.read()[-2000:].decode(errors="replace").strip().splitlines()
                raise failures.RunFailed(f"{error}; it said: {said[-1] if said else ''}") from None
            yield url
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@contextmanager
def served(run: rundir.RunDir) -> Iterator[Reward]:
    """The reward behind the server that evaluation.json names, as long as the block lasts."""
    folder = resources.path(SERVED, Path(run.description["settings"]["lock"]))
    with serving(run.evaluation["server"], folder) as url:
        yield unifiedreward.UnifiedReward(url).reward()


def judge(run: rundir.RunDir) -> None:
    """Write the run's judgements.

    Raises:
        FileNotFoundError: the run has no images; names the file.
        failures.RunFailed: the server failed, left too many images without a score, or fails its
            canary.
    """
    evaluation, prompts, world = run.evaluation, run.test_prompts(), run.world
    per_prompt = sum(setting["images_per_prompt"] for setting in evaluation["settings"])
    reporter = Reporter(run.folder, "judge", per_prompt * len(prompts))
    rows = []
    with served(run) as reward:
        if world.canary is not None:
            canary.verify([reward], {reward.name: world.reward_digest(reward.name)}, world.canary)
        for keys, batch in images.read(run.images, evaluation["batch"]):
            owners = [prompts[key.prompt] for key in keys]
            scores = reward.report(reward.score(batch, owners))
            rows += [
                {**key._asdict(), "tag": owner.tag, "metric": reward.name, "value": value}
                for key, owner, value in zip(keys, owners, scores.double().tolist(), strict=True)
            ]
            reporter.advance(steps=len(keys))
    evaluate.write_table(run, run.judgements, pd.DataFrame(rows))
    reporter.finish()


def main() -> None:
    rundir.run_stage("judge", judge)


if __name__ == "__main__":
    main()
