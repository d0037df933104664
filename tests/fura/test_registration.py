"""PEFT knows FuRA once the package is imported, which costs nothing before PEFT itself is."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
sys.argv = ["/usr/bin/fura-vlm"]  # the program's name is of no importance
import fura_vlm
light = sorted({"torch", "peft", "transformers"} & set(sys.modules))
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
print(json.dumps({
    "light": light,
    "type": configs["FURA"].__name__,
    "same": configs["FURA"] is fura_vlm.FuraConfig is fura_vlm.fura.FuraConfig,
    "made": type(peft.PeftConfig.from_peft_type(peft_type="FURA")).__name__,
    "left": [type(finder).__module__ for finder in sys.meta_path if type(finder).__module__ == "fura_vlm"],
}))
"""


def test_registered_as_soon_as_peft_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "light": [], "type": "FuraConfig", "same": True, "made": "FuraConfig", "left": [],
    }  # fmt: skip
