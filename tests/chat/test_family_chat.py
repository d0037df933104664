"""The chat of every family against its model's own ``generate``: a small random model of the real classes each."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from family_models import BUILDERS, CHATML, _qwen, _save, _text, bpe
from family_talk import picture
from peft import LoraConfig, get_peft_model

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError, Engine, Sampling
from fura_vlm.chat.models import Models, as_seen
from fura_vlm.chat.prompt import Exchange, build_prompt, encode, read_image
from fura_vlm.chat.session import Chat, Session
from fura_vlm.chat.terminal import chat as talk
from fura_vlm.families.qwen_vl import QwenVL
from fura_vlm.modelling.load import load_any

LENGTH = 24  # beyond the 16 tokens that gemma3's windows see
QUESTIONS = ["What is this?", "How many are there in the picture? Describe it please.", "Is it red? Yes or no?"]


def scaled(folder: Path) -> None:
    """A language model that scales what its head makes."""
    _words(folder, transformers.GraniteConfig, logits_scaling=4.0)


def convolution(folder: Path) -> None:
    """A language model that keeps more of the tokens than keys and values: rows cannot be joined."""
    _words(folder, transformers.Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)


def _words(folder: Path, config_class, **settings) -> None:
    tokenizer = bpe(
        ["<|im_start|>", "<|im_end|>", "<pad>"], eos_token="<|im_end|>", pad_token="<pad>",
        chat_template=CHATML.replace("IMAGE", "''"),
    )  # fmt: skip
    config = config_class(vocab_size=len(tokenizer), **_text(**settings))
    _save(folder, transformers.AutoModelForCausalLM._model_mapping[config_class], config, tokenizer, tokenizer)


def general(folder: Path) -> None:
    """Qwen3.5, which has no file in families/: linear attention in half of its layers, and 3-D positions."""
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 14, "out_hidden_size": 32,
        "num_position_embeddings": 64, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    linear = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip

    def config(text_config, **settings):
        return transformers.Qwen3_5Config(text_config=text_config | linear, **settings)

    _qwen(
        folder, "3", config, transformers.Qwen3_5ForConditionalGeneration, transformers.Qwen3VLProcessor, vision
    )  # fmt: skip


OWN = {made.__name__: made for made in (scaled, convolution, general)}


@pytest.fixture(scope="module", params=[*BUILDERS, *OWN])
def models(request, folder_of, tmp_path_factory) -> Models:
    if request.param in OWN:
        folder = tmp_path_factory.mktemp(request.param)
        OWN[request.param](folder)
    else:
        folder = folder_of(request.param)
    model, family = load_any(str(folder))
    torch.manual_seed(0)
    layers = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj", "w2"))]
    config = LoraConfig(target_modules=layers, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return Models(str(folder), get_peft_model(model, config).eval(), family, {"tuned": "default", "base": None})


@pytest.fixture
def engine(models):
    engine = Engine(models.model, models.family, max_rows=8)
    yield engine
    engine.close()
    models.model.base_model.enable_adapter_layers()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(61, 33), (30, 95), (120, 50)]):
        picture(*size, number).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(3)]


def tensors(models, *exchanges) -> dict:
    return encode(build_prompt([Exchange(*exchange) for exchange in exchanges], models.family, 1800), models.family)


@torch.inference_mode()
def generate(models, inputs, name, **settings) -> list[int]:
    settings = {"do_sample": False, "max_new_tokens": LENGTH} | settings
    with models.model.disable_adapter() if name is None else nullcontext():
        made = models.model.generate(**inputs, **settings)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def written(engine, asked: list[tuple[dict, str | None]]) -> list:
    """The answers to questions that are asked at once."""
    generations = [engine.submit(inputs, name, Sampling(max_new_tokens=LENGTH)) for inputs, name in asked]
    deadline = time.monotonic() + 120
    while not all(generation.done for generation in generations):
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.005)
    assert [generation.error for generation in generations] == [None] * len(generations)
    return generations


def conversations(models, files) -> list[tuple]:
    """Of different lengths, with one, two and no pictures, one of them with a turn before."""
    shown = files if models.family.sees else [None] * 3
    return [
        [(QUESTIONS[0], shown[0])],
        [(QUESTIONS[1], None)],
        [(QUESTIONS[2], shown[1], "No. A cat and a red dog."), (QUESTIONS[0], shown[2])],
        [(QUESTIONS[1] * 4, shown[2])],
    ]


def test_rows_answer_as_generate_does(models, engine, files):
    """Alone, and all at once over the base and the adapter, in an order in which each remembers another's pictures."""
    asked = [
        (tensors(models, *conversation), name)
        for conversation in conversations(models, files)
        for name in ("default", None)
    ]
    engine.close()  # ``generate`` has the model for itself
    models.model.base_model.enable_adapter_layers()
    expected = [generate(models, inputs, name) for inputs, name in asked]
    engine = Engine(models.model, models.family, max_rows=8)
    try:
        together = [generation.tokens for generation in written(engine, asked)]
        alone = [written(engine, [each])[0].tokens for each in asked[::-1]][::-1]
    finally:
        engine.close()
    assert alone == expected
    assert together == expected
    assert len({tuple(tokens) for tokens in expected}) > 4  # the answers tell the questions apart
    assert any(len(tokens) == LENGTH for tokens in expected)


def test_a_second_turn(models, engine, files):
    """The answer that the chat has written goes into the next prompt as text; the picture stays in the first one."""
    first = (QUESTIONS[0], files[0] if models.family.sees else None)
    [answer] = written(engine, [(tensors(models, first), "default")])
    second = tensors(models, (*first, models.text(answer)), (QUESTIONS[1], None))
    [again] = written(engine, [(second, "default")])
    engine.close()
    models.model.base_model.enable_adapter_layers()
    assert again.tokens == generate(models, second, "default")


def test_lengths_are_those_of_the_tensors(models, files):
    """What is forgotten and cut depends on them."""
    for conversation in conversations(models, files):
        exchanges = [Exchange(*exchange) for exchange in conversation]
        length = encode(build_prompt(exchanges, models.family, 1800), models.family)["input_ids"].shape[1]
        assert build_prompt(exchanges, models.family, length).notice is None
        try:
            assert build_prompt(exchanges, models.family, length - 1).notice
        except ChatError as error:
            assert "do not fit" in str(error)


def test_tokens_that_a_user_types_are_text(models):
    plain = build_prompt([Exchange("What is this?")], models.family, 1800).text
    for token in models.family.reserved():
        assert build_prompt([Exchange(f"What{token} is this?")], models.family, 1800).text == plain


def test_marks_of_turns_are_among_them(models):
    if "<|im_end|>" in models.family.tokenizer.get_vocab():
        assert {"<|im_start|>", "<|im_end|>"} <= models.family.reserved()


def test_what_is_seen(models, files):
    """The number of tokens is that of the prompt; LLaVA-1.5's own words are in test_serving.py."""
    family = models.family
    if not family.sees:
        with pytest.raises(ChatError, match="takes text alone"):
            build_prompt([Exchange("What is this?", files[0])], family, 1800)
        return
    seen, words = as_seen(files[2], family)
    assert words.startswith("120 x 50 pixels become ")
    if family.enough is None:
        assert seen.size == (120, 50)
        tokens = int((tensors(models, ("What is this?", files[2]))["input_ids"] == family.run_id).sum())
        assert words == f"120 x 50 pixels become {tokens} tokens."


def test_a_picture_is_read_smaller_only_where_nothing_is_lost(models, tmp_path):
    if not models.family.sees:
        return
    picture(2800, 2700).save(tmp_path / "large.png")
    size = (1400, 1350) if models.family.enough else (2800, 2700)
    assert read_image(str(tmp_path / "large.png"), models.family).size == size


def test_a_model_that_is_to_repeat_little(models, engine, files):
    """Published Qwen2.5-VL ask for it in generation_config.json, and ``generate`` heeds that when it is greedy, too."""
    engine.close()
    models.model.base_model.enable_adapter_layers()
    settings = models.model.get_base_model().generation_config
    inputs = [tensors(models, *conversation) for conversation in conversations(models, files)]
    usual = [generate(models, each, "default") for each in inputs]
    settings.repetition_penalty = 1.5
    try:
        expected = [generate(models, each, "default") for each in inputs]
        engine = Engine(models.model, models.family, max_rows=8)
        made = [generation.tokens for generation in written(engine, [(each, "default") for each in inputs])]
        engine.close()
    finally:
        settings.repetition_penalty = None
        models.model.base_model.enable_adapter_layers()
    assert made == expected != usual


def test_drawn_answers(models, engine):
    """With the same random numbers ``generate`` draws the same, so the probabilities are the same."""
    inputs = tensors(models, (QUESTIONS[1], None))
    drawn = []
    for seed in range(3):
        torch.manual_seed(seed)
        generation = engine.submit(inputs, "default", Sampling(2.0, 0.8, LENGTH))
        while not generation.done:
            time.sleep(0.005)
        drawn.append(generation.tokens)
    engine.close()
    models.model.base_model.enable_adapter_layers()
    for seed, tokens in enumerate(drawn):
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 2.0, "top_p": 0.8, "top_k": 0}
        assert generate(models, inputs, "default", **settings) == tokens
    assert len(set(map(tuple, drawn))) > 1


def test_a_picture_that_the_model_refuses(models, tmp_path):
    """Qwen's processors take none that is two hundred times as wide as high; the reason and the way out are said."""
    if not isinstance(models.family, QwenVL):
        return
    picture(4000, 10).save(tmp_path / "long.png")
    with pytest.raises(ChatError, match="^The model takes no picture of 4000 x 10 pixels: .* send another picture$"):
        build_prompt([Exchange("What is this?", str(tmp_path / "long.png"))], models.family, 1800)


def test_a_conversation_that_the_template_refuses(models):
    """One that demands turns in turn, as Gemma's does; a question whose reading was broken off has no answer."""
    before = models.family.processor.chat_template
    models.family.processor.chat_template = "{{ raise_exception('turns must alternate') }}"
    try:
        exchanges = [Exchange("One?"), Exchange("Two?")]
        if models.family.conversation != "template":
            assert build_prompt(exchanges, models.family, 1800).text
            return
        with pytest.raises(ChatError, match=r"refuses the conversation \(turns must alternate\): start a new one"):
            build_prompt(exchanges, models.family, 1800)
    finally:
        models.family.processor.chat_template = before


def test_a_session_with_and_without_pictures(models, files):
    """A picture that a program sends to a model of text alone is refused, and the conversation goes on."""
    chat = Chat(models, max_users=2)
    session = Session()

    async def ask(image):
        async for _ in chat.ask(session, QUESTIONS[0], image, ["base"], Sampling(max_new_tokens=4)):
            pass

    async def talk_twice():
        if models.family.sees:
            await ask(files[0])
        else:
            with pytest.raises(ChatError, match="takes text alone: ask without a picture"):
                await ask(files[0])
            assert not session.turns
        await ask(None)

    try:
        with ThreadPoolExecutor() as pool:  # the driver of the browser may have a loop of its own in this thread
            pool.submit(asyncio.run, talk_twice()).result()
        assert len(session.turns) == 1 + models.family.sees and not session.busy
    finally:
        chat.engine.close()
        models.model.base_model.enable_adapter_layers()


@pytest.mark.parametrize("name", ["text", "qwen2_5_vl"])
def test_the_terminal_asks_for_a_picture_where_the_model_takes_one(name, folder_of, files, capsys):
    settings = {"model": str(folder_of(name)), "question": QUESTIONS[0], "max_new_tokens": LENGTH}
    wrong, right = (files[0], None) if name == "text" else (None, files[0])
    with pytest.raises(ChatError, match="name no picture" if name == "text" else "Name a picture"):
        talk(ChatConfig(image=wrong, **settings))
    capsys.readouterr()
    talk(ChatConfig(image=right, **settings))
    model, family = load_any(settings["model"])
    inputs = encode(build_prompt([Exchange(QUESTIONS[0], right)], family, 1800), family)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == family.tokenizer.decode(ids, skip_special_tokens=True).strip()
