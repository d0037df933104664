#!/usr/bin/env bash
# Pretrains the projector on captions, LLaVA's first stage; see scripts/configs/llava-1.5-7b-pretrain.yaml:
#
#   bash scripts/pretrain_projector.sh [RECIPE] [--KEY VALUE ...]
set -euo pipefail
case "${1:-}" in
    "" | -*) case " $*" in *" --config"*) ;; *) set -- llava-1.5-7b-pretrain "$@" ;; esac ;;
esac
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method projector --conversation plain
