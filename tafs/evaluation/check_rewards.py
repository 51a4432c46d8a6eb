"""check_rewards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tafs.common import errors, files
from tafs.rewards.golden import PROMPTS, record
from tafs.rewards.metrics import METRICS
from tafs.runtime import gpus, run_dir
from tafs.runtime import main as main_


def main() -> None:
    if len(sys.argv) != 3:
        print("usage: python -m tafs.evaluation.check_rewards RUN_DIR OUT", file=sys.stderr)
        sys.exit(2)
    run, out = run_dir.RunDir(Path(sys.argv[1])), Path(sys.argv[2])

    def work() -> None:
        from tafs.assets import sources
        from tafs.evaluation import served

        main_.limit_threads()
        if run.description["settings"]["device"] == "cuda":
            gpus.claim(1)
        world = run.world
        file = world.golden_scores
        if file is None:
            raise ValueError(f"{run.folder}: its asset source has no golden scores")
        names = [n for n in METRICS if any(n in world.metrics(p) for p in sources.PROMPTS["hub"])]
        rewards = [*world.rewards(names, strict_geneval=True).rewards]
        found = record(rewards, {n: world.reward_digest(n) for n in names}, file, world.device)
        if run.evaluation["server"]:
            with served.served(run, len(PROMPTS)) as scorer:
                digest = {scorer.name: world.reward_digest(scorer.name)}
                rewards.append(scorer.reward())
                found |= record(rewards[-1:], digest, file)
        said = {r.name: {**r.record(), "scores": found[r.name]} for r in rewards}
        files.atomic_text(out, json.dumps(said, indent=1) + "\n")

    errors.run_cli(f"check_rewards {run.folder}", work)


if __name__ == "__main__":
    main()
