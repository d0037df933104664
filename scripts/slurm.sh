#!/usr/bin/env bash
# Any of the training scripts as a SLURM job, with one launcher on each node:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh scripts/finetune_fura.sh CONFIG.yaml [--KEY VALUE ...]
#
# Repository, .venv, model, data and run folder must be on a file system that all nodes share. Five minutes before the
# job's time is up, the run saves a checkpoint, and the job is queued again to continue from there.
#SBATCH --job-name=fura-vlm
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
source scripts/env.sh train  # once, here, and not on every node
source scripts/launch.sh
export NUM_NODES="$SLURM_JOB_NUM_NODES"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"  # two jobs may share a node

stopping=""
trap 'stopping=yes; stop_training job "$SLURM_JOB_ID"' TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$@"' node "$@" &
step=$!
status=0
while kill -0 "$step" 2> /dev/null; do  # a trapped signal ends a wait early
    status=0
    wait "$step" || status=$?
done
if [ -n "$stopping" ] && [ "$status" = 143 ]; then  # it has saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
