# Sourced by the other scripts: makes and activates the project's own environment.
#
#   source scripts/env.sh EXTRA ...   the extras of pyproject.toml to install (train, eval, demo, quant, dev); train is
#                                     always one of them: a script sourced without arguments sees those of its caller
#
# The first call creates .venv and installs the tested versions of constraints.txt; later calls find the stamp
# of what is installed and take no time. PYTHON names the interpreter to start from (default python3, >= 3.11).
# FURA_VLM_VENV names another folder than .venv. A checkout that is moved or copied with its .venv works as it is,
# with its own code, and installs nothing again. Where checkouts share an environment the scripts run the code of
# their own checkout, and the environment's own commands (VENV/bin/fura-vlm) that of the last one to run a script.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="${FURA_VLM_VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac

_fura_env() {
    local stamp="$VENV/.fura-vlm-installed" wanted source="" installed="" place="" extra missing=""
    wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
    if [ -f "$stamp" ] && [ -x "$VENV/bin/python" ]; then
        # Its lines: what was installed from (once with the checkout's path before it), the extras, and the place.
        { read -r source; read -r installed; IFS= read -r place; } < "$stamp" || true
        case "$source" in "$wanted" | *" $wanted") ;; *) missing=all ;; esac
    else
        missing=all
    fi
    for extra in train "$@"; do
        case " $installed " in *" $extra "*) ;; *) missing="$missing $extra"; installed="$installed $extra" ;; esac
    done
    if [ -n "$missing" ]; then
        _fura_install || return 1
    elif [ "$place" = "$ROOT $VENV" ]; then
        return 0
    else
        echo "Setting $VENV to the code in $ROOT"
    fi
    "$VENV/bin/python" -I "$ROOT/scripts/relocate.py" "$ROOT" || {
        echo "Setting $VENV to the code in $ROOT failed; mend the cause above, or remove $VENV, and run the same" \
            "command again" >&2
        return 1
    }
    case "$place" in *" $VENV") ;; *) rm -rf "$VENV/torch_extensions" ;; esac  # holds paths; DeepSpeed compiles it anew
    printf '%s\n' "$wanted" "$(echo $installed)" "$ROOT $VENV" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}

_fura_install() {
    local extras
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "The tested versions need Python 3.11 or newer; name one with PYTHON=/path/to/python3 $0" >&2
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
    (cd "$ROOT" && "$VENV/bin/python" -I -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$extras]") || {
        echo "Installing the packages into $VENV failed; mend the cause above and run the same command again" >&2
        return 1
    }
}

_fura_env "$@" || exit 1
unset PYTHONHOME
export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
# This checkout's code, also where checkouts share an environment or PYTHONPATH names another.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# What DeepSpeed compiles belongs to this environment: in the common folder every checkout compiles it anew.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
