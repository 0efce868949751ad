# make demo    train the embedded toy by EM, in minutes on two CPU cores
# make test    the quick tests (no GPU), on two cores          make check   lint, format, types, links
# make clean   remove what these made            make demo PYTHON=python3.12   another Python (3.11 or later)
#
# All work in one virtual environment, .venv. The demo needs only what minem runs on; transformers (the tests' referee),
# scipy and the linters are some 100 MB more, so they are installed when `test` or `check` first asks for them.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test check clean

demo: $(VENV)/installed
	$(RUN) -m minem train --sampler rsm --budget 8

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

check: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	@for name in kernels data configs; do \
	  test "$$(readlink minem/$$name)" = "../$$name" || \
	  { echo "minem/$$name must be a symbolic link to ../$$name; restore it with: git checkout minem/$$name"; exit 1; }; \
	done

clean:
	rm -rf .venv build dist minem.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	$(RUN) -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/made pyproject.toml constraints.txt
	$(RUN) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/made:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "minem needs Python 3.11 or later with its venv and ensurepip modules (Debian: python3-venv), and $(PYTHON) is not that; name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
