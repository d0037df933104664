#!/usr/bin/env bash
# Talks with a model about held-out scenes in plain words and counts the good answers:
#
#   bash scripts/converse.sh runs/tiny-fura [--number 50] [--show 3]
set -euo pipefail
source "$(dirname "$0")/env.sh" train
cd "$ROOT"
exec python -m fura_vlm.embedded.converse "$@"
