#!/usr/bin/env bash
# As finetune_fura.sh, with FuRA over a 4-bit base:  bash scripts/finetune_qfura.sh [CONFIG.yaml] [--KEY VALUE ...]
set -euo pipefail
(source "$(dirname "$0")/env.sh" quant)
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method qfura
