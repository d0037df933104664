#!/usr/bin/env bash
# Fine-tunes a LLaVA with FuRA under DeepSpeed:
#
#   bash scripts/finetune_fura.sh                                 the embedded model on the embedded mixture
#   bash scripts/finetune_fura.sh CONFIG.yaml [--KEY VALUE ...]   another recipe; any field can be set here
#
# The first run sets up .venv. Paths are relative to the repository. See scripts/launch.sh for several processes.
set -euo pipefail
source "$(dirname "$0")/env.sh" train
source "$ROOT/scripts/launch.sh"
cd "$ROOT"
config=scripts/configs/tiny.yaml
case "${1:-}" in
    *.yaml | *.yml) config="$1"; shift ;;
    *) case " $*" in *" --config"*) config="" ;; esac ;;  # the embedded recipe is no part of another one
esac
if [ "$config" = scripts/configs/tiny.yaml ] && [ "${NODE_RANK:-0}" = 0 ]; then  # the others wait for its launcher
    fura-vlm data embedded
fi
launch train ${config:+--config "$config"} "$@"
