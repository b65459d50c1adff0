# Set-up and the commands that the README names. Everything happens in .venv, with the versions in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PEERS ?= ../peers
SEED ?= 0

# The oldest and the newest release of transformers that are supported, and the tests that run with them: the families'
# parity, generation, runs that continue others, verify, mixers, what is derived, and all that touches transformers. Left
# out are those that take long and say little of a release. torch is 2.13.0 throughout: the index has its other releases
# only with several gigabytes of CUDA.
OLDEST := 5.20.0
NEWEST := 5.24.0
CORE := tests/parity tests/unit/hf \
	$(patsubst %,--ignore=tests/parity/test_%.py,adapt cache_plan cache_tools copies hybrids orthogonalized peft \
		structure_layers structure_layouts structure_mixing structure_parts structure_wiring structure_woven sweep_zoo \
		wrong_adapters)

# What make cover runs: the unit tests, and those of what is only tried on whole models.
TRACED := tests/unit tests/messages $(wildcard $(addprefix tests/parity/test_,structure*.py mixer*.py streams.py))

# One thread a worker: tiny models are fastest so. A worker that is done takes tests from one that is not.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

# Libraries that take the bridge: folders of tests/clients.
CLIENTS := $(patsubst tests/clients/%/requirements.txt,%,$(wildcard tests/clients/*/requirements.txt))

.PHONY: demo test check ci untraced slow zoo cover processors brute browser wheel site mutants clients oldest newest format notebooks train bench bench-check bench-peers clean

demo: .venv/demo
	$(BIN)/clearspan report --model tiny-bigcode --file src/clearspan/models/snippet.py.txt --out report.html
	@echo "The interactive page is in report.html"

test: .venv/dev
	$(PYTEST) --ignore=tests/brute --ignore=tests/model_types -m "not slow"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# All tiers but make clients, with the minutes that each takes. What make test runs is in cover, untraced, processors and
# browser.
ci: .venv/dev
	.ci/tiers check cover untraced oldest newest slow zoo processors brute browser wheel site bench-check

# The tests of make test that none of cover, processors and browser runs.
untraced: .venv/dev
	$(PYTEST) $(addprefix --ignore=,tests/brute tests/model_types tests/docs $(TRACED)) -m "not slow and not browser"

# Each architecture verified in full, its gradients against numeric ones, grids of sweeps on it; and every public function
# with wrong arguments. What documents show is run by make processors.
slow: .venv/dev
	$(PYTEST) --ignore=tests/brute --ignore=tests/docs -m slow

# A tiny random model of each type that transformers maps to a causal language model, verified in full.
zoo: .venv/dev
	$(PYTEST) tests/model_types -m zoo

# The unit tests, and how much of the code they reach. Tests that are traced take almost twice as long.
cover: .venv/dev
	$(PYTEST) $(TRACED) -m "not slow and not browser" --cov --cov-report=term:skip-covered --cov-fail-under=90
	$(BIN)/coverage report --include='src/clearspan/architectures/*,src/clearspan/conversions/*' --fail-under=100

# What documents show and analyses find, on processors that compute other last digits.
processors: .venv/dev
	.ci/processors

# Against plain transformers and torch hooks, drawn at random: make brute SEED=7 draws others than ci does.
brute: .venv/dev
	SEED=$(SEED) $(PYTEST) tests/brute

# Pages in a browser, which is installed where there is none.
browser: .venv/dev
	.ci/browser

# The wheel, from a file, in an environment that has nothing else.
wheel: .venv/dev
	.ci/wheel

# The pages of docs/ as a site, in site/. A link that leads nowhere fails.
site: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What takes the bridge, with the minutes of each: each has what it needs in front of what is installed in .venv.
clients: .venv/dev
	.ci/tiers $(addprefix client-,$(CLIENTS))

client-%: .venv/clients/%/site-packages
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest --confcutdir=tests/clients \
		--disable-warnings -W default tests/clients/$*

oldest: .venv/releases/$(OLDEST)
	$(call core,$(OLDEST))

newest: .venv/releases/$(NEWEST)
	$(call core,$(NEWEST))

# Runs the core with a release of transformers, in front of the one that is installed.
core = export PYTHONPATH=$(CURDIR)/.venv/releases/$(1); \
	$(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(1)", t.__version__' && \
	$(PYTEST) $(CORE) -m "not slow"

# Every entry of every adapter dropped or changed: how many of these wrong adapters verify catches. It takes an hour.
mutants: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation.score

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Executes the notebooks and draws their figures, with Chromium or Chrome.
notebooks: .venv/dev
	$(BIN)/python docs/notebooks.py

# Kept allocations make a training step on a CPU half as long again faster.
train: .venv/demo
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(BIN)/python training/train.py

bench: .venv/demo
	for subject in overhead sweeps attribution memory imports; do $(BIN)/python benchmarks/$$subject.py || exit 1; done

bench-check: .venv/demo
	$(BIN)/python benchmarks/check.py

# Beside the libraries of others, in an environment of their own.
bench-peers: $(PEERS)/installed
	$(PEERS)/bin/python benchmarks/peers/compare_transformer_lens.py
	$(PEERS)/bin/python benchmarks/peers/compare_names.py
	TQDM_DISABLE=1 $(PEERS)/bin/python benchmarks/peers/two_lines.py
	TQDM_DISABLE=1 $(PEERS)/bin/python benchmarks/beside_peers.py

$(PEERS)/installed: constraints.txt benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

# torch goes first, by its exact version, so that no other package asks for another build of it.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	@touch $@

# transformers alone: what it needs is installed, and it says so when it is imported if a version does not fit.
.venv/releases/%: | .venv/dev
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part transformers==$*
	mv $@.part $@

# Under a folder of this name, because `datasets` writes a package that lies elsewhere into its fingerprints.
.venv/clients/%/site-packages: tests/clients/%/requirements.txt | .venv/dev
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part -r $<
	mv $@.part $@
	@touch $@

clean:
	rm -rf .venv .coverage .pytest_cache .ruff_cache .hypothesis report.html
