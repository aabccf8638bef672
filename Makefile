# Two commands do it all: `make up` runs the whole stack, `make test` runs every test.
# Everything lands in .venv, from the lock file; nothing else is needed but Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
UV_VERSION := 0.13.9
READY := $(VENV)/.ready

.PHONY: up up-manifest test test-compiled compiled pure check lint types imports protos-drift protos dashboards-drift dashboards lock bench bench-rivals clean

up: $(READY)
	@exec $(VENV)/bin/tollgate up

# What Cloud Run would run, as local processes: cloudrun-multicontainer.yaml and both Dockerfiles.
up-manifest: $(READY)
	@exec $(VENV)/bin/tollgate up-manifest

# Every test, two at a time; then those through a real Envoy once more, on the reference transport, with processor and
# Envoy as the manifest defines them, and with the subset of the recordings that is in the tree. Tests are compiled once,
# not by each worker of each run, whatever the environment says.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(VENV)/bin/pytest -n 2 --dist loadfile $(ARGS)
	TOLLGATE_RIG=manifest TOLLGATE_TRANSPORT=grpc TOLLGATE_RECORDINGS=tests/streams $(VENV)/bin/pytest -n 2 --dist loadfile $(wildcard tests/test_e2e_*.py) $(ARGS)

# The hot path as C, in place, beside its sources (setup.py says which). Needs a C compiler and Python's headers. `pure`
# takes it out again, and is needed before such a source is edited: Python prefers the compiled one.
compiled: $(READY)
	@echo "compiling the hot path: about 2 minutes"
	@TOLLGATE_COMPILE=1 $(VENV)/bin/python setup.py --quiet build_ext --inplace
	@rm -rf build

PURE = find extproc -name '*.so' -delete
pure:
	@$(PURE)
	@rm -rf build

# What is compiled, by the tests of its modules and by those through a real Envoy.
COMPILED_TESTS = $(wildcard $(addprefix tests/test_,compiled.py dockerfiles.py wire*.py exchange*.py intake.py sse.py \
	metering.py plan.py envoy.py session.py target.py *_calls.py e2e_*.py))
test-compiled: compiled
	@trap "$(PURE)" EXIT; \
	TOLLGATE_COMPILED=1 $(VENV)/bin/pytest -n 2 --dist loadfile $(COMPILED_TESTS) $(ARGS)

check: lint types imports protos-drift dashboards-drift

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

imports: $(READY)
	$(VENV)/bin/lint-imports

# The committed modules must be what protos/ compiles to.
protos-drift: $(READY)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(VENV)/bin/python -m grpc_tools.protoc -I protos --python_out=$$out --pyi_out=$$out protos/ext_proc.proto && \
	diff -r --exclude=__pycache__ --exclude=__init__.py $$out extproc/pb && echo "protos: no drift"

protos: $(READY)
	$(VENV)/bin/python -m grpc_tools.protoc -I protos --python_out=extproc/pb --pyi_out=extproc/pb protos/ext_proc.proto

# The committed dashboards must be what their code generates.
dashboards-drift: $(READY)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(VENV)/bin/python -m dashboards $$out && \
	diff -r $$out/bigquery dashboards/bigquery && diff -r $$out/prometheus dashboards/prometheus && \
	echo "dashboards: no drift"

dashboards: $(READY)
	$(VENV)/bin/python -m dashboards

# After a change of pyproject.toml: pins every package, with hashes; then those alone that the processor's image holds.
LOCK = $(VENV)/bin/uv pip compile --quiet --no-header --universal --generate-hashes pyproject.toml
lock: $(READY)
	$(LOCK) --group local --group dev -o requirements.lock
	$(LOCK) --constraint requirements.lock -o requirements.image.lock

# The other gateways install themselves first, into .bench; the bench goes on without those that do not.
bench: $(READY) bench-rivals
	$(VENV)/bin/python -m bench $(ARGS)

bench-rivals: $(READY)
	$(VENV)/bin/python -m bench.rivals

clean: pure
	rm -rf $(VENV) .tollgate .bench

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tollgate needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV): 1/3 environment"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): 2/3 uv $(UV_VERSION)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "setting up $(VENV): 3/3 locked packages"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/uv pip sync --quiet --require-hashes requirements.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
