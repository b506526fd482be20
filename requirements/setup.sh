#!/usr/bin/env bash
# Makes .venv ready to run, test and check rlsys on a machine without a GPU. Does nothing where it is ready already.
#   PYTHON       the Python to build .venv with (default: the first of python3, python3.11, python3.12 that fits)
#   TORCH_INDEX  a package index that holds the CPU build of torch, where pip's own settings lead to none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=requirements/cpu.lock
stamp=.venv/.rlsys-ready
fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'

# stop WHAT GOT WANTED REMEDY
stop() {
    printf '%s\n  got:    %s\n  wanted: %s\n  remedy: %s\n' "$@" >&2
    exit 1
}

key() {
    { cat "$lock" pyproject.toml requirements/setup.sh; .venv/bin/python -VV; pwd; } | sha256sum | cut -d' ' -f1
}

is_ready() {
    [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(key)" ]
}

make_venv() {
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12}; do
        if "$candidate" -c "$fits" 2>/dev/null; then
            "$candidate" -m venv --clear .venv
            return
        fi
    done
    stop "Python" "none of: ${PYTHON:-python3 python3.11 python3.12}" "Python 3.11 or 3.12 with venv" \
        "install one, or name it: make setup PYTHON=/path/to/python3.11"
}

# Whether .venv holds torch at the version given, built without CUDA or ROCm. Does not import it.
has_cpu_torch() {
    .venv/bin/python - "$1" <<'PY' 2>/dev/null
import importlib.util, runpy, sys
spec = importlib.util.find_spec("torch")
facts = runpy.run_path(spec.submodule_search_locations[0] + "/version.py")
is_wanted = str(facts["__version__"]).split("+")[0] == sys.argv[1]
sys.exit(not (is_wanted and facts.get("cuda") is None and facts.get("hip") is None))
PY
}

# On Linux the CPU build carries the label '+cpu'; the plain wheel of PyPI is a CUDA build with gigabytes behind it.
# Asking for the label makes pip refuse before it downloads anything.
install_torch() {
    local version wanted index=()
    version=$(sed -n 's/^torch==//p' "$lock")
    has_cpu_torch "$version" && return
    wanted="torch==$version"
    [ "$(uname -s)" = Linux ] && wanted="$wanted+cpu"
    [ -n "${TORCH_INDEX:-}" ] && index=(--index-url "$TORCH_INDEX")
    .venv/bin/python -m pip install --no-deps ${index[@]+"${index[@]}"} "$wanted" && return
    stop "torch $version, CPU build" \
        "no wheel labelled '+cpu' in ${TORCH_INDEX:-the indexes that pip is set to}; a CUDA build is not installed in its place" \
        "an index that holds $wanted" \
        "name a package index that holds PyTorch's CPU wheels, make setup TORCH_INDEX=URL, or install the wheel into .venv yourself and run make setup again"
}

is_ready && exit 0
make_venv
.venv/bin/python -c "$fits" || stop ".venv" "$(.venv/bin/python -V)" "Python 3.11 or 3.12" "delete .venv and run make setup again"
install_torch
.venv/bin/python -m pip install --no-deps -r "$lock" | { grep -v '^Requirement already satisfied' || true; }
# setuptools is in the lock, so the build needs no environment of its own.
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
key >"$stamp"
