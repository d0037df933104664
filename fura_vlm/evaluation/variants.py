"""Tasks that are another task of lmms-eval with some settings changed, written as YAML.

lmms-eval's ``include`` needs the path of the other file, which differs from machine to machine. A variant names it
below lmms-eval's folder of tasks::

    task: pope_paper
    class: !function fura_vlm.evaluation.variants.Variant
    extends: pope/pope.yaml
    metric_list: ...
"""

from __future__ import annotations

from pathlib import Path

import lmms_eval.tasks
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config


def extended(config: dict) -> dict:
    """``config`` over the task it extends; functions named in the YAML files are loaded."""
    own = {key: value for key, value in config.items() if key not in ("class", "extends")}
    if "extends" not in config:
        return own
    return load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / config["extends"])) | own


class Variant(ConfigurableTask):
    """What lmms-eval makes of such a file, when it is started with ``--include_path eval``."""

    def __init__(self, config: dict):
        super().__init__(config=extended(config))
