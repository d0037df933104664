#!/usr/bin/env bash
# As finetune_fura.sh, with all of the language model's weights:  bash scripts/finetune_full.sh [CONFIG.yaml] [--KEY VALUE ...]
set -euo pipefail
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method full
