# Needs make and Python 3.11 or newer; everything else goes into .venv. `make demo` needs no torch and no test tools.

PYTHONS := python3.14 python3.13 python3.12 python3.11 python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint format bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/base.stamp  ## predict one request on a real photo
	@photo="$$($(BIN)/python -c 'import matplotlib; print(matplotlib.get_data_path() + "/sample_data/grace_hopper.jpg")')" \
		&& set -- $(BIN)/lvlm predict qwen2.5-vl-7b h100-sxm5-80gb --image "$$photo" --text 64 --output 128 \
		&& echo "$$ $$*" >&2 && "$$@"

test: $(VENV)/test.stamp  ## what to run while working
	$(BIN)/pytest -n auto -m "not slow"

test-all: lint  ## what CI runs
	$(BIN)/pytest -n auto

lint: $(VENV)/test.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/test.stamp
	$(BIN)/python studies/validation/speed.py

clean:
	rm -rf $(VENV) build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made again when what is to be installed has changed; the test extras contain the base.
$(VENV)/base.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lvlm-sim into $(VENV) ..." >&2
	@$(INSTALL) -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lvlm-sim[test] into $(VENV): some minutes the first time ..." >&2
	@$(INSTALL) -e ".[test]"
	@touch $(VENV)/base.stamp $@

$(BIN)/python:
	@for python in $(PYTHONS); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" -m venv $(VENV) && exit; rm -rf $(VENV); exit 1; \
		fi; \
	done; \
	echo "error: no Python 3.11 or newer with the venv module among: $(PYTHONS)" >&2; exit 1
