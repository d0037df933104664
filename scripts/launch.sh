# Sourced by the training scripts:  launch COMMAND [ARGUMENTS ...]  runs `fura-vlm COMMAND` under DeepSpeed.
#
#   NUM_PROCESSES   processes on this machine; default: every GPU, or one process where there is none
#   MASTER_PORT     the port they meet on; default: a free one
#   DEEPSPEED_ARGS  more arguments for the deepspeed launcher (--hostfile, --include, ...)
#
# Ctrl-C and SIGTERM reach the training processes alone. They save a checkpoint and end by themselves; the launcher
# would give them 30 seconds and then kill them.

# Sends SIGTERM to the training processes below a launcher, and neither to itself nor to their data workers, which
# are copies of them.
stop_training() {
    python - "$1" << 'PYTHON'
import sys
import psutil


def trains(process):
    return ("-m", "fura_vlm.cli") in zip(process.cmdline(), process.cmdline()[1:])


for process in psutil.Process(int(sys.argv[1])).children(recursive=True):
    if trains(process) and not trains(process.parent()):
        process.terminate()
PYTHON
}

launch() {
    local processes="${NUM_PROCESSES:-}" job status=0
    if [ -z "$processes" ] && ! nvidia-smi -L > /dev/null 2>&1; then
        processes=1
    fi
    if ! nvidia-smi -L > /dev/null 2>&1; then  # processes share the cores
        export DS_ACCELERATOR=cpu
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}"
    fi
    local port="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
    set -m  # a process group of its own
    # The launcher's own log and the libraries' notices to programmers would bury what the run has to say.
    PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}" \
        deepspeed --quiet ${processes:+--num_gpus "$processes"} --master_port "$port" --no_local_rank ${DEEPSPEED_ARGS:-} \
        --module fura_vlm.cli "$@" &
    job=$!
    set +m
    trap 'echo; echo "Stopping: the run saves a checkpoint first."; stop_training "$job"' INT TERM
    while kill -0 "$job" 2> /dev/null; do  # a trapped signal ends a wait early
        status=0
        wait "$job" || status=$?
    done
    trap - INT TERM
    return "$status"
}
