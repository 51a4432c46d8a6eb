# Everything here needs Python >= 3.11, git and make; `make` alone lists the targets.
PYTHON ?= python3
ARGS ?=
FOLDER ?= results/rehearsal
# Taken literally: neither make nor a shell expands what these variables hold.
override NAME := $(value NAME)
override FOLDER := $(value FOLDER)
export NAME FOLDER

VENV := .venv
STAMP := $(VENV)/.installed
# `shell:` rules call `python` by name, so the environment comes first on the PATH.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

# Busy-waiting OpenMP threads of parallel jobs would take each other's cores.
export OMP_WAIT_POLICY ?= passive
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false

# Without compiled modules on disk every job would compile torch and diffusers again.
unexport PYTHONDONTWRITEBYTECODE

# When the hub cannot be reached, each look-up of an uncached model retries for many seconds.
all reference test test-slurm torture: export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup all reference test test-slurm torture lint ui new-method new-reward new-prompts \
	new-model shapes-weights words-weights lock judge judge-vllm rehearsal schema constraints audit docs

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Install the locked dependencies and this project into .venv

all: $(STAMP)  ## Run the whole workflow; pass options of snakemake with ARGS='-n'
	$(RUN) snakemake all $(ARGS)

reference: $(STAMP)  ## Run the kept embedded scales (hours); update results/reference/
	$(RUN) snakemake all --config scale=shapes-long $(ARGS)
	$(call keep,shapes-long,results/reference)
	cp results/shapes-long/claims.md results/shapes-long/claims.json results/reference/
	$(RUN) snakemake all --config scale=field $(ARGS)
	$(call keep,field,results/reference/field)
	$(RUN) snakemake all --config scale=words seeds=8 $(ARGS)
	$(call keep,words,results/reference/words)

# Copy a scale's tables, figures, provenance and, if it is small, its page to a folder.
define keep
mkdir -p $(2)
set -e; for kept in tables figures provenance; do \
	rm -rf $(2)/$$kept; cp -R results/$(1)/$$kept $(2)/; \
done
rm -rf $(2)/report
kb=$$(du -sk results/$(1)/report | cut -f1); if [ "$$kb" -lt 5120 ]; then \
	cp -R results/$(1)/report $(2)/; echo "$(2)/report/: copied, $$kb KB"; \
else echo "$(2)/report/: not copied, $$kb KB; only a page under 5120 KB is kept"; fi
endef

# The tests of one file share fixtures, so they run in one process.
test: $(STAMP)  ## Run the tests in two processes; pass options of pytest with ARGS='-k NAME'
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --ignore=tests/slurm $(ARGS)

test-slurm: $(STAMP)  ## Run the workflow on a local Slurm cluster (root; slurm-wlm, munge)
	$(RUN) OMP_NUM_THREADS=1 python -m pytest tests/slurm $(ARGS)

torture: $(STAMP)  ## Repeat every fault many times (an hour); ARGS='--reliability FILE' writes a table
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --torture tests/slurm tests/faults $(ARGS)

lint: $(STAMP)  ## Check style, types, spelling, layers and the workflow
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) codespell
	$(RUN) snakefmt --check workflow
	$(RUN) snakemake --lint

ui: $(STAMP)  ## Browse the tracked runs with MLflow on 127.0.0.1
	$(RUN) python -m tafs.tracking.cli ui $(ARGS)

new-method: $(STAMP)  ## Write a method that runs unchanged: make new-method NAME=my_method
	$(RUN) tafs new method -- "$$NAME"

new-reward: $(STAMP)  ## Write a reward that runs unchanged: make new-reward NAME=my_reward
	$(RUN) tafs new reward -- "$$NAME"

new-prompts: $(STAMP)  ## Write a prompt set that loads unchanged: make new-prompts NAME=my_prompts
	$(RUN) tafs new prompts -- "$$NAME"

new-model: $(STAMP)  ## Write a model that runs unchanged: make new-model NAME=my-model
	$(RUN) tafs new model $(ARGS) -- "$$NAME"

shapes-weights: $(STAMP)  ## Train the shipped models of the embedded scale again (hours)
	$(RUN) python -m tafs.shapes.pretrain all $(ARGS)

words-weights: $(STAMP)  ## Train the shipped models of the words world again (an hour); ARGS='--cycle N' resumes
	$(RUN) python -m tafs.words.pretrain all $(ARGS)

lock: $(STAMP)  ## Pin the models of the scales paper and one-gpu in resources.lock.yaml (network; HF_TOKEN)
	$(RUN) HF_HUB_OFFLINE=0 python -m tafs.assets.download lock $(ARGS)

judge: .venv-judge/.installed  ## Install the server of UnifiedReward into .venv-judge (CUDA)

judge-vllm: .venv-judge-vllm/.installed  ## Install the server of UnifiedReward-2.0 and GenEval 2 into .venv-judge-vllm (CUDA)

rehearsal: $(STAMP)  ## Run a scale on tiny random checkpoints: make rehearsal FOLDER=... [ARGS='--scale one-gpu']
	$(RUN) python tests/support/tiny_hub.py "$$FOLDER" $(ARGS)

# Docstrings are read without an import, so the site needs none of the project's packages.
docs: .venv-docs/.installed  ## Build the documentation site in build/docs; a dead link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS)

schema: $(STAMP)  ## Write the JSON Schema of config.yaml for editors
	$(RUN) python -m tafs.experiment.json_schema > workflow/schemas/config.schema.json.new
	mv workflow/schemas/config.schema.json.new workflow/schemas/config.schema.json

# --universal locks for all platforms; the CUDA packages apply only where torch asks for them, so
# environment.yml leaves them to torch.
constraints:  ## Lock the dependencies, those of the judges' servers too (needs uv); ARGS=--upgrade
	uv pip compile --universal --fork-strategy fewest --python-version 3.11 --quiet \
		--custom-compile-command 'make constraints' --extra test $(ARGS) pyproject.toml --output-file constraints.txt
	{ sed '/^  - pip:/q' environment.yml; \
		sed -n '/^nvidia-/d; /^cuda-/d; /^triton/d; s/^[a-z0-9]/      - &/p' constraints.txt; } > environment.yml.new
	mv environment.yml.new environment.yml
	for judge in unifiedreward vllm; do \
		uv pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_34 --quiet --no-annotate \
			--custom-compile-command 'make constraints' $(ARGS) \
			workflow/envs/$$judge.in --output-file workflow/envs/$$judge.txt || exit; \
	done

# --strict: a package that the service does not know counts as a failure.
audit:  ## Look up known vulnerabilities of the locked packages (network)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

# uv does not read pip's configuration, so pip's folders of local wheels are passed on.
$(STAMP): requirements.txt requirements-nodeps.txt constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...' >&2; exit 1; }
	@set -e; \
	if command -v uv >/dev/null; then \
		links=$$($(PYTHON) -m pip config list 2>/dev/null | sed -n "s/.*find-links='\(.*\)'$$/\1/p" | sort -u); \
		flags=; for link in $$links; do flags="$$flags --find-links $$link"; done; \
		set -x; \
		uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV); \
		uv pip install --quiet --python $(VENV)/bin/python $$flags -r requirements.txt; \
		uv pip install --quiet --python $(VENV)/bin/python --no-deps -r requirements-nodeps.txt; \
	else \
		set -x; \
		$(PYTHON) -m venv $(VENV); \
		$(VENV)/bin/python -m pip install --quiet -r requirements.txt; \
		$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements-nodeps.txt; \
	fi
	@touch $@

# The server needs its own torch, hence its own environment.
.venv-judge/.installed: workflow/envs/unifiedreward.txt
	$(PYTHON) -m venv .venv-judge
	.venv-judge/bin/python -m pip install --quiet -r $<
	@touch $@

.venv-judge-vllm/.installed: workflow/envs/vllm.txt
	$(PYTHON) -m venv .venv-judge-vllm
	.venv-judge-vllm/bin/python -m pip install --quiet -r $<
	@touch $@

.venv-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r $<
	@touch $@
