"""Whether two results folders hold the same science: python benchmarks/same_results.py A B

Compares the tensors of adapters, snapshots and samples, the scores of every image, and the numbers
of every table except times. Prints each difference and exits with 1 if there is one. A change of
code that should change no result is checked by running one scale before and after it:

    snakemake all --config scale=smoke results=before     # at the old commit
    snakemake all --config scale=smoke results=after      # at the new commit
    python benchmarks/same_results.py before/smoke after/smoke
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import load_file

from tafs.common.files import check_readable

TIMES = "_s"  # suffix of the columns of tables that hold seconds


def differences(a: Path, b: Path) -> Iterator[str]:
    """One line per file of either folder that is missing or different in the other."""
    patterns = ("runs/**/*.safetensors", "runs/*/*.parquet", "tables/*.csv")
    names = {f.relative_to(x) for x in (a, b) for p in patterns for f in x.glob(p)}
    if not names:
        raise ValueError(f"{a}: contains no results; give the folder of a scale")
    for name in sorted(names):
        missing = [str(folder) for folder in (a, b) if not (folder / name).is_file()]
        if missing:
            yield f"{name}: missing in {missing[0]}"
        elif not _same(a / name, b / name):
            yield f"{name}: differs"


def _same(a: Path, b: Path) -> bool:
    if a.suffix == ".safetensors":
        left, right = _tensors(a), _tensors(b)
        return left.keys() == right.keys() and all(
            np.array_equal(left[key], right[key]) for key in left
        )
    read = pd.read_parquet if a.suffix == ".parquet" else pd.read_csv
    tables = [read(file) for file in (a, b)]
    tables = [t[[c for c in t if a.suffix == ".parquet" or not c.endswith(TIMES)]] for t in tables]
    return bool(tables[0].equals(tables[1]))


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors; an adapter's B with the factor alpha / rank of its header.

    Version 0.1.0 left that factor to the program that loads the adapter.
    """
    check_readable(file)
    with safe_open(file, "numpy") as stored:
        header = json.loads((stored.metadata() or {}).get("lora_adapter_metadata", "{}"))
    scale = header["transformer.lora_alpha"] / header["transformer.r"] if header else 1
    tensors = load_file(file)
    return {key: x * scale if "lora_B" in key else x for key, x in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether two folders hold the same results.")
    parser.add_argument("folders", nargs=2, type=Path, metavar="results/SCALE")
    try:
        found = list(differences(*parser.parse_args().folders))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(found) or "the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
