# Every target makes .venv ready first (requirements/setup.sh does nothing where it is ready already).
# Variables: PYTHON, TORCH_INDEX (see requirements/setup.sh); ARGS, more words for the command behind the target, e.g.
#   make quickstart ARGS="run.name=synchronous rollout.max_staleness=0"

.PHONY: setup quickstart test check chaos

setup:
	@bash requirements/setup.sh

quickstart: setup
	.venv/bin/rlsys train configs/quickstart.yaml $(ARGS)

test: setup
ifeq ($(strip $(ARGS)),)
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "not engines"
	.venv/bin/python -m pytest -m engines
else
	.venv/bin/python -m pytest $(ARGS)
endif

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# kills runs at random moments and resumes them, e.g. make chaos ARGS="--kills 20 --seed 1"
chaos: setup
	.venv/bin/python -m tests.chaos.kill_and_resume $(ARGS)
