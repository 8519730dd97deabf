# Everything runs in .venv, which the first target that needs it makes: Python's own venv, uv inside it, then edgegen
# with the versions of constraints.txt. Later runs skip that until pyproject.toml or constraints.txt change.
#   make demo        the main job on a generator that ships with edgegen
#   make test        the tests (under ten minutes)  make test T=tests/test_report.py K=escape
#                    the slow ones, half an hour:   make test M=slow
#   make PYTHON=/path/to/python3.12 demo

# The first interpreter that is new enough; python3 is tried first.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && exit; done; echo python3)
EXTRAS ?= torch,timm,onnxruntime,openvino,quality,diffusion,report,search,docs,dev
OUT ?= out/demo
NETWORKS ?= resnet20 resnet56 style-mosaic taef2-decoder rlfn mobilenet_v2 efficientformer_l1 deit_tiny
T ?= tests
K ?=
M ?= not slow
# Processes that run tests side by side.
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench bench-peers train-edsr train-dcgan train-cifar train-encoder train-sagan wheel clean train-mnist-ddpm train-cifar-ddpm train-dit

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 6
	@echo "targets: setup demo test lint bench bench-peers train-edsr train-dcgan train-cifar train-encoder \
		train-sagan train-mnist-ddpm train-cifar-ddpm train-dit wheel clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "edgegen needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -n 1)." >&2; \
		echo "Install one and name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/uv || $(BIN)/python -c 'import pip' 2>/dev/null || { \
		echo "making .venv with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv .venv; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/edgegen compress --model edsr --target cpu --out $(OUT) --resume

# What times something runs after all others. pytest ends with 5 where it was given no test.
test: $(STAMP)
	@beside=0; alone=0; \
	$(BIN)/python -m pytest $(T) -m '($(M)) and not alone' -n $(JOBS) --dist loadfile -k '$(K)' || beside=$$?; \
	$(BIN)/python -m pytest $(T) -m '($(M)) and alone' -k '$(K)' || alone=$$?; \
	[ $$beside -ne 5 ] || exit $$alone; [ $$alone -ne 5 ] || exit $$beside; exit $$((beside + alone))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# All go on where they were stopped; the results are in benchmarks/results/.
bench: $(STAMP)
	$(BIN)/python benchmarks/prepare_data.py
	$(BIN)/python benchmarks/goals.py
	$(BIN)/python benchmarks/by_hand.py $(addprefix --network ,$(NETWORKS))
	$(BIN)/python benchmarks/passes.py

# edgegen beside other tools, each in an environment of its own (some gigabytes under out/peers); goes on as above.
# One case: make bench-peers CASES=resnet20
CASES ?=
bench-peers: $(STAMP)
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[all]'
	$(BIN)/python benchmarks/prepare_data.py
	$(BIN)/python benchmarks/peers/run.py $(if $(CASES),--case $(CASES))

train-edsr train-dcgan train-cifar train-encoder train-sagan train-paint: train-%: $(STAMP)
	$(BIN)/python benchmarks/train/$*.py

train-mnist-ddpm train-cifar-ddpm: train-%-ddpm: $(STAMP)
	$(BIN)/python benchmarks/train/diffusion.py $*

# The attention-heavy denoiser of benchmarks/compression.py (1,024 tokens); nothing of it ships.
train-dit: $(STAMP)
	$(BIN)/edgegen train --model dit --config size=32,patch=1 --data out/data/cifar/train-all.npz \
		--out out/data/dit.safetensors --steps 1500 --batch 16 --optimizer muon --lr 1e-3 --resume
	cp out/data/dit.json benchmarks/results/train-dit.json

wheel: $(STAMP)
	$(BIN)/uv build --wheel --out-dir dist

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache
