#!/usr/bin/env bash
# As finetune_fura.sh, with all of the language model's weights:  bash scripts/finetune_full.sh [CONFIG.yaml] [--KEY VALUE ...]
# Their gradients are divided among the GPUs, too (ZeRO-2).
set -euo pipefail
case " $*" in
    *" --deepspeed"*) ;;
    *) set -- "$@" --deepspeed scripts/zero2.json ;;
esac
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method full
