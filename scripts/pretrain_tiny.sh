#!/usr/bin/env bash
# Pretrains the embedded model on generated captions and text and writes data/tiny-llava (about 8 minutes on one H200):
#
#   bash scripts/pretrain_tiny.sh [--steps N] [--batch N] ...
set -euo pipefail
source "$(dirname "$0")/env.sh" train
cd "$ROOT"
exec python -m fura_vlm.embedded.pretrain_tiny "$@"
