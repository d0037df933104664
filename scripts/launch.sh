# Sourced by the training scripts:  launch COMMAND [ARGUMENTS ...]  runs `fura-vlm COMMAND` under DeepSpeed.
#
#   NUM_PROCESSES   processes on this machine; default: every GPU, or one process where there is none
#   MASTER_PORT     the port they meet on; default: a free one, or 29500 on several machines
#   DEEPSPEED_ARGS  more arguments for the deepspeed launcher (--hostfile, --include, ...)
#
# On several machines, started once on each of them, without ssh (docs/machines.md has the other ways):
#
#   NUM_NODES       how many machines
#   NODE_RANK       which one this is, from 0
#   MASTER_ADDR     name or address of number 0
#
# Ctrl-C and SIGTERM reach the training processes alone. They save a checkpoint and end by themselves; the launcher
# would give them 30 seconds and then kill them.

# Sends SIGTERM to the training processes below a launcher, or those of a SLURM job on this machine, and neither to the
# launcher nor to data workers, which are copies of them. Where they are all on other machines it ends the launcher,
# which ends them. One process is enough: it tells the others.
#
#   stop_training launcher PID | job ID
stop_training() {
    python - "$@" << 'PYTHON'
import sys
import psutil


def unless_gone(look):
    def answer(process):
        try:
            return look(process)
        except psutil.Error:  # gone, or ended and not yet waited for, or somebody else's
            return False

    return answer


@unless_gone
def trains(process):
    command = process.cmdline()
    return ("-m", "fura_vlm.cli") in zip(command, command[1:])


@unless_gone
def copied(process):
    parent = process.parent()
    return parent is not None and trains(parent)


@unless_gone
def in_job(process):
    return process.environ().get("SLURM_JOB_ID") == sys.argv[2] and trains(process)


if sys.argv[1] == "job":
    found, otherwise = filter(in_job, psutil.process_iter()), []
else:
    try:
        launcher = psutil.Process(int(sys.argv[2]))
        found, otherwise = filter(trains, launcher.children(recursive=True)), [launcher]
    except psutil.NoSuchProcess:  # the signal has reached it, too
        sys.exit()
for process in [process for process in found if not copied(process)] or otherwise:
    unless_gone(psutil.Process.terminate)(process)
PYTHON
}

launch() {
    local processes="${NUM_PROCESSES:-}" nodes="${NUM_NODES:-1}" gpus job status=0 where=() hosts=""
    gpus="$(nvidia-smi -L 2> /dev/null | wc -l || true)"
    case " ${DEEPSPEED_ARGS:-}" in
        *" --hostfile"*) ;;  # says itself how many processes there are, on machines unlike this one
        *)
            if [ "$gpus" = 0 ]; then  # processes share the cores
                processes="${processes:-1}"
                export DS_ACCELERATOR=cpu
                export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}"
            elif [ "${processes:-0}" -gt "$gpus" ]; then
                echo "NUM_PROCESSES is $processes and this machine has $gpus GPU(s): leave it unset to use them all" >&2
                return 1
            fi
            ;;
    esac
    if [ "$nodes" -gt 1 ]; then
        : "${NODE_RANK:?with NUM_NODES=$nodes say which one this machine is, from 0}"
        : "${MASTER_ADDR:?with NUM_NODES=$nodes say the name or address of machine 0}"
        hosts="$(mktemp)"
        processes="${processes:-$gpus}"
        for ((i = 0; i < nodes; i++)); do
            echo "node$i slots=$processes" >> "$hosts"
        done
        where=(--no_ssh --hostfile "$hosts" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
               --master_port "${MASTER_PORT:-29500}")
    else
        local port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
        where=(${processes:+--num_gpus "$processes"} --master_port "${MASTER_PORT:-$(python -c "$port")}")
    fi
    set -m  # a process group of its own
    # The launcher's own log and the libraries' notices to programmers would bury what the run has to say. Of a run that
    # saved and stopped the launcher says ERROR, too; what it alone knows is said below.
    PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}" \
        deepspeed --log_level critical --no_local_rank "${where[@]}" ${DEEPSPEED_ARGS:-} --module fura_vlm.cli "$@" &
    job=$!
    set +m
    trap 'echo; echo "Stopping: the run saves a checkpoint first."; stop_training launcher "$job"' INT TERM
    while kill -0 "$job" 2> /dev/null; do  # a trapped signal ends a wait early
        status=0
        wait "$job" || status=$?
    done
    trap - INT TERM
    [ -z "$hosts" ] || rm -f "$hosts"
    if [ "$status" -gt 192 ]; then  # minus the number of a signal
        echo "A training process was ended by signal $((256 - status))$(
            [ "$status" != 247 ] || echo '; the system often does that when memory runs out')." >&2
    fi
    return "$status"
}
