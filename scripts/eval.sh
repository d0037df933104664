#!/usr/bin/env bash
# Evaluates a model; the same as `fura-vlm eval`:
#
#   bash scripts/eval.sh [MODEL] [--KEY VALUE ...]    MODEL: a run folder, an adapter, a model; default: runs/tiny-fura
#   --suite visual                                    GQA, ScienceQA, TextVQA and POPE, through lmms-eval (the default)
#   --suite commonsense --data FOLDER                 the eight sets of LLM-Adapters
#   --suite math --data FOLDER                        MATH-500, AIME, MultiArith, AddSub, SingleEq, SVAMP
#   --suite lm-eval --tasks NAMES                     any tasks of the EleutherAI harness; in one process
#
#   NUM_PROCESSES   processes on this machine, each with a copy of the model; default: one for every GPU, else one
set -euo pipefail
case " $* " in *" --suite lm-eval "* | *" --suite=lm-eval "*) harness=lm-eval ;; *) harness="" ;; esac
source "$(dirname "$0")/env.sh" eval $harness
cd "$ROOT"
case "${1:-}" in "" | --*) set -- runs/tiny-fura "$@" ;; esac
[ -z "$harness" ] || NUM_PROCESSES="${NUM_PROCESSES:-1}"
processes="${NUM_PROCESSES:-$(nvidia-smi -L 2> /dev/null | wc -l || true)}"
if [ "$processes" -gt 1 ]; then
    exec torchrun --standalone --nproc-per-node "$processes" -m fura_vlm.cli eval "$@"
fi
exec fura-vlm eval "$@"
