"""The command line, ``fura-vlm``: what a command needs, and what is said where it fails."""

from __future__ import annotations

import logging
import sys
import warnings

from fura_vlm.errors import sentence
from fura_vlm.extras import require

EXTRAS = {
    "train": ["train"],
    "grpo": ["rl"],
    "plan": ["cli"],
    "eval": ["eval"],
    "compare": ["eval"],
    "chat": ["demo"],
    "merge": ["cli"],
    "assemble": ["cli"],
    "inspect": ["cli", "plots"],
    "data": ["data"],
}
"""The extras of pyproject.toml that each command needs."""


def main(arguments: list[str] | None = None) -> None:
    # It warns each time that faster kernels for CPUs are in yet another package.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries to one another
    arguments = sys.argv[1:] if arguments is None else arguments
    first = next((word for word in arguments[:1] if word in EXTRAS), None)
    name = f"fura-vlm {first}" if first else "fura-vlm"
    try:
        require(*EXTRAS.get(first, ["cli"]))
        from fura_vlm.commands import parse, run

        command, options = parse(arguments)
        name = f"fura-vlm {command}"
        run(command, options)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        sys.exit(f"{name}: {said}")


if __name__ == "__main__":
    main()
