# Sourced by the other scripts: makes and activates the project's own environment.
#
#   source scripts/env.sh core|EXTRA ...  the extras of pyproject.toml to install (eval, demo, quant, dev), or core
#                                         for none: a script sourced without arguments sees those of its caller
#
# The first call creates .venv and installs the tested versions of constraints.txt; later calls find the stamp
# of what is installed and take no time. PYTHON names the interpreter to start from (default python3, >= 3.10).
# FURA_VLM_VENV names another folder than .venv.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${FURA_VLM_VENV:-$ROOT/.venv}"

_fura_env() {
    local stamp="$VENV/.fura-vlm-installed" wanted installed="" extra missing="" extras
    wanted="$ROOT $(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
    if [ -f "$stamp" ]; then  # first line: what was installed from; second line: the extras
        installed="$(sed -n 2p "$stamp")"
        [ "$(sed -n 1p "$stamp")" = "$wanted" ] || missing=all
    else
        missing=all
    fi
    for extra in "$@"; do
        [ "$extra" != core ] || continue
        case " $installed " in *" $extra "*) ;; *) missing="$missing $extra"; installed="$installed $extra" ;; esac
    done
    [ -n "$missing" ] || return 0

    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "FuRA-VLM needs Python 3.10 or newer; name one with PYTHON=/path/to/python3 $0" >&2
        return 1
    }
    if [ -f "$stamp" ]; then
        echo "Adding to $VENV what this command needs"
    else
        echo "Setting up $VENV (first use only; the tested versions of PyTorch and friends are about 7 GB)"
    fi
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV" || {
        echo "Could not create $VENV: install your system's venv package (Debian: apt install python3-venv)" >&2
        return 1
    }
    extras="$(echo $installed | tr ' ' ',')"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/constraints.txt" --editable "$ROOT${extras:+[$extras]}" || {
        echo "Installing the packages into $VENV failed; mend the cause above and run the same command again" >&2
        return 1
    }
    printf '%s\n' "$wanted" "$(echo $installed)" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}

_fura_env "$@" || exit 1
source "$VENV/bin/activate"
# What DeepSpeed compiles belongs to this environment: in the common folder every checkout compiles it anew.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
