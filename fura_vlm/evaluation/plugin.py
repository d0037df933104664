"""What lmms-eval finds under the entry point ``lmms_eval.models``: ``--model fura_vlm``, also as ``fura_llava``."""

NAME = "fura_vlm"  # in lmms-eval
FORMER_NAME = "fura_llava"  # which people still type


def manifest():
    """The manifest of the model. A function, because lmms-eval calls it while it is itself being imported."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "fura_vlm.evaluation.lmms_model.FuraVLM"
    return ModelManifest(NAME, simple_class_path=path, aliases=(FORMER_NAME,))
