#!/usr/bin/env bash
# Fine-tunes a vision-language model, or a language model, with FuRA under DeepSpeed:
#
#   bash scripts/finetune_fura.sh                                 the embedded model on the embedded mixture
#   bash scripts/finetune_fura.sh RECIPE [--KEY VALUE ...]        another one, by path or name; any field can be set here
#
# The first run sets up .venv. Paths are relative to the repository. See scripts/launch.sh for several processes.
set -euo pipefail
source "$(dirname "$0")/env.sh" train
source "$ROOT/scripts/launch.sh"
cd "$ROOT"
config=tiny
case "${1:-}" in
    "" | -*) case " $*" in *" --config"*) config="" ;; esac ;;  # the embedded recipe is no part of another one
    *) config="$1"; shift ;;
esac
case "$config" in
    tiny | scripts/configs/tiny.yaml)
        [ "${NODE_RANK:-0}" != 0 ] || fura-vlm data embedded  # the others wait for the launcher of the first
        ;;
esac
launch train ${config:+--config "$config"} "$@"
