"""Scores from a chat server: `python -m tafs.evaluation.served RUN_DIR` scores a run's images.

The server's command comes from the environment variable TAFS_SERVER: a JSON list of strings, or one
for each metric. The server is started on a
free port of 127.0.0.1 and stopped at the end. served_scores.parquet has the layout of
scores.parquet. A job that was killed continues after the last batch that RUN_DIR/.eval_state/
served.jsonl holds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from socket import socket
from typing import Self

import pandas as pd
from torch import Tensor

from tafs.assets.sources import AssetSource
from tafs.common import errors
from tafs.data.prompts import Prompt
from tafs.evaluation import image_archive, scores
from tafs.experiment import needs, run_inputs
from tafs.rewards import golden, metrics
from tafs.rewards.chat import ChatJudge, wait_ready
from tafs.rewards.registry import check_images
from tafs.runtime import checkpoint, journal, receipts
from tafs.runtime.main import end_with_parent, run_stage
from tafs.runtime.progress import Reporter
from tafs.runtime.receipts import Needs
from tafs.runtime.run_dir import RunDir

START_TIMEOUT_S = 1800  # reading and compiling a 7B model
STOP_TIMEOUT_S = 30
BATCH = 64  # images whose scores are saved together


@contextmanager
def serving(command: Sequence[str], folder: Path, log: Path) -> Iterator[str]:
    """Run a server inside the block; yield its URL.

    Args:
        command: {folder} and {port} in it are replaced.
        folder: the model's files.
        log: the file for the server's output; errors quote its last line.

    Raises:
        ValueError: the command has other placeholders.
        RunFailed: the server does not start.
    """
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        filled = [part.format(folder=folder, port=port) for part in command]
    except (ValueError, LookupError, AttributeError):
        raise ValueError(
            f"the server's command {errors.shown(command)}: has braces other than those of "
            "{folder} and {port}; double them"
        ) from None
    url = f"http://127.0.0.1:{port}"
    with log.open("w+b") as out:
        try:
            server = subprocess.Popen(
                filled, stdout=out, stderr=out, start_new_session=True, preexec_fn=end_with_parent
            )
        except OSError as error:
            raise errors.RunFailed(f"{filled[0]}: cannot be started ({error.strerror})") from None
        try:
            try:
                wait_ready(url, START_TIMEOUT_S, alive=lambda: server.poll() is None)
            except errors.RunFailed as error:
                out.seek(0)
                lines = out.read()[-2000:].decode(errors="replace").strip().splitlines()
                last = errors.one_line(lines[-1]) if lines else ""
                raise errors.RunFailed(f"{error}; its last line in {log}: {last}") from None
            yield url
        finally:
            _signal_group(server, signal.SIGTERM)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _signal_group(server, signal.SIGKILL)
                server.wait()


def _signal_group(server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the server and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, number)


@contextmanager
def client(name: str, source: AssetSource, images: int, log: Path) -> Iterator[ChatJudge]:
    """The client of a metric's server, which runs inside the block and scores `images` images.

    Raises:
        ValueError: no metric with a server, or TAFS_SERVER has no command of it.
        RunFailed: the server does not start.
    """
    plugin = metrics.plugin(name)
    if plugin.connect is None:
        raise ValueError(f"reward {name!r}: its plug-in has no `connect`, which finds its server")
    folders = [source.folder(resource) for resource in plugin.metric.resources]
    with serving(_command(name), folders[0], log) as url:
        yield plugin.connect(url, source.folder, images)


def served_reward(run: RunDir, images: int) -> AbstractContextManager[ChatJudge]:
    """The client of a run's judge; see `client`."""
    name, source = (
        run_inputs.eval_spec(run).judge,
        run_inputs.asset_source(run_inputs.run_spec(run)),
    )
    return client(name, source, images, run.folder / "server.log")


def _command(name: str) -> list[str]:
    """The command of a metric's server from TAFS_SERVER."""
    try:
        command = json.loads(os.environ.get("TAFS_SERVER", ""))
    except ValueError:
        command = None
    if isinstance(command, dict) and command:
        if name not in command:
            raise ValueError(
                f"TAFS_SERVER: has no command of {name!r}; give it in evaluation.judges of the "
                "scale in config.yaml"
            )
        command = command[name]
    if not command or not isinstance(command, list) or {*map(type, command)} != {str}:
        raise ValueError(
            "TAFS_SERVER: not a command as a JSON list of strings; snakemake sets it from "
            "evaluation.server in config.yaml"
        )
    return command


def needs_of(run: RunDir) -> Needs:
    """What the run's served scores depend on."""
    return needs.served(run, run_inputs.run_spec(run), run_inputs.eval_spec(run))


def score_served(run: RunDir) -> None:
    """Write the run's served_scores.parquet.

    Raises:
        RunFailed: the server failed, left too many images without a score, or does not reproduce
            its golden scores.
    """
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    own = needs_of(run)
    prompts, source = run_inputs.test_prompts(spec, evaluation), run_inputs.asset_source(spec)
    total = sum(s.images_per_prompt for s in evaluation.settings) * len(prompts)
    reporter = Reporter(run.folder, "score_served", total)
    done = _Scored.read(run, own)
    reporter.advance(steps=len(done.values))
    with served_reward(run, total) as client:
        reward = client.reward()
        if source.golden_scores is not None:
            digests = {reward.name: source.reward_digest(reward.name)}
            golden.record([reward], digests, source.golden_scores)
        client.asked, client.missing = len(done.values), Counter(done.missing)
        for found in client.stream(_asked(run, prompts, reward.name, len(done.values))):
            values = reward.report(found).double().tolist()
            done.add(values, client.missing)
            reporter.advance(steps=len(values))
        print(json.dumps(reward.record()))
    keys = image_archive.keys(run.images)
    rows = [
        {**key._asdict(), "tag": prompts[key.prompt].tag, "metric": reward.name, "value": value}
        for key, value in zip(keys, done.values, strict=True)
    ]
    with receipts.replacing(run.folder, "score_served", own, [run.served_scores]):
        scores.write_table(run, spec, run.served_scores, pd.DataFrame(rows))
    checkpoint.clear(run.eval_state)
    reporter.finish()


def _asked(
    run: RunDir, prompts: Sequence[Prompt], name: str, first: int
) -> Iterator[tuple[Tensor, list[Prompt]]]:
    """The run's images from `first` on, in batches, with their prompts."""
    for keys, images in image_archive.read(run.images, BATCH, first=first):
        image_prompts = [prompts[key.prompt] for key in keys]
        yield check_images(name, images, image_prompts), image_prompts


class _Scored:
    """The scores of the first images of a run's archive, which outlast a killed job."""

    def __init__(self, file: Path, values: list[float], missing: Mapping[str, int]) -> None:
        self.journal, self.values, self.missing = journal.Journal(file), values, missing

    @classmethod
    def read(cls, run: RunDir, own: Needs) -> Self:
        """What an earlier job with the same needs has scored."""
        file, fingerprint = run.eval_state / "served.jsonl", receipts.fingerprint(own)
        records = journal.read(file) if file.is_file() else []
        if not records or records[0].get("fingerprint") != fingerprint:
            file.unlink(missing_ok=True)
            found = cls(file, [], {})
            found.journal.append("start", fingerprint=fingerprint)
            return found
        values = [
            math.nan if value is None else value for one in records[1:] for value in one["values"]
        ]
        return cls(file, values, records[-1].get("missing", {}))

    def add(self, values: Sequence[float], missing: Mapping[str, int]) -> None:
        """Keep the scores of the next images; `missing`: how many have none so far, by reason."""
        self.journal.append("scores", values=list(values), missing=dict(missing))
        self.values += values


def main() -> None:
    run_stage("score_served", lambda run, _: score_served(run))


if __name__ == "__main__":
    main()
