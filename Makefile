# Needs Python >= 3.10 and make; everything else goes into $(VENV).
#   make PYTHON=python3.12 setup      choose the interpreter
#   make demo IMAGES=~/photos         your own images
#   make test ARGS='-k container'     options for pytest
#   make benchmark ARGS='parts=[quality,report]'    overrides of configs/benchmark.yaml

PYTHON ?= python3
VENV ?= .venv
IMAGES ?=
MODEL ?= nano
OUT ?= demo
ARGS ?=
PIP_FLAGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNTIME_VENV ?= .venv-runtime
RUNTIME_STAMP := $(RUNTIME_VENV)/.installed

# Threads of the numerical libraries: every core that we may use, at most 8, unless the caller has chosen.
ifndef OMP_NUM_THREADS
OMP_NUM_THREADS := $(shell $(PYTHON) -c 'import os; n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1; print(min(n, 8))' 2>/dev/null || echo 1)
endif
export OMP_NUM_THREADS

# Processes of the tests, one thread each; each takes some 2 GB.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 4))' 2>/dev/null || echo 1)

# A process that has done its part takes over tests from the one with the most left.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo benchmark train-nano train-nano-vq test test-all test-runtime gpu-smoke lint docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  \1\t/' | expand -t 16

setup: $(STAMP)  ## make $(VENV) with the package (editable) and all that demo and test need

# Versions that were resolved together, for each version of Python (docs/install.md); others take what pyproject.toml allows.
# $(1): environment, $(2): what to install there
define install
	$(PYTHON) -m venv $(1)
	pins=constraints/$$($(1)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	if test -f $$pins; then pins="-c $$pins"; else pins=""; echo "no pinned versions for this Python: newest ones are taken"; fi; \
	$(1)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) $$pins $(2)
	@touch $(1)/.installed
endef

EVERYTHING := .[all,docs,dev]# its commas would part the arguments of `call`

$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, PYTHON=$(PYTHON) is %d.%d" % sys.version_info[:2])'
	$(call install,$(VENV),-e '$(EVERYTHING)')

$(RUNTIME_STAMP): pyproject.toml $(wildcard constraints/*.txt)
	$(call install,$(RUNTIME_VENV),-e . pytest)

demo: $(STAMP)  ## compress photographs at every rate (IMAGES=folder for your own) and write $(OUT)/index.html
	$(BIN)/python scripts/demo.py --model '$(MODEL)' --out '$(OUT)' $(if $(IMAGES),--images '$(IMAGES)')

benchmark: OUT = benchmark
benchmark: $(STAMP)  ## compare nano with JPEG and others on photographs (IMAGES=folder for your own), write $(OUT)/report.html
	$(BIN)/python scripts/benchmark.py "output='$(OUT)'" $(if $(IMAGES),"data.images='$(IMAGES)'") $(ARGS)

# The recipes of the shipped models (docs/nano.md). A step is done once its result is there, and one that was interrupted
# resumes: steps that came before are order-only prerequisites, so that none is done again for its date.
#   make train-nano IMAGES=~/images             the images of oscar/assets/images.csv; the model goes to $(OUT)
#   make train-nano -n IMAGES=~/images          what it would do
#   make train-nano IMAGES=~/images ARGS='trainer.max_steps=2'      overrides of every training step

need_images = $(if $(IMAGES),,$(error IMAGES is unset; allowed: a folder of the images that oscar/assets/images.csv names))

# $(1): checkpoint of training
define ship
	$(BIN)/python -c "import torch; from oscar import OscarCodec; \
	    OscarCodec.from_pretrained('$(1)').save_pretrained('$(OUT)', torch.float16)"
	$(BIN)/oscar export '$(OUT)' '$(OUT)' --overwrite
endef

train-nano: OUT = models/nano
train-nano: | runs/nano/settle/final  ## train nano from IMAGES=folder of its photographs, and write it to models/nano
	$(call ship,runs/nano/settle/final)

train-nano-vq: OUT = models/nano-vq
train-nano-vq: | runs/nano-vq/context/final  ## likewise nano-vq, to models/nano-vq
	$(call ship,runs/nano-vq/context/final)

runs/nano/train.txt: | $(STAMP)
	$(need_images)
	$(BIN)/python scripts/nano_images.py '$(IMAGES)' --out runs/nano

runs/nano/vae/final: | runs/nano/train.txt
runs/nano/diffusion_pretrain/final: | runs/nano/vae/final
runs/nano/bottleneck/final: | runs/nano/diffusion_pretrain/final
runs/nano/joint/final: | runs/nano/bottleneck/final
runs/nano/longer/final: | runs/nano/joint/final
runs/nano/further/final: | runs/nano/longer/final
runs/nano/more/final: | runs/nano/further/final
runs/nano/widened: | runs/nano/more/final
	$(BIN)/python scripts/widen.py runs/nano/more/final --channels 128 --decoder-blocks 1 2 2 --out $@
runs/nano/wide/final: | runs/nano/widened
runs/nano/large_batch/final: | runs/nano/wide/final
runs/nano/settle/final: | runs/nano/large_batch/final
runs/nano/%/final: | $(STAMP)
	$(BIN)/python scripts/train.py experiment=nano/$* $(ARGS)

runs/nano-vq/vae/final: | runs/nano/train.txt
runs/nano-vq/diffusion_pretrain/final: | runs/nano-vq/vae/final
runs/nano-vq/bottleneck/final: | runs/nano-vq/diffusion_pretrain/final
runs/nano-vq/joint/final: | runs/nano-vq/bottleneck/final
runs/nano-vq/finetune/final: | runs/nano-vq/joint/final
runs/nano-vq/calibration/calibration.json: | runs/nano-vq/finetune/final
	$(need_images)
	$(BIN)/python scripts/calibrate_timesteps.py model=runs/nano-vq/finetune/final "data.images='$(IMAGES)'" \
		output=runs/nano-vq/calibration
runs/nano-vq/further/final: | runs/nano-vq/calibration/calibration.json
runs/nano-vq/more/final: | runs/nano-vq/further/final
runs/nano-vq/large_batch/final: | runs/nano-vq/more/final
runs/nano-vq/context/final: | runs/nano-vq/large_batch/final
runs/nano-vq/%/final: | $(STAMP)
	$(BIN)/python scripts/train.py experiment=nano_vq/$* $(ARGS)

test: $(STAMP)  ## run the tests of a few seconds each, on JOBS processes
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(STAMP)  ## run all tests, as .ci/run does: also several processes, killed runs, every command of the pages
	$(PYTEST) $(ARGS)

test-runtime: $(RUNTIME_STAMP)  ## test the base installation in an environment of its own, which has no torch
	OMP_NUM_THREADS=1 $(RUNTIME_VENV)/bin/python -m pytest -m 'not slow' tests/runtime tests/bitstream $(ARGS)

gpu-smoke: $(STAMP)  ## on a machine with GPUs: two steps of every stage, a file and back, all GPUs; prints a table
	$(BIN)/python scripts/gpu_smoke.py $(ARGS)

lint: $(STAMP)  ## check style, spelling, import order and the types of the public interface
	$(BIN)/ruff check oscar scripts tests
	$(BIN)/ruff format --check oscar scripts tests
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation site in site/, notebooks run; fails on a warning or a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:  ## remove the environment, caches and the outputs of demo and benchmark
	rm -rf $(VENV) $(RUNTIME_VENV) *.egg-info build dist site .cache/try .pytest_cache .ruff_cache demo benchmark \
		test-artefacts
	find oscar scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
