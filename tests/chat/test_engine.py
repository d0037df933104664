"""The engine against ``generate``, and what happens to the others when one request goes wrong."""

import gc
import time
from contextlib import nullcontext

import pytest
import torch

from fura_vlm.chat.engine import ChatError, Engine, Sampling
from fura_vlm.chat.models import load_models
from fura_vlm.chat.prompt import Exchange, build_prompt, encode

LENGTH = 12


@pytest.fixture(scope="module")
def models(run):
    return load_models(run, [])


@pytest.fixture(scope="module")
def expected(models, scenes):
    """What ``generate`` answers, alone, for each scene without and with the adapter. Made before any engine runs."""
    return {
        (scene, name): generate(models, tensors(models, scene, number), name)
        for number, scene in enumerate(scenes[:12])
        for name in (None, "default")
    }


@pytest.fixture
def engine(models, expected):
    engine = Engine(models.model, models.family, max_rows=8)
    yield engine
    engine.close()
    models.model.base_model.enable_adapter_layers()


def tensors(models, scene, number):
    """Questions of different lengths, some about a picture and some not."""
    question = "What is " + "really " * (number % 5) + "in the picture?"
    prompt = build_prompt([Exchange(question, scene if number % 4 else None)], models.family, 900)
    return encode(prompt, models.family)


@torch.inference_mode()
def generate(models, inputs, name, **settings):
    with models.model.disable_adapter() if name is None else nullcontext():
        settings = {"do_sample": False, "max_new_tokens": LENGTH} | settings
        return models.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def wait(*generations, seconds=120):
    deadline = time.monotonic() + seconds
    while not all(generation.done for generation in generations):
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.005)


def test_many_at_once_answer_as_alone(models, engine, scenes, expected):
    """Two dozen answers, of two models over one copy of the weights, more than fit at once, arriving at all times."""
    running = {}
    for number, scene in enumerate(scenes[:12]):
        for name in (None, "default"):
            running[scene, name] = engine.submit(tensors(models, scene, number), name, Sampling(max_new_tokens=LENGTH))
        time.sleep(0.02)
    wait(*running.values())
    for key, generation in running.items():
        assert generation.error is None
        assert generation.tokens == expected[key]
    assert len({tuple(tokens) for tokens in expected.values()}) > 12  # the answers tell the questions apart


def test_cancelled_answers_free_the_model(models, engine, scenes, expected):
    endless = [engine.submit(tensors(models, scenes[1], 1), None, Sampling(1.5, 1.0, 900)) for _ in range(8)]
    behind = engine.submit(tensors(models, scenes[2], 2), "default", Sampling(max_new_tokens=LENGTH))
    while not all(generation.tokens for generation in endless):
        time.sleep(0.005)
    for generation in endless:
        generation.cancel()
    wait(behind, *endless)
    assert behind.tokens == expected[scenes[2], "default"]
    assert all(generation.error is None and len(generation.tokens) < 900 for generation in endless)
    assert engine.load == (0, 0)


@pytest.mark.parametrize("when", ["prompt", "token"])
def test_running_out_of_memory_ends_what_it_concerns(models, engine, scenes, expected, when):
    """A real failure of torch's allocator, in the middle of a prompt or of a token that two answers share."""
    failing = tensors(models, scenes[1], 1)
    length = failing["input_ids"].shape[1]

    def allocate(module, args, kwargs):
        prompt = "inputs_embeds" in kwargs and kwargs["inputs_embeds"].shape[1] == length
        token = "input_ids" in kwargs and kwargs["input_ids"].shape == (2, 1)
        if prompt if when == "prompt" else token:
            torch.empty(1 << 60)

    beside = engine.submit(tensors(models, scenes[2], 2), "default", Sampling(max_new_tokens=LENGTH))
    hook = models.model.get_base_model().model.language_model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        failed = [engine.submit(failing, None, Sampling(max_new_tokens=LENGTH)) for _ in range(2)]
        wait(*failed, beside)
    finally:
        hook.remove()
    assert all("ran out of memory" in generation.error for generation in failed)
    assert beside.error is None and beside.tokens == expected[scenes[2], "default"]
    again = engine.submit(failing, "default", Sampling(max_new_tokens=LENGTH))
    wait(again)
    assert again.tokens == expected[scenes[1], "default"]
    assert engine.load == (0, 0)


def test_sampling_follows_the_model(models, engine, scenes):
    """Top-p near zero leaves the likeliest token, at any temperature; and a high temperature gives others."""
    inputs = tensors(models, scenes[1], 1)
    greedy, narrow, *hot = (
        engine.submit(inputs, None, Sampling(temperature, top_p, LENGTH))
        for temperature, top_p in ((0, 1), (2, 1e-6), (2, 1), (2, 1), (2, 1))
    )
    wait(greedy, narrow, *hot)
    assert narrow.tokens == greedy.tokens
    assert len({tuple(generation.tokens) for generation in (greedy, *hot)}) > 1


def test_nothing_is_kept_of_an_answer(models, expected, scenes):
    def tensors_alive_after(*numbers):
        engine = Engine(models.model, models.family)
        for number in numbers:
            wait(engine.submit(tensors(models, scenes[number], number), "default", Sampling(max_new_tokens=4)))
        engine.close()  # its thread has ended then, so that what is alive does not depend on how far it has come
        gc.collect()
        alive = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        models.model.base_model.enable_adapter_layers()
        return alive

    assert tensors_alive_after(1) >= tensors_alive_after(0, 1, 2, 3)


def test_an_error_without_words_ends_only_what_it_concerns(models, engine, scenes, expected):
    def fail(module, args, kwargs):
        raise RuntimeError("\n")

    hook = models.model.get_base_model().model.language_model.register_forward_pre_hook(fail, with_kwargs=True)
    failed = engine.submit(tensors(models, scenes[1], 1), None, Sampling(max_new_tokens=LENGTH))
    try:
        wait(failed, seconds=20)
    finally:
        hook.remove()
    assert failed.error == "The model failed (RuntimeError: RuntimeError)"
    again = engine.submit(tensors(models, scenes[1], 1), "default", Sampling(max_new_tokens=LENGTH))
    wait(again)
    assert again.tokens == expected[scenes[1], "default"]


def test_a_closed_engine_refuses(models, expected):
    engine = Engine(models.model, models.family)
    engine.close()
    with pytest.raises(ChatError, match="closing"):
        engine.submit({}, None, Sampling())
    models.model.base_model.enable_adapter_layers()
