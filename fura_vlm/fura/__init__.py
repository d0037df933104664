"""FuRA as a PEFT method. Importing this package registers it under the type ``"FURA"``."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from fura_vlm.fura.config import FuraConfig, FuraType
from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.export import export_delta
from fura_vlm.fura.inspect import plot_spectrum, spectrum_report, spectrum_table
from fura_vlm.fura.layer import FuraLayer, FuraLinear, set_fp8_backward
from fura_vlm.fura.model import FuraModel

PEFT_TYPE_TO_CONFIG_MAPPING[FuraType.FURA] = FuraConfig
PEFT_TYPE_TO_TUNER_MAPPING[FuraType.FURA] = FuraModel
PEFT_TYPE_TO_PREFIX_MAPPING[FuraType.FURA] = FuraModel.prefix

__all__ = [
    "FuraConfig",
    "FuraError",
    "FuraLayer",
    "FuraLinear",
    "FuraModel",
    "FuraType",
    "export_delta",
    "plot_spectrum",
    "set_fp8_backward",
    "spectrum_report",
    "spectrum_table",
]
