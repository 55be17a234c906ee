# The workbench's commands; `make` alone lists them.
#
# Everything is installed inside this folder: the installer (uv) in .uv, the environment in .venv, what was
# downloaded in .cache. Two variables change that:
#   make run PYTHON=/path/to/python3.11     another interpreter than the python3 on PATH
#   make run UV_CACHE_DIR=/scratch/uv       another folder for the downloads

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
RECIPE ?= synthetic
UV_CACHE_DIR ?= $(CURDIR)/.cache/uv
export UV_CACHE_DIR
export UV_PYTHON_DOWNLOADS := never
export PIP_USER := 0
# These belong to another environment: an activated one, a cluster's module, or a GPU build.
# And without bytecode every process would compile TensorFlow's 1,800 files again, five seconds each time.
unexport PYTHONDONTWRITEBYTECODE
unexport CONDA_PREFIX PYTHONHOME PYTHONPATH UV_CONFIG_FILE VIRTUAL_ENV

# What runs here finds the environment's own programs first, above all its mpiexec.
in_environment := PATH="$(CURDIR)/.venv/bin:$$PATH"
compile := .uv/bin/uv pip compile pyproject.toml --python-version 3.11.2 \
	--generate-hashes --no-header --no-annotate --quiet

.PHONY: help run test lint lab docs bench setup-gpu bench-gpu lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: .venv/.ready ## run the five notebooks on made-up data; RECIPE=name for another recipe, ARGS="--set key=value"
	$(in_environment) .venv/bin/workbench run $(RECIPE) $(ARGS)

test: .venv/.ready ## run the tests; ARGS="-k shards" for some of them
	$(in_environment) .venv/bin/python -m pytest $(ARGS)

lint: .venv/.ready ## check style and formatting; `.venv/bin/ruff format .` formats
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .

lab: .venv/.ready ## open JupyterLab on the notebooks; ARGS="--no-browser --port=8890"
	$(in_environment) .venv/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

docs: .venv/.ready .docs/.ready ## build the documentation into docs/_build/html; RUN=name for the notebooks of that run
	$(in_environment) .docs/bin/python docs/build.py $(RUN)

bench: .venv/.ready ## measure the speed against others, 20 minutes; ROW="name name" for some rows
	@$(MAKE) --no-print-directory .peers/.ready || echo "bench: PyTorch's CPU build cannot be had, so rows against it" \
		"are left out: go online, or name a folder that holds it, as in 'make bench PIP_FIND_LINKS=FOLDER'."
	$(in_environment) .venv/bin/python tests/benchmarks/bench.py $(ROW)

setup-gpu: .venv-gpu/.ready ## install everything into .venv-gpu, Horovod built with NCCL; needs nvcc (CUDA_HOME=/path/to/cuda)

bench-gpu: .venv-gpu/.ready ## measure one GPU against Keras and PyTorch; TORCH=/path/to/python that has PyTorch, ARGS="--batch 128"
	PATH="$(CURDIR)/.venv-gpu/bin:$$PATH" .venv-gpu/bin/python tests/benchmarks/gpu.py $(if $(TORCH),--torch $(TORCH)) $(ARGS)

lock: .uv/.ready ## pin what pyproject.toml asks for; ARGS=--upgrade takes newer versions
	@$(compile) --extra cpu --extra dev $(ARGS) --output-file requirements-cpu.txt
	# Horovod is left out: on GPUs it is built last, see environment.yml.
	$(compile) --extra gpu --extra dev $(ARGS) --output-file requirements-gpu.txt \
		--constraint requirements-cpu.txt --no-emit-package horovod
	# Of the same versions as the environment it stands on.
	.uv/bin/uv pip compile --group docs --python-version 3.11.2 --generate-hashes --no-header --no-annotate --quiet \
		$(ARGS) --output-file requirements-docs.txt --constraint requirements-cpu.txt
	$(from_cpu_torch)
	with_torch .uv/bin/uv pip compile tests/benchmarks/peers.in --python-version 3.11.2 --generate-hashes --no-header \
		--no-annotate --quiet $(ARGS) --output-file tests/benchmarks/requirements-peers.txt
	git diff --stat -- 'requirements-*.txt' tests/benchmarks/requirements-peers.txt

clean: ## remove what was installed and cached; data/ and results/ stay
	rm -rf .uv .venv .venv-gpu .docs .peers .cache docs/_build workbench/training/kernels-*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Set-up. It can be broken off at any moment: .ready is written last, and an environment without it is made anew.

define check_machine
say() { echo "set-up: $$*"; }
fail() { echo "set-up: $$*" >&2; exit 1; }
[ "$$(uname -sm)" = "Linux x86_64" ] || fail "only Linux on x86-64 is supported, and this is $$(uname -sm)."
[[ "$(CURDIR)" != *" "* ]] || fail "Horovod does not compile below a folder with a space in its name: move $(CURDIR)."
command -v "$(PYTHON)" >/dev/null ||
	fail "$(PYTHON) is missing: apt-get install python3 python3-venv (it has to be Python 3.11)."
"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11, 2) <= sys.version_info[:3] < (3, 12))' ||
	fail "Python 3.11 (3.11.2 or newer) is needed, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1):" \
		"install it and name it, as in 'make PYTHON=/usr/bin/python3.11'."
"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null ||
	fail "$(PYTHON) has no venv module: apt-get install python3-venv."
command -v g++ >/dev/null || fail "g++ is missing, and Horovod is compiled here: apt-get install g++."
python=$$("$(PYTHON)" -c 'import os, sys; print(os.path.realpath(sys.executable))')
endef

.uv/.ready: requirements-uv.txt
	@$(check_machine)
	say "1 of 3, the installer: uv into .uv ($$("$$python" --version), $$python)"
	"$$python" -m venv --clear .uv
	.uv/bin/pip --disable-pip-version-check --no-cache-dir install --quiet --require-hashes -r requirements-uv.txt
	touch $@

.venv/.ready: .uv/.ready requirements-cpu.txt pyproject.toml
	@$(check_machine)
	say "2 of 3, the environment: $$(grep -c == requirements-cpu.txt) packages into .venv; the first time" \
		"about 450 MB are downloaded and Horovod is compiled, one to three minutes"
	# The environment holds its own path, so a folder that was moved gets a new one.
	[ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] || .uv/bin/uv venv --quiet --clear --python "$$python" .venv
	rm -f $@
	.uv/bin/uv pip sync --python .venv/bin/python requirements-cpu.txt
	say "3 of 3, the workbench itself"
	.uv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
	# Without them training is slower and says so.
	.venv/bin/python -m workbench.training.kernels >/dev/null || say "the compiled kernels could not be made"
	echo "$(CURDIR)" > $@
	say "done"

# The site is built by programs of its own that find the environment's packages, since the reference imports them all.
.docs/.ready: .venv/.ready requirements-docs.txt
	@say() { echo "set-up: $$*"; }
	say "what documentation is built with, into .docs"
	.uv/bin/uv venv --quiet --clear --python .venv/bin/python .docs
	.uv/bin/uv pip sync --python .docs/bin/python requirements-docs.txt
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > .docs/lib/python3.11/site-packages/environment.pth
	touch $@

# The environment for GPUs stands beside the one for CPUs. Whatever uv installs there, it installs under .venv-gpu/uv.toml,
# which is uv-gpu.toml with what belongs to this machine: its variables are part of the key by which uv keeps what it
# builds, so that neither environment is given the other's Horovod, nor one of another toolkit.
# The toolkit is CUDA_HOME's, or that of the nvcc on PATH, which says itself where it is (what is on PATH may be a script).
define find_toolkit
nvcc=$${CUDA_HOME:+$$CUDA_HOME/bin/nvcc}; nvcc=$${nvcc:-$$(command -v nvcc || true)}
[ -n "$$nvcc" ] || fail "nvcc is missing, and Horovod's GPU part is compiled with it: load the cluster's CUDA module" \
	"(12.0 to 12.5), or name the toolkit, as in 'make setup-gpu CUDA_HOME=/usr/local/cuda-12.5'."
[ -x "$$nvcc" ] || fail "CUDA_HOME is $$CUDA_HOME, and there is no bin/nvcc in it: name a CUDA toolkit (12.0 to 12.5)."
empty=$$(mktemp --suffix .cu)
toolkit=$$("$$nvcc" --dryrun -c "$$empty" 2>&1 | sed -n 's/^#\$$ _HERE_=//p'); rm "$$empty"
toolkit=$$(realpath "$$toolkit/..")
release=$$("$$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
[ -e "$$toolkit/bin/nvcc" ] && [ -n "$$release" ] || fail "$$nvcc does not say what it is: name a CUDA toolkit, as in" \
	"'make setup-gpu CUDA_HOME=/usr/local/cuda-12.5'."
case $$release in 12.[0-5]) ;; *) say "WARNING: this is CUDA $$release, and TensorFlow was built with 12.5: Horovod may" \
	"compile with it, but nobody supports the mix; take a toolkit of 12.0 to 12.5 where there is one." ;; esac
endef

.venv-gpu/.ready: .uv/.ready requirements-gpu.txt pyproject.toml uv-gpu.toml
	@$(check_machine)
	$(find_toolkit)
	say "2 of 3, the environment for GPUs: $$(grep -c == requirements-gpu.txt) packages into .venv-gpu (6 GB; 3 GB to download)"
	[ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] || .uv/bin/uv venv --quiet --clear --python "$$python" .venv-gpu
	rm -f $@
	UV_CONFIG_FILE=uv-gpu.toml .uv/bin/uv pip sync --quiet --python .venv-gpu/bin/python requirements-gpu.txt
	# NCCL's package has no name for the linker to find.
	nccl=$$(.venv-gpu/bin/python -c 'import nvidia.nccl; print(*nvidia.nccl.__path__)')
	ln -sf libnccl.so.2 "$$nccl/lib/libnccl.so"
	say "3 of 3, Horovod, compiled with CUDA $$release from $$toolkit, two to four minutes"
	kinds=$$(sed -n 's/^HOROVOD_BUILD_CUDA_CC_LIST = "\(.*\)"/\1/p' uv-gpu.toml)
	for kind in $${kinds//,/ }; do "$$nvcc" --list-gpu-arch | grep -q "compute_$$kind$$" || {
		say "WARNING: CUDA $$release does not compile for GPUs of compute capability $${kind%?}.$${kind: -1} any more"
		kinds=$${kinds/$$kind,/}; }; done
	{
		sed "s/^HOROVOD_BUILD_CUDA_CC_LIST = .*/HOROVOD_BUILD_CUDA_CC_LIST = \"$$kinds\"/" uv-gpu.toml
		printf 'HOROVOD_NCCL_HOME = "%s"\nHOROVOD_CUDA_HOME = "%s"\n' "$$nccl" "$$toolkit"
	} > .venv-gpu/uv.toml
	export UV_CONFIG_FILE="$(CURDIR)/.venv-gpu/uv.toml" PATH="$$toolkit/bin:$$PATH"
	.uv/bin/uv pip install --python .venv-gpu/bin/python --no-deps --constraint requirements-cpu.txt horovod
	.uv/bin/uv pip install --quiet --python .venv-gpu/bin/python --no-deps --editable .
	built=$$(.venv-gpu/bin/python -c 'import horovod.tensorflow as hvd
	print(hvd.nccl_built(), hvd.cuda_built(), hvd.mpi_built())' 2>.venv-gpu/check.log) || built=$$(tail -n 1 .venv-gpu/check.log)
	[[ "$$built" =~ ^2[0-9]{4}\ True\ True$$ ]] || fail "Horovod in .venv-gpu is not the GPU build: nccl_built, cuda_built," \
		"mpi_built are '$$built'; run '.uv/bin/uv cache clean horovod', then 'make setup-gpu' again."
	echo "$(CURDIR)" > $@
	say "done: nccl_built, cuda_built, mpi_built are $$built; source .venv-gpu/bin/activate"

# What benchmarks compare with has an environment of its own, so that nobody else needs it. PyTorch's CPU build is not
# in the Python package index: it is taken from where pip is set up to find files, or else from where uv knows it to be.
define from_cpu_torch
links=$${PIP_FIND_LINKS:-$$(.uv/bin/pip config get global.find-links 2>/dev/null || true)}
with_torch() { { [ -n "$$links" ] && "$$@" --find-links "$$links"; } || "$$@" --torch-backend cpu; }
endef

.peers/.ready: .uv/.ready tests/benchmarks/requirements-peers.txt
	@$(check_machine)
	say "what benchmarks compare with, into .peers"
	.uv/bin/uv venv --quiet --clear --python "$$python" .peers
	$(from_cpu_torch)
	with_torch .uv/bin/uv pip sync --python .peers/bin/python tests/benchmarks/requirements-peers.txt
	touch $@

# A moved folder: what .ready says is no longer true.
ifneq ($(file < .venv/.ready),$(CURDIR))
.PHONY: .venv/.ready
endif
ifneq ($(file < .venv-gpu/.ready),$(CURDIR))
.PHONY: .venv-gpu/.ready
endif
