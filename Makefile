# Every developer command. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A plain python3 that is new enough, else the newest python3.x on PATH.
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	&& echo $$p && break; done),python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.dsv4-maxq
GPU_PYTHON ?= $(PY)
PROFILE ?= cpu-tiny
PORT ?= 8000

.PHONY: help setup demo kernels kernels-report test test-gpu test-docker bench-kernels lint \
	patches-check patches-mutation serve bench bench-compare report eval image up down logs tiny-train clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: ## make .venv: the CPU engine at its pin, patched, and this project
	@echo "setup: with $(PYTHON)"
	@$(PYTHON) scripts/setup_env.py --venv $(VENV)
	@touch $(STAMP)

# The other targets set up when something that setup reads has changed.
CUDA_LOCKS := requirements/nvcc.txt requirements/cuobjdump.txt
$(STAMP): $(filter-out $(CUDA_LOCKS),$(wildcard requirements/*.txt)) patches/vllm.lock \
		$(wildcard patches/series patches/*.patch) pyproject.toml scripts/setup_env.py
	@$(MAKE) setup

demo: $(STAMP) ## lose the tiny model's MTP head, put it back with GPTQ, compare, print a table
	@$(PY) -m bench.demo

# Needs nothing of setup; without nvcc on PATH it installs the one that requirements/nvcc.txt locks.
kernels: ## compile the CUDA kernels into build/kernels
	@$(PYTHON) -m kernels.build --install

kernels-report: kernels ## what each kernel uses: registers, shared memory, loads; fails on a spill
	@$(PYTHON) -m kernels.report --install

# Files side by side; each may start engines of one core and 2 GB.
TEST_WORKERS ?= 2
test: $(STAMP) ## every test that needs no GPU
	@$(PY) -m pytest -q -m "not gpu and not docker" -n $(TEST_WORKERS) --dist loadfile \
		--no-loadscope-reorder $(TEST_FLAGS)

# TESTS=tests/docker/test_image.py leaves out the fleet.
test-docker: $(STAMP) ## build the images with an engine of their own, start them, break them; needs root
	@$(PY) -m pytest -q -m docker $(TESTS)

# On a GPU host vLLM's CUDA wheel is installed otherwise: GPU_PYTHON=python3.
GPU_STAMP := $(if $(filter $(PY),$(GPU_PYTHON)),$(STAMP))
test-gpu: $(GPU_STAMP) kernels ## the tests that need a CUDA device
	@$(GPU_PYTHON) -m pytest -q -m gpu tests/gpu

bench-kernels: $(GPU_STAMP) kernels ## time our kernels beside Marlin on this GPU
	@$(GPU_PYTHON) -m bench.kernels

lint: $(STAMP) ## ruff, formatting, patch headers, README's tables, Dockerfile, compose
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) patches/patchq.py lint
	@$(PY) docker/settings.py --check
	@$(PY) -m bench report --check README.md
	@$(VENV)/bin/hadolint --config docker/hadolint.yaml Dockerfile
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	@$(VENV)/bin/docker-compose --env-file .env.example --profile "*" config --quiet

patches-check: $(STAMP) ## lint the series and compare the installed engine with it
	@$(PY) patches/patchq.py lint
	@$(PY) patches/patchq.py verify --root "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"

patches-mutation: $(STAMP) ## take out each patch in turn: its guard test must fail
	@$(PY) patches/mutation.py $(if $(WITHIN),--within $(WITHIN)) $(if $(BEGIN),--begin $(BEGIN))

serve: $(STAMP) ## serve PROFILE (cpu-tiny) on PORT (8000)
	@$(PY) -m serve run --profile $(PROFILE) --port $(PORT)

# CONTEXT= DEPTH= STREAMS= OUTPUT= MODE= REPEATS= URL= as in docs/bench.md; empty is the default.
# COMPARE_SPECULATIVE=1 starts PROFILE itself, without MTP and then with it, at each of K=1,2,3.
# RESUME= goes on. QUICK=1 asks for less, DRY_RUN=1 for nothing. ENGINE=vllm runs vLLM's own bench.
BENCH_OPTIONS = $(foreach option,context depth streams output mode repeats url api label resume \
	goodput result engine,$(if $($(call upper,$(option))),--$(option) $($(call upper,$(option)))))
upper = $(shell echo $(1) | tr a-z A-Z)
bench: $(STAMP) ## measure a running server: make bench CONTEXT=524k STREAMS=2 [URL=] [MODE=]
	@$(PY) -m bench run $(BENCH_OPTIONS) $(if $(QUICK),--quick) $(if $(DRY_RUN),--dry-run) \
		$(if $(COMPARE_SPECULATIVE),--compare-speculative --profile $(PROFILE)) \
		$(if $(K),--num-speculative-tokens $(K))

bench-compare: $(STAMP) ## exit 1 where HEAD=b.json is worse than BASE=a.json by MAX_REGRESSION (3%)
	@$(PY) -m bench compare $(BASE) $(HEAD) --max-regression $(or $(MAX_REGRESSION),3%)

report: $(STAMP) ## build README's tables from results/
	@$(PY) -m bench report --write README.md

# TASKS= REASONING= LIMIT= STREAMS= URL= CONTEXTS= GSM8K= MMLU= HUMANEVAL= BASE=: see bench eval --help.
# PARITY=1 starts PROFILE itself, without MTP and then with it, or asks OFF_URL= and ON_URL=;
# NUM_PROMPTS= CONTROL_STREAMS= CHECKPOINT= too. RESUME= goes on.
EVAL_OPTIONS = $(foreach option,url model tasks reasoning limit streams contexts depths gsm8k mmlu \
	humaneval label result resume base engine,$(if $($(call upper,$(option))),--$(option) \
	$($(call upper,$(option))))) $(if $(MAX_TOKENS),--max-tokens $(MAX_TOKENS))
PARITY_URLS = $(if $(OFF_URL),--off-url $(OFF_URL)) $(if $(ON_URL),--on-url $(ON_URL))
PARITY_OPTIONS = $(or $(strip $(PARITY_URLS)),--profile $(PROFILE)) \
	$(foreach option,checkpoint streams label result,$(if $($(call upper,$(option))),--$(option) \
	$($(call upper,$(option))))) $(if $(MAX_TOKENS),--max-tokens $(MAX_TOKENS)) \
	$(if $(NUM_PROMPTS),--num-prompts $(NUM_PROMPTS)) \
	$(if $(CONTROL_STREAMS),--control-streams $(CONTROL_STREAMS)) \
	$(if $(URL),$(error eval: PARITY=1 compares two servers: OFF_URL= and ON_URL=, or PROFILE=))
eval: $(STAMP) ## score a running server: make eval [QUICK=1] [URL=] [TASKS=] [BASE=old.json] [PARITY=1]
	@$(PY) -m bench eval $(if $(PARITY),parity $(PARITY_OPTIONS),run $(EVAL_OPTIONS)) \
		$(if $(QUICK),--quick)

TARGET ?= cpu
# Plain python3: these four need Docker, and nothing of setup.
image: ## build the image TARGET (cpu; or gpu, router), list its layers and packages
	@$(PYTHON) docker/image.py $(TARGET) $(if $(LOCK),--lock) $(if $(REPORT),--report $(REPORT))

up: ## start the containers of the profile that fits this machine
	@$(PYTHON) docker/stack.py up $(if $(REPORT),--report $(REPORT))

down: ## stop and remove them; the caches stay
	@$(PYTHON) docker/stack.py down

logs: ## follow their output
	@$(PYTHON) docker/stack.py logs

tiny-train: $(STAMP) ## train the tiny checkpoint again
	@$(PY) -m tiny train

clean: ## remove .venv, caches and demo output
	rm -rf $(VENV) .cache .demo build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
