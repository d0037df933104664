"""Speed of the evaluation, end to end: decoding and preprocessing of pictures, generation, decoding of answers.

    python benchmarks/evaluation.py                    LLaVA-1.5-7B shapes, random weights, on a GPU
    python benchmarks/evaluation.py --model data/tiny-llava --samples 32    a model with weights; runs anywhere

Every sample is a JPEG of 640 x 480 pixels of noise over a gradient, decoded anew, and a question that makes about 64
tokens of text beside the 576 of the picture; every answer has 16 new tokens. In the same process it then measures what
lmms-eval does, one sample at a time: first with its pictures, as a whole; then the model alone, inputs prepared.
Prints one JSON object; rates are samples a second.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fura_vlm.evaluation.lmms_model import FuraLlava, _Prepared, generation_arguments
from fura_vlm.modelling.load import load_base, load_processor

GENERATION = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
QUESTION = "Is there a red car to the left of the tree?\nAnswer the question using a single word or phrase."


class Jpegs:
    """Documents whose picture is decoded when it is asked for, as those of a benchmark are."""

    _fingerprint = "noise"

    def __init__(self, number: int):
        rng = np.random.default_rng(0)
        gradient = np.linspace(0, 200, 640)[None, :, None]
        self.files = []
        for _ in range(min(number, 64)):
            buffer = io.BytesIO()
            pixels = gradient + rng.integers(0, 56, (480, 640, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
            self.files.append(buffer.getvalue())

    def __getitem__(self, number: int) -> dict:
        return {"image": Image.open(io.BytesIO(self.files[number % len(self.files)])).convert("RGB")}


def model_of_7b_shapes() -> LlavaForConditionalGeneration:
    """Random weights in bfloat16, made on the GPU."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5),
        image_token_id=32000, image_seq_length=576, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def processor_for(config: LlavaConfig, tokenizer_from: str):
    """The processor of ``tokenizer_from`` for pictures of another size, with the ids of ``config``."""
    processor = load_processor(tokenizer_from)
    size = config.vision_config.image_size
    processor.image_processor.size = {"shortest_edge": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    processor.patch_size = config.vision_config.patch_size
    return processor


def requests(number: int) -> list[Instance]:
    return [
        Instance(
            "generate_until",
            (QUESTION, dict(GENERATION), lambda document: [document["image"]], n, "speed", "test"),
            0,
            {"task": "speed", "doc_id": n, "repeats": 1},
        )
        for n in range(number)
    ]


def rate(model: FuraLlava, number: int) -> float:
    _wait(model)
    start = time.perf_counter()
    model.generate_until(requests(number))
    _wait(model)
    return number / (time.perf_counter() - start)


def model_only_rate(model: FuraLlava, number: int) -> float:
    """One prepared sample at a time."""
    prepared = _Prepared(model.processor, model.task_dict, requests(1), [[0]], model.dtype)[0]
    generation = generation_arguments(GENERATION)
    model._answer(prepared, generation)
    _wait(model)
    start = time.perf_counter()
    for _ in range(number):
        model._answer(prepared, generation)
    _wait(model)
    return number / (time.perf_counter() - start)


def _wait(model: FuraLlava) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA with weights; by default random ones of the 7B's shapes, on a GPU")
    parser.add_argument("--tokenizer", default="data/tiny-llava", help="processor for the random weights")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--single", type=int, default=16, help="samples of the runs one at a time")
    parser.add_argument("--batch_size", default="auto")
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    if options.model:
        model = load_base(options.model, torch.bfloat16 if cuda else torch.float32).to("cuda" if cuda else "cpu")
        processor = load_processor(options.model)
    elif cuda:
        model = model_of_7b_shapes()
        processor = processor_for(model.config, options.tokenizer)
        model.config.image_token_id = processor.image_token_id  # that of the tokenizer in use
    else:
        parser.error("the 7B shapes need a GPU; name a small model with --model")

    lm = FuraLlava.from_model(model, processor, options.batch_size, options.workers)
    single = FuraLlava.from_model(model, processor, 1, 0)
    lm.task_dict = single.task_dict = {"speed": {"test": Jpegs(options.samples)}}
    tokens = _Prepared(processor, lm.task_dict, requests(1), [[0]], lm.dtype)[0]["input_ids"].shape[1]
    rate(lm, min(options.samples, 2 * lm.batch_size))  # warms up, and finds the batch size that fits
    results = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "prompt_tokens": tokens,
        "new_tokens": GENERATION["max_new_tokens"],
        "samples": options.samples,
        "batch_size": lm.batch_size,
        "batched, end to end": rate(lm, options.samples),
        "batch 1, end to end": rate(single, options.single),
        "batch 1, model only": model_only_rate(single, options.single),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
