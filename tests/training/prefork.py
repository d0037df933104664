"""Run by conftest.py: python prefork.py [MODULE ...]. Trains in copies of this process, which has imported everything
already, the modules with it.

A copy is what a launcher starts: a process of its own, with its rank in its environment, that runs the command and
ends. Only the seconds in which it would import PyTorch, transformers and DeepSpeed are saved.

Each line of its input is an order in JSON: ``arguments`` of the command, ``environments`` (a dict for each process)
and ``output``, a file for all that they print; ``until``, a path or None: all are killed once it is there. The answer
is a line with the exit status of each, None where it had to be killed.

``MOST_RECORDS`` in the environment stands in for a small memory (``limit_memory``).
"""

import atexit
import importlib
import json
import os
import signal
import sys
import time
import traceback

PATIENCE = 300  # seconds, on a machine that does much else

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

import bitsandbytes  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import torch  # noqa: E402

import fura_vlm.training.train as recipe  # noqa: E402
from fura_vlm.cli import main  # noqa: E402

for module in sys.argv[1:]:
    importlib.import_module(module)


def serve() -> list[str]:
    """Carries out orders to the end of the input, and ends. In a copy it returns, with the command's arguments."""
    for line in sys.stdin:
        order = json.loads(line)
        processes = []
        for environment in order["environments"]:
            process = os.fork()
            if not process:
                become(environment, order["output"])
                return order["arguments"]
            processes.append(process)
        answers.write(json.dumps(statuses_of(processes, order.get("until"))) + "\n")
        answers.flush()
    sys.exit()


def become(environment: dict[str, str], output: str) -> None:
    os.environ |= environment
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # that variable has been read long ago
    if "MOST_RECORDS" in environment:
        limit_memory(environment["MOST_RECORDS"].split()[int(environment["RANK"])])
    answers.close()
    log, nothing = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for stream, file in ((0, nothing), (1, log), (2, log)):
        os.dup2(file, stream)


def limit_memory(most: str) -> None:
    """Has the model's last layer run out of memory in training when a batch has more records than ``most``: two
    numbers, without and with gradient checkpointing, such as 2/8."""
    plain, checkpointed = map(int, most.split("/"))
    prepare = recipe.prepare

    def full(layer, args) -> None:
        if layer.training and len(args[0]) > (checkpointed if layer.gradient_checkpointing else plain):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def prepared(model, config, family):
        made = prepare(model, config, family)
        family.parts(made).decoder.layers[-1].register_forward_pre_hook(full)
        return made

    recipe.prepare = prepared


def statuses_of(processes: list[int], until: str | None) -> list[int | None]:
    deadline, statuses = time.monotonic() + PATIENCE, {}
    while len(statuses) < len(processes):
        if until and os.path.exists(until):
            for process in set(processes) - set(statuses):
                os.kill(process, signal.SIGKILL)
            until = None
        for process in set(processes) - set(statuses):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                statuses[process] = None
        time.sleep(0.01)
    return [statuses[process] for process in processes]


def run(arguments: list[str]) -> None:
    """In a copy: the command, and its end as Python's own, but for two seconds in which all modules are taken apart."""
    status: object = 1
    try:
        main(arguments)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    if isinstance(status, str):  # said when the exception is gone, and what it held: a bar ends its line
        print(status, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    run(serve())
