# Everything here needs Python >= 3.11, git and make; `make` alone lists what it can do.
PYTHON ?= python3
ARGS ?=
FOLDER ?= results/rehearsal
# As they were typed: neither make nor a shell shall run what is in them.
override NAME := $(value NAME)
override FOLDER := $(value FOLDER)
export NAME FOLDER

VENV := .venv
STAMP := $(VENV)/.installed
# `shell:` rules call `python` by name, so the environment's own comes first on the PATH.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
LOCKED := -r requirements.txt -c constraints.txt
UNLOCKED := --no-deps -r requirements-nodeps.txt -e .

# Busy-waiting OpenMP threads of parallel jobs would steal each other's cores.
export OMP_WAIT_POLICY ?= passive
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false

# Nor would a machine that forbids compiled modules compile torch and diffusers anew in every job.
unexport PYTHONDONTWRITEBYTECODE

# Without it every look-up of a model that is not cached retries for many seconds.
all reference test test-slurm torture: export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup all reference test test-slurm torture ui new-method shapes-weights lint lock judge rehearsal constraints audit

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Install the locked dependencies and this project into .venv

all: $(STAMP)  ## Run the whole workflow; pass snakemake's options with ARGS='-n'
	$(RUN) snakemake all $(ARGS)

reference: $(STAMP)  ## Five seeds of everything (hours), kept in results/reference/
	$(RUN) snakemake all --config scale=shapes seeds=5 $(ARGS)
	mkdir -p results/reference
	set -e; for kept in tables figures provenance; do \
		rm -rf results/reference/$$kept; cp -R results/shapes/$$kept results/reference/; \
	done
	cp results/shapes/claims.md results/shapes/claims.json results/reference/

# A file's tests stay in one process, which share what they set up.
test: $(STAMP)  ## Run the tests on two cores; pass pytest's options with ARGS='-k NAME'
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --ignore=tests/slurm $(ARGS)

test-slurm: $(STAMP)  ## Run the workflow on a Slurm of this machine's own (root; slurm-wlm, munge)
	$(RUN) OMP_NUM_THREADS=1 python -m pytest tests/slurm $(ARGS)

torture: $(STAMP)  ## Try every fault often (minutes); ARGS='--reliability FILE' keeps the table
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --torture tests/slurm tests/torture $(ARGS)

ui: $(STAMP)  ## Browse the tracked runs with MLflow on 127.0.0.1
	$(RUN) python -m tafs.tracking.cli ui $(ARGS)

new-method: $(STAMP)  ## Write a method that runs as it stands: make new-method NAME=my_method
	$(RUN) python -m tafs.methods.template "$$NAME"

shapes-weights: $(STAMP)  ## Pretrain the shipped models of the embedded world again
	$(RUN) python -m tafs.shapes.pretrain all $(ARGS)

lint: $(STAMP)  ## Check style, types and the workflow
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) snakefmt --check workflow
	$(RUN) snakemake --lint

lock: $(STAMP)  ## Pin the paper scale's models in resources.lock.yaml (network; HF_TOKEN)
	$(RUN) HF_HUB_OFFLINE=0 python -m tafs.assets.download lock $(ARGS)

judge: .venv-judge/.installed  ## Install UnifiedReward's server into .venv-judge (CUDA)

rehearsal: $(STAMP)  ## Run the paper's whole graph on tiny random checkpoints: make rehearsal FOLDER=...
	$(RUN) python tests/tiny_hub.py "$$FOLDER" $(ARGS)

# --universal: one lock for every platform; the CUDA packages apply only where torch asks for them.
constraints:  ## Resolve requirements.txt again and rewrite constraints.txt (needs uv)
	uv pip compile --universal --fork-strategy fewest --python-version 3.11 --upgrade --quiet \
		--custom-compile-command 'make constraints' requirements.txt --output-file constraints.txt

# --strict: a package of which the service knows nothing counts as a failure, not as safe.
audit:  ## Look the locked packages up among the known vulnerabilities (network)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

# uv ignores pip's configuration: where pip is told to look for local wheels, uv has to be told too.
$(STAMP): requirements.txt requirements-nodeps.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...' >&2; exit 1; }
	@set -e; \
	if command -v uv >/dev/null; then \
		links=$$($(PYTHON) -m pip config list 2>/dev/null | sed -n "s/.*find-links='\(.*\)'$$/\1/p" | sort -u); \
		flags=; for link in $$links; do flags="$$flags --find-links $$link"; done; \
		set -x; \
		uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV); \
		uv pip install --quiet --python $(VENV)/bin/python $$flags $(LOCKED); \
		uv pip install --quiet --python $(VENV)/bin/python $(UNLOCKED); \
	else \
		set -x; \
		$(PYTHON) -m venv $(VENV); \
		$(VENV)/bin/python -m pip install --quiet $(LOCKED); \
		$(VENV)/bin/python -m pip install --quiet $(UNLOCKED); \
	fi
	@touch $@

# The server brings its own torch: it cannot share an environment with the rest.
.venv-judge/.installed: workflow/envs/unifiedreward.txt
	$(PYTHON) -m venv .venv-judge
	.venv-judge/bin/python -m pip install --quiet -r $<
	@touch $@
