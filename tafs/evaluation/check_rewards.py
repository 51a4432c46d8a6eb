"""Checks rewards by their golden scores: `python -m tafs.evaluation.check_rewards RUN_DIR OUT`.

Every reward of the run's asset source scores the golden images. Stored scores must be reproduced;
the scores of new weights are stored. OUT is a JSON record of all of them. See `rewards.golden`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tafs.common import errors, files
from tafs.evaluation import served
from tafs.experiment import needs, run_inputs
from tafs.rewards import golden
from tafs.runtime import gpus, receipts
from tafs.runtime.main import limit_threads
from tafs.runtime.run_dir import RunDir


def check_rewards(run: RunDir, out: Path) -> None:
    """Check or store the golden scores of all rewards; write them to `out`."""
    spec, evaluation = run_inputs.run_spec(run), run_inputs.eval_spec(run)
    source = run_inputs.asset_source(spec)
    file = source.golden_scores
    if file is None:
        raise ValueError(f"{run.folder}: its assets {spec.assets.assets!r} have no golden scores")
    every = needs.checked_metrics(source, evaluation, served=True)
    names = needs.checked_metrics(source, evaluation, served=False)
    rewards = [*source.rewards(names, strict_geneval=True).rewards]
    digests = {name: source.reward_digest(name) for name in names}
    found = golden.record(rewards, digests, file, source.device)
    if evaluation.served:
        with served.served_reward(run, len(golden.PROMPTS)) as client:
            reward = client.reward()
            rewards.append(reward)
            digests = {reward.name: source.reward_digest(reward.name)}
            found |= golden.record([reward], digests, file)
    records = {r.name: {**r.record(), "scores": found[r.name]} for r in rewards}
    own = needs.check_rewards(source, every)
    with receipts.replacing(out.parent, "check_rewards", own, [out]):
        files.atomic_text(out, json.dumps(records, indent=1) + "\n")


def main() -> None:
    if len(sys.argv) != 3:
        print("usage: python -m tafs.evaluation.check_rewards RUN_DIR OUT", file=sys.stderr)
        sys.exit(errors.BAD_INPUT)
    run = RunDir(Path(sys.argv[1]))

    def work() -> None:
        limit_threads()
        if run.device == "cuda":
            gpus.claim(1)
        check_rewards(run, Path(sys.argv[2]))

    errors.run_cli(f"check_rewards {run.folder}", work)


if __name__ == "__main__":
    main()
