# Each target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
IMAGE_PYTHON ?= 3.12
TRANSFORMERS_4 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2

.PHONY: quickstart test check bench soak peers wheels clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed  ## the whole road on real images, minutes
	$(BIN)/vitscale quickstart

test: $(VENV)/installed  ## everything that runs on a CPU, two at a time
	$(BIN)/python -m pytest -m "not soak and not peers and not gpu" -n 2 --dist loadfile --no-loadscope-reorder --durations 30

check: $(VENV)/installed  ## format, lint, types, who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed  ## a training step and loading against peers
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/loader.py

soak: $(VENV)/installed  ## the long proofs, in full
	$(BIN)/python -m pytest -m soak -rP  # -rP prints the figures that they reach

peers: $(PEERS)/installed  ## side by side with timm, DALI, Energon and other loaders; timm needs torchvision and so the CUDA build of torch
	$(PEERS)/bin/python -m pytest -m peers

wheels: $(VENV)/installed  ## what benchmarks/gpu.sh brings to a GPU's image, in wheels/, for the image's Python
	mkdir -p wheels
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w wheels -c constraints.txt deepspeed
	grep -v -e '^#' -e '^deepspeed' benchmarks/wheels.txt | xargs $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: \
	    --implementation cp --python-version $(IMAGE_PYTHON) $(foreach N,39 34 28 27 17 12 5,--platform manylinux_2_$(N)_x86_64) --platform manylinux2014_x86_64 \
	    -d wheels -c constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt setup.py vitscale/_pixels.c
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[train,float8,quickstart,cloud,dedup,dev]"
	rm -rf $(VENV)/transformers4  # version 4 beside 5, for exports are loaded by both
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/transformers4 $(TRANSFORMERS_4)
	touch $@

$(PEERS)/installed: pyproject.toml setup.py vitscale/_pixels.c
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[train,cloud,dedup,dev,peers]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) wheels build *.egg-info vitscale/_pixels.*.so .pytest_cache .mypy_cache .ruff_cache
