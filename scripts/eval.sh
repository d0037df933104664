#!/usr/bin/env bash
# Evaluates a model on GQA, ScienceQA, TextVQA and POPE through lmms-eval; the same as `fura-vlm eval`:
#
#   bash scripts/eval.sh [MODEL] [--KEY VALUE ...]    MODEL: a run folder, an adapter, a LLaVA; default: runs/tiny-fura
#
#   NUM_PROCESSES   processes on this machine, each with a copy of the model; default: one for every GPU, else one
set -euo pipefail
source "$(dirname "$0")/env.sh" eval
cd "$ROOT"
case "${1:-}" in "" | --*) set -- runs/tiny-fura "$@" ;; esac
processes="${NUM_PROCESSES:-$(nvidia-smi -L 2> /dev/null | wc -l || true)}"
if [ "$processes" -gt 1 ]; then
    exec torchrun --standalone --nproc-per-node "$processes" -m fura_vlm.cli eval "$@"
fi
exec fura-vlm eval "$@"
