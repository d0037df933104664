# Sourced by the other scripts: makes and activates the project's own environment.
#
#   source scripts/env.sh [EXTRA ...]     the extras of pyproject.toml to install (eval, demo, quant, dev)
#
# The first call creates .venv and installs the tested versions of constraints.txt; later calls find the stamp
# of what is installed and take no time. PYTHON names the interpreter to start from (default python3, >= 3.10).
# FURA_VLM_VENV names another folder than .venv.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${FURA_VLM_VENV:-$ROOT/.venv}"

_fura_env() {
    local extras requirement wanted stamp
    extras="$(IFS=,; echo "$*")"
    requirement="$ROOT${extras:+[$extras]}"
    stamp="$VENV/.fura-vlm-installed-${extras:-core}"
    wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $ROOT"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "FuRA-VLM needs Python 3.10 or newer; name one with PYTHON=/path/to/python3 $0" >&2
        return 1
    }
    echo "Setting up $VENV (first use only; the tested versions of PyTorch and friends are about 7 GB)"
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV" || {
        echo "Could not create $VENV: install your system's venv package (Debian: apt install python3-venv)" >&2
        return 1
    }
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/constraints.txt" --editable "$requirement" || {
        echo "Installing the packages into $VENV failed; mend the cause above and run the same command again" >&2
        return 1
    }
    echo "$wanted" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}

_fura_env "$@" || exit 1
source "$VENV/bin/activate"
