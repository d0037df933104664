"""Text, tokens and labels of every family against transformers' own processor."""

import pytest
from family_talk import ONE, PICTURES, TEXT_ONLY, TWO, assistant, conversations, encode, images, user

from fura_vlm.errors import ModelError
from fura_vlm.families.base import EncodingError
from fura_vlm.families.text import Language
from fura_vlm.modelling.load import load_family


def own_ids(family, messages) -> list[int]:
    """By the processor's ``apply_chat_template``, as its documentation shows it; for LLaVA the whole with ``<s>``."""
    dicts = []
    for message in messages:
        content = [
            {"type": "text", "text": part.text} if hasattr(part, "text") else {"type": "image", "image": None}
            for part in message.parts
        ]
        for part, image in zip((p for p in content if p["type"] == "image"), images([message]), strict=True):
            part["image"] = image
        dicts.append({"role": message.role, "content": content})
    if isinstance(family, Language):
        dicts = [{"role": m["role"], "content": "".join(p["text"] for p in m["content"])} for m in dicts]
        return family.processor.apply_chat_template(dicts, tokenize=True)["input_ids"]
    made = family.processor.apply_chat_template(dicts, tokenize=True, return_dict=True)
    return list(made["input_ids"][0])


def test_tokens_are_the_processors_own(family, name):
    for messages in conversations(name):
        ids, labels = encode(family, messages)
        assert ids.tolist() == own_ids(family, messages)
        assert ((labels == -100) | (labels == ids)).all()


def test_labels_are_on_the_answers_and_their_end(family, name):
    """Where templates write the answer as it is, that is all there is between the labels."""
    for messages in conversations(name):
        ids, labels = encode(family, messages)
        end = family.tokenizer.eos_token
        said = family.tokenizer.decode(ids[labels != -100])
        wanted = "".join(f"{message.text}{end}" for message in messages if message.role == "assistant")
        assert said.replace(" ", "") == wanted.replace(" ", "")


def test_the_prompt_is_what_comes_before_the_answer(family, name):
    for messages in conversations(name):
        text = family.render(messages).text
        for number, message in enumerate(messages):
            if message.role == "assistant":
                assert text.startswith(family.prompt(messages[:number]))


def test_batch_says_what_each_says(family, name):
    many = [(messages, [image.size for image in images(messages)]) for messages in conversations(name)]
    for encoded, (messages, _) in zip(family.encode(many), many, strict=True):
        ids, labels = family.spread(encoded)
        alone = encode(family, messages)
        assert ids.tolist() == alone[0].tolist() and labels.tolist() == alone[1].tolist()


def test_expansion_is_the_processors_for_odd_sizes(family, name):
    if name == "text":
        pytest.skip("it takes no pictures")
    for size in [(28, 28), (29, 27), (61, 33), (200, 30), (31, 190), (333, 250), (640, 480)]:
        asked = super(type(family), family).expansion(*size)
        assert family.expansion(*size) == asked, size


def test_cut_never_halves_a_picture(family, name):
    if name == "text":
        pytest.skip("it takes no pictures")
    [encoded] = family.encode([(TWO, [image.size for image in images(TWO)])])
    ids, labels = family.spread(encoded)
    last = max(index for index, token in enumerate(ids) if token == family.run_id)
    for length in range(1, len(ids) + 1):
        try:
            kept = family.cut(encoded, length)
        except EncodingError as error:
            assert length <= last or (labels[:length] == -100).all()
            assert "beyond the maximum length" in str(error)
        else:
            short, short_labels = family.spread(kept)
            assert short.tolist() == ids[:length].tolist() and short_labels.tolist() == labels[:length].tolist()
            assert (short == family.run_id).sum() == (ids == family.run_id).sum()


def test_typed_tokens_are_refused(family, name):
    if name == "llava":
        pytest.skip("LLaVA v1.5's own rules: tests/data/test_llava_preprocessing.py")
    for token in family.reserved():
        [made] = family.encode([([user(f"What is {token}?"), assistant("No.")], [])])
        assert isinstance(made, EncodingError) and token in str(made)


def test_pictures_and_places_have_to_agree(family, name):
    if name in ("text", "llava"):
        pytest.skip("no template writes the places")
    family.processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    [made] = family.encode([(ONE, [PICTURES[1].size])])
    assert isinstance(made, EncodingError)


def test_a_template_that_marks_answers_is_heeded(folder_of):
    family = language(folder_of)
    family.processor.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>{% generation %}{{ m['content'] }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }} ? {% endif %}{% endfor %}"
    )
    ids, labels = encode(family, TEXT_ONLY)
    assert family.tokenizer.decode(ids[labels != -100]) == "three<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
            "once it is answered",
        ),
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", "changes answers"),
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", "learn to stop"),
        ("{{ raise_exception('no system turns here') }}", "no system turns here"),
    ],
)
def test_what_cannot_be_marked_exactly_is_refused(template, reason, folder_of):
    family = language(folder_of)
    family.processor.chat_template = template
    [made] = family.encode([(TEXT_ONLY, [])])
    assert isinstance(made, EncodingError) and reason in str(made)


def test_history_may_be_written_otherwise(folder_of):
    """Qwen3's template takes the thoughts out of all answers but the last."""
    family = language(folder_of)
    family.processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}think\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    )
    messages = [user("What?"), assistant("No."), user("How many?"), assistant("three")]
    ids, labels = encode(family, messages)
    assert family.tokenizer.decode(ids[labels != -100]) == "No.<|im_end|>think\nthree<|im_end|>"


def test_without_a_template_there_is_a_way(folder_of):
    family = language(folder_of)
    family.processor.chat_template = None
    with pytest.raises(ModelError, match="--conversation vicuna or alpaca"):
        family.encode([(TEXT_ONLY, [])])
    for form in ("vicuna", "alpaca"):
        other = Language(family.processor, family.config, conversation=form)
        ids, labels = encode(other, [user("How many?"), assistant("three")])
        assert other.tokenizer.decode(ids[labels != -100]).strip() == "three<|im_end|>"
        assert "How many?" in other.tokenizer.decode(ids[labels == -100])


def test_a_trained_language_model_is_asked_as_it_was_trained(folder_of, tmp_path):
    """Its form goes along with its tokenizer, into the run's folder and a merged model's."""
    trained = load_family(str(folder_of("text")), conversation="alpaca")
    trained.processor.save_pretrained(tmp_path)
    asked = load_family(str(tmp_path), str(folder_of("text")))
    assert asked.conversation == "alpaca"
    assert (
        asked.prompt([user("How many?")])
        == trained.prompt([user("How many?")])
        != language(folder_of).prompt([user("How many?")])
    )
    assert load_family(str(tmp_path), str(folder_of("text")), conversation="vicuna").conversation == "vicuna"
    assert load_family(str(folder_of("text"))).conversation == "template"


def test_a_language_model_takes_no_pictures(folder_of):
    [made] = language(folder_of).encode([(ONE, [(1, 1)])])
    assert isinstance(made, EncodingError) and "text alone" in str(made)


def language(folder_of) -> Language:
    folder = folder_of("text")
    return Language(Language.load_processor(str(folder), None), None)
