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
# Ctrl-C and SIGTERM go to the training processes only, not to the launcher. They save a checkpoint and end by
# themselves; the launcher would kill them after 30 seconds.

# Sends SIGTERM to the training processes below a launcher, or to those of a SLURM job on this machine, but not to the
# launcher or to data workers, which are copies of them. If all of them are on other machines, it ends the launcher,
# which ends them. One process is enough, because it tells the others.
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
        *" --hostfile"*) ;;  # the file says how many processes each machine has
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
    # The launcher's log and the libraries' notices to programmers would hide the messages of the run. The launcher also
    # logs an ERROR for a run that saved and stopped. What only the launcher knows is printed below.
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
