#!/usr/bin/env bash
# As finetune_fura.sh, with DoRA:  bash scripts/finetune_dora.sh [CONFIG.yaml] [--KEY VALUE ...]
set -euo pipefail
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method dora
