"""What knows of one family of models, and which way imports go."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fura_vlm"
WORDS = re.compile(r"Llava|vision_tower|multi_modal_projector|crop_size|ASSISTANT")

MAY_KNOW = ("families/", "modelling/assemble.py", "embedded/")
"""Here LLaVA-1.5 is meant."""

SETTINGS = {"vision_tower", "vision_tower_lr", "finetune_vision_tower"}
"""Names of settings are the field's own: they may be a field, an attribute or an argument's name anywhere."""

STILL_TO_DO = {}
"""Files that know more than they should, with how many lines of them do."""

EMBEDDED = ("modelling/tiny.py", "training/pretrain_tiny.py")
"""The embedded model, until it has a folder of its own."""
