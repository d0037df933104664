#!/usr/bin/env bash
# Pretrains the projector on captions, LLaVA's first stage; see scripts/configs/llava-1.5-7b-pretrain.yaml:
#
#   bash scripts/pretrain_projector.sh [CONFIG.yaml] [--KEY VALUE ...]
set -euo pipefail
case "${1:-} $*" in
    *.yaml\ * | *.yml\ * | *" --config"*) ;;
    *) set -- scripts/configs/llava-1.5-7b-pretrain.yaml "$@" ;;
esac
exec bash "$(dirname "$0")/finetune_fura.sh" "$@" --method projector --conversation plain
