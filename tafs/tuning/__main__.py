"""The command: `python -m tafs.tuning`."""

from __future__ import annotations

import argparse

from tafs import experiment
from tafs.common import errors
from tafs.runtime.main import limit_threads
from tafs.tuning.search import search


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the methods' hyperparameters.")
    parser.add_argument("--scale", help="default: config.yaml's")
    parser.add_argument("--results", help="default: config.yaml's")
    parser.add_argument("--only", metavar="METHOD", help="search one method only")
    options = parser.parse_args()
    given = {"scale": options.scale, "results": options.results}
    overrides = {key: value for key, value in given.items() if value is not None}

    def work() -> None:
        limit_threads()
        search(experiment.load(overrides), options.only)

    errors.run_cli("tune", work)


if __name__ == "__main__":
    main()
