#!/usr/bin/env bash
# Sets up the environment and runs the whole test-suite:  bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/env.sh" eval demo quant dev
source "$ROOT/scripts/chromium.sh"
cd "$ROOT"
exec python -m pytest "$@"
