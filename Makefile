# Every target starts from nothing: it makes .venv and installs first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-demo lint format clean

install: $(VENV)/.installed

# torch goes first: with it in place the other packages do not ask for a different build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$$(sed -n 's/^    "\(torch==[^"]*\)",$$/\1/p' pyproject.toml)"
	$(BIN)/pip install --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/gdpo run examples/tool_calling_tiny.toml

test: install
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-demo: install
	$(BIN)/pytest -m demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
