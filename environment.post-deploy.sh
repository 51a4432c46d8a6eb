#!/usr/bin/env bash
# Complete the environment of environment.yml. `snakemake --sdm conda` runs a copy of this script in
# the new environment, from the folder in which snakemake was called.
set -euo pipefail

if [ ! -f pyproject.toml ] || [ ! -d tafs ]; then
    echo "$PWD is not the folder of the project; call snakemake or this script there" >&2
    exit 1
fi
# The pins of requirements-nodeps.txt: conda's list for pip cannot say --no-deps.
python -m pip install --quiet --no-deps axe-playwright-python==0.1.8 hpsv2==1.2.0 image-reward==1.5
# The project itself; environment.yml holds its dependencies.
python -m pip install --quiet --no-deps --editable .
