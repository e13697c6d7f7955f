# Targets for users and developers; they require make, a POSIX shell and Python 3.11. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-oldest bench chaos fuzz audit lock lint docs format clean

VENV := .venv
BIN := $(VENV)/bin
# Number of test processes, each with one thread.
JOBS ?= 2
# Stamps: everything is installed, or only what the quick start needs.
INSTALLED := $(VENV)/.installed
SMALL := $(VENV)/.installed-small
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Releases with the hashes of their files. `make .venv LOCK=` installs without hashes, for an index with its own files.
LOCK ?= requirements.lock
UV := uv==0.13.9
COMPILE = $(BIN)/uv pip compile --quiet --no-cache --universal --python-version 3.11 --generate-hashes --no-header \
	--no-annotate -c constraints.txt pyproject.toml
# The first interpreter that is new enough, unless PYTHON=... is given.
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

help: ## list the targets
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(INSTALLED) ## create the virtual environment, again only if pyproject.toml or the releases have changed

# $(call install,EXTRAS,FILTER OF THE LOCK)
define install
	@test -n "$(PYTHON)" || { echo "python: no python3.11 or newer was found; install it, or give its path: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCK),$(2) $(LOCK) > $(VENV)/lock.txt && $(PIP) install --quiet --require-hashes -r $(VENV)/lock.txt)
	$(PIP) install --quiet $(if $(LOCK),--no-deps --no-build-isolation -e .,-c constraints.txt -e '.$(1)')
	@touch $@
endef

$(INSTALLED): pyproject.toml constraints.txt $(LOCK)
	$(call install,[dev],cat)

$(SMALL): pyproject.toml constraints.txt $(LOCK)
	$(call install,,awk '/^# Extras/ {exit} 1')

# Where the developer tools are installed already, they stay.
quickstart: $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(SMALL)) ## install, then search, retrain and track a cell on the digits (minutes, no GPU, no download)
	$(BIN)/istanas run --config tune_configs/digits_quickstart.yaml

test: lint ## lint, types, and all tests and doctests, slow ones included; ends with the 30 slowest tests
	$(BIN)/python -m pytest -q -m "slow or not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=30

test-oldest: ## all tests with the oldest releases that pyproject.toml allows, in build/oldest (8 GB); SELECT=PATHS for a part
	@test -n "$(PYTHON)" || { echo "python: no python3.11 or newer was found; install it, or give its path: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet $(UV)
	build/oldest/bin/uv pip install --quiet --python build/oldest/bin/python --resolution lowest-direct -e '.[dev]'
	build/oldest/bin/python -m pytest -q -m "slow or not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(SELECT)

bench: $(INSTALLED) ## speed and memory against a plain reference, as a table and bench.json (13 minutes on 2 cores, otherwise idle)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks

chaos: $(INSTALLED) ## every fault on every job, and a new table in tests/README.md (an hour on 2 cores)
	$(BIN)/python -m tests.chaos -n $(JOBS)

fuzz: $(INSTALLED) ## 100,000 nearly valid genotypes, configurations, checkpoints, sweeps and metrics each (17 minutes on 2 idle cores)
	OMP_NUM_THREADS=1 JOBS=$(JOBS) $(BIN)/python -m tests.security.fuzz

audit: $(INSTALLED) ## known vulnerabilities of the releases in constraints.txt; reports if no database is reachable
	$(BIN)/python .ci/audit.py

lock: $(INSTALLED) ## write a new requirements.lock, after a change of dependencies or of constraints.txt
	$(PIP) install --quiet $(UV)
	@sed '/^[^#]/,$$d' requirements.lock > requirements.lock.new
	@mkdir -p build
	@$(COMPILE) > build/small.lock
	@$(COMPILE) --extra dev > build/whole.lock
	@cat build/small.lock >> requirements.lock.new
	@echo '# Extras and developer tools, which the quick start does not need' >> requirements.lock.new
	@awk 'NR == FNR {known[$$0]; next} /^[^ ]/ {new = !($$0 in known)} new' build/small.lock build/whole.lock >> requirements.lock.new
	@mv requirements.lock.new requirements.lock

# Both runs of mypy at the same time, and each with its own cache, because other options invalidate a cache.
lint: $(INSTALLED) ## ruff (check and format), mypy (strict on istanas) and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict istanas --cache-dir .mypy_cache/strict & \
	$(BIN)/mypy pipeline; pipeline=$$?; wait $$! && exit $$pipeline
	$(BIN)/lint-imports --no-cache

docs: $(INSTALLED) ## build the documentation into build/docs/index.html (half a minute); warnings are errors
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

format: $(INSTALLED) ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build products; runs, MLflow's store and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find istanas pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
