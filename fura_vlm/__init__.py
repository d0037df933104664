"""FuRA-VLM: instruction-tune vision-language models with FuRA (full-rank adaptation, arXiv 2605.22869).

Importing the package registers FuRA with PEFT under the type ``"FURA"``, so that ``peft.get_peft_model``,
``peft.PeftModel.from_pretrained`` and transformers' adapter methods know it.
"""

import os
import sys

__version__ = "0.1.0"

# The command line answers --help in well under a second, which torch and PEFT do not allow: it imports
# fura_vlm.fura itself, when a command needs it. Everybody else gets FuRA by importing the package.
if os.path.basename(sys.argv[0] if sys.argv else "") != "fura-vlm":
    from fura_vlm.fura import FuraConfig, FuraModel  # noqa: F401
