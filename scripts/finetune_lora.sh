#!/usr/bin/env bash
# As finetune_fura.sh, with LoRA:  bash scripts/finetune_lora.sh [CONFIG.yaml] [--KEY VALUE ...]
set -euo pipefail
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method lora
