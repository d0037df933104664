#!/usr/bin/env bash
# Trains a model by the reward of its own answers (GRPO, by TRL) with FuRA under DeepSpeed:
#
#   bash scripts/grpo_fura.sh                              the embedded model, on counting and reading
#   bash scripts/grpo_fura.sh RECIPE [--KEY VALUE ...]     another one, by path or name; any field can be set here
#   bash scripts/grpo_fura.sh RECIPE --method lora         or full, dora, qfura, qlora
#
# The embedded model answers questions once it was fine-tuned, so without a recipe that is done first where it was not.
# Paths are relative to the repository. See scripts/launch.sh for several processes.
set -euo pipefail
quantised=""
case " $* " in *" qfura "* | *" qlora "* | *=qfura* | *=qlora*) quantised=quant ;; esac
source "$(dirname "$0")/env.sh" rl $quantised
source "$ROOT/scripts/launch.sh"
cd "$ROOT"
config=grpo-tiny
case "${1:-}" in
    "" | -*) case " $* " in *" --config"*) config="" ;; esac ;;  # the embedded recipe is no part of another one
    *) config="$1"; shift ;;
esac
case "$config $*" in
    *--model_name_or_path*) ;;
    "grpo-tiny "* | "scripts/configs/grpo-tiny.yaml "*)
        if [ "${NODE_RANK:-0}" = 0 ] && [ ! -d runs/tiny-fura/merged ]; then
            [ -f runs/tiny-fura/report.md ] || bash scripts/finetune_fura.sh
            fura-vlm merge runs/tiny-fura runs/tiny-fura/merged
        fi
        ;;
esac
launch grpo ${config:+--config "$config"} "$@"
