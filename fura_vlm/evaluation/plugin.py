"""What lmms-eval finds under the entry point ``lmms_eval.models``: ``--model fura_llava``."""


def manifest():
    """The manifest of the model. A function, because lmms-eval calls it while it is itself being imported."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("fura_llava", simple_class_path="fura_vlm.evaluation.lmms_model.FuraLlava")
