#!/usr/bin/env bash
# Makes the environment and passes the tests.
#
#   bash tools/test.sh            everything but the tests marked slow
#   bash tools/test.sh --all      those too
#   bash tools/test.sh tests/optim -k adamw    other arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
make_environment test

filter=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then filter=(); else arguments+=("$argument"); fi
done

say "ruff"
"$VENV/bin/ruff" check .
say "pytest"
# Two workers: compilation, most of the time here, uses one core.
exec env JAX_PLATFORMS=cpu "$VENV/bin/python" -m pytest --numprocesses 2 --dist worksteal \
    "${filter[@]}" "${arguments[@]}"
