# make train: everything from nothing, then the main job on the embedded sample.
# make test:  everything from nothing, then the tests.   make lint: format and lint check.
# make faults: every fault of tests/faults in full, 8 to 9 minutes.
# make mac-audit: the kernels of Metal that this project needs, in MLX's packages for macOS (123 MB).
PYTHON ?= python3
BIN = .venv/bin
# pip says nothing while it unpacks: a line every four seconds shows that it works
PIP = ( while sleep 4 >/dev/null 2>&1 && kill -0 $$$$; do echo "still installing"; done ) & \
  trap "kill $$!" EXIT; $(BIN)/python -m pip install
INSTALL_PYTHON = Install a newer one, on a Mac by xcode-select --install and \
  brew install python@3.13 (or the installer of python.org)

.PHONY: train test lint faults mac-audit

train: .venv/ready
	$(BIN)/python train_mlx.py --preset tiny --dataset sample

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

faults: .venv/ready-dev
	$(BIN)/python tests/faults

mac-audit: .venv/ready
	$(BIN)/python tests/mac_audit.py

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) does not run, or is older than 3.11. $(INSTALL_PYTHON)," \
	    "then: make PYTHON=python3.13 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) bdh_lib/platform_check.py
	@echo "installing into .venv, which takes a minute or two"
	@$(BIN)/python -c 'import mlx.core' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(PIP) -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	@$(PIP) -r requirements-dev.txt
	touch $@
