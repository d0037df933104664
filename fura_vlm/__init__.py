"""FuRA-VLM: instruction-tune vision-language models with FuRA (full-rank adaptation, arXiv 2605.22869).

Importing the package registers FuRA with PEFT under the type ``"FURA"``, so that ``peft.get_peft_model``,
``peft.PeftModel.from_pretrained`` and transformers' adapter methods know it. If PEFT is not imported yet, this happens
when it is: the package itself imports neither PEFT nor torch, so its command line answers at once.
"""

import importlib
import importlib.util
import sys

__version__ = "0.1.0"

__all__ = ["FuraConfig", "FuraModel"]


class _RegisterWithPeft:
    """Waits in ``sys.meta_path`` for the import of PEFT, and registers FuRA right after it."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module("fura_vlm.fura")

            spec.loader.exec_module = execute_and_register
        return spec


if "peft" in sys.modules:
    import fura_vlm.fura  # noqa: F401
else:
    sys.meta_path.insert(0, _RegisterWithPeft())


def __getattr__(name: str):
    if name == "fura" or name in __all__:
        fura = importlib.import_module("fura_vlm.fura")
        return fura if name == "fura" else getattr(fura, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
