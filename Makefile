# Every target makes .venv ready first (requirements/setup.sh does nothing where it is ready already).
# Variables: PYTHON, TORCH_INDEX (see requirements/setup.sh); ARGS, more words for the command behind the target, e.g.
#   make quickstart ARGS="run.name=synchronous rollout.max_staleness=0"

.PHONY: setup quickstart test test-engines test-learners test-pure check chaos

setup:
	@bash requirements/setup.sh

quickstart: setup
	.venv/bin/rlsys train configs/quickstart.yaml $(ARGS)

test: setup
ifeq ($(strip $(ARGS)),)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-engines test-learners
else
	.venv/bin/python -m pytest $(ARGS)
endif

# whole runs, which wait much of their time, and beside them, one after the other, all that yields the core to them
test-engines:
	MAKEFLAGS= .venv/bin/python -m pytest -m engines tests/integration

test-learners: test-pure
	MAKEFLAGS= nice -n 5 .venv/bin/python -m pytest -m engines --ignore=tests/integration

test-pure:
	MAKEFLAGS= nice -n 5 .venv/bin/python -m pytest -m "not engines"

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# kills runs at random moments and resumes them, e.g. make chaos ARGS="--kills 20 --seed 1"
chaos: setup
	.venv/bin/python -m tests.chaos.kill_and_resume $(ARGS)
