# Two commands: `make demo` and `make test`. Both bring uv into .bootstrap/ when the machine has none.
UV := $(shell command -v uv 2>/dev/null || echo .bootstrap/bin/uv)
PYTHON ?= python3

.PHONY: demo test lint results clean-bootstrap

demo: $(UV)
	$(UV) run harness run --method sc --dataset digits

# One worker per core, each with one thread: small nets gain nothing from more (docs/decisions/007).
test: $(UV)
	OMP_NUM_THREADS=1 $(UV) run pytest -n auto --dist loadfile

lint: $(UV)
	$(UV) run ruff check
	$(UV) run mypy

# results/README.md is made from the committed rows, never typed; a test fails when it is stale.
results: $(UV)
	$(UV) run harness report --markdown --rows results/studies > results/README.md.new
	mv results/README.md.new results/README.md

# A distribution-managed Python refuses plain installs, and some come without ensurepip: a private environment first,
# a private folder next.
.bootstrap/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "harness needs Python 3.11 or newer; name it with PYTHON=..." >&2; exit 2; }
	@{ $(PYTHON) -m venv .bootstrap && .bootstrap/bin/python -m pip install --quiet --disable-pip-version-check uv; } \
	  || { rm -rf .bootstrap; $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .bootstrap uv; } \
	  || { rm -rf .bootstrap; echo "could not install uv: this Python has neither venv nor pip; install one of them" >&2; exit 2; }

clean-bootstrap:
	rm -rf .bootstrap
