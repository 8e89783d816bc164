# make demo   set up, then live-migrate a running guest and check every byte of it
# make test   set up, then run all tests
# make soak   one demo guest after another there and back 1,000 times (TRIPS=N)
# make lint   ruff and mypy; make bench: the benchmark against its peers
# make torture  every fault in every state, many times: writes docs/torture.md (root, half an hour)

VENV   ?= .venv
PYTHON := $(VENV)/bin/python
# Test files at the same time. Each needs a /dev/shm of its own, and that needs root. They come in
# their order: xdist's own has the files with few and long tests last, one after the other.
JOBS   ?= $(if $(filter 0,$(shell id -u)),3,0)
# Of `make soak`.
TRIPS  ?= 1000

# make fuzz SECONDS=60 TARGET=frame,message: so long for each target, all of them if none is named
SECONDS ?= 60
TARGET  ?=

# Hundreds of short processes: each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test soak lint bench fuzz torture picture clean

demo: $(VENV)/.demo
	@$(VENV)/bin/pageferry copy 'demo:?size=512M&content=text&rate=20000' demo:

soak: $(VENV)/.test
	@$(PYTHON) tests/fakes/soak.py --trips $(TRIPS)

test: $(VENV)/.test
	@$(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.lint
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy -p pageferry

bench: $(VENV)/.demo
	@$(PYTHON) -m pageferry.tools.bench throughput

# atheris has no wheel for every Python: without it inputs are made by our own mutator
fuzz: $(VENV)/.test
	@$(VENV)/bin/pip install --quiet --only-binary :all: -e '.[fuzz]' || true
	@$(PYTHON) tests/fuzz/fuzz_run.py --seconds $(SECONDS) --target '$(TARGET)'

torture: $(VENV)/.test
	@$(PYTHON) tests/torture --full docs/torture.md

picture: $(VENV)/.demo
	@$(VENV)/bin/pip install --quiet pyte selenium pillow -e '.[web]'
	@$(PYTHON) -m pageferry.tools.picture docs/demo.svg
	@$(PYTHON) -m pageferry.tools.screenshots docs

$(VENV)/bin/python:
	@sh tools/make_venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python setup.cfg
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e . && touch $@

$(VENV)/.test: $(VENV)/bin/python setup.cfg
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[test]' && touch $@ $(VENV)/.demo

$(VENV)/.lint: $(VENV)/bin/python setup.cfg
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[lint,test]' && touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
