"""The formats of records, each against messages written by hand."""

import json

import pytest

from fura_vlm.data.formats import InvalidRecord, named_pictures, parse
from fura_vlm.data.records import read_records
from fura_vlm.families.messages import Message, Picture, Text

WHAT, CAT = "What is this?", "A cat."


def shape(message: Message) -> tuple:
    """Role and parts; tuples of text and picture would be equal otherwise."""
    return message.role, *((type(part).__name__, part[0]) for part in message.parts)


def read(item) -> list[tuple]:
    parsed = parse(item, "/data")
    assert parsed.note is None
    return [shape(message) for message in parsed.messages]


def user(*parts):
    return ("user", *(("Picture", p[1:]) if p.startswith("@") else ("Text", p) for p in parts))


def assistant(text=CAT):
    return ("assistant", ("Text", text))


TALK = [{"from": "human", "value": WHAT}, {"from": "gpt", "value": CAT}]
CHAT = [{"role": "user", "content": WHAT}, {"role": "assistant", "content": CAT}]
PART = {"type": "text", "text": WHAT}
COLUMN = {"type": None, "text": None, "image": None, "index": None}  # how columns write parts: with all keys


def asked(*content, role="user"):
    return [{"role": role, "content": list(content)}, *CHAT[1:]]


@pytest.mark.parametrize(
    "item, expected",
    [
        # LLaVA and ShareGPT
        ({"conversations": TALK}, [user(WHAT), assistant()]),
        (
            {"image": ["a.png", "b.png"], "conversations": [{**TALK[0], "value": "<image>\n<image>\nSame?"}, TALK[1]]},
            [user("@/data/a.png", "\n", "@/data/b.png", "\nSame?"), assistant()],
        ),
        (
            {
                "images": ["a.png", "b.png", "c.png"],
                "conversations": [
                    {"from": "system", "value": "Like <image>."},
                    {"from": "user", "value": "Is it <image>?"},
                    {"from": "assistant", "value": "No."},
                    {"from": "human", "value": "<image>"},
                    {"from": "chatgpt", "value": CAT},
                ],
            },
            [
                ("system", ("Text", "Like "), ("Picture", "/data/a.png"), ("Text", ".")),
                user("Is it ", "@/data/b.png", "?"),
                assistant("No."),
                user("@/data/c.png"),
                assistant(),
            ],
        ),
        ({"system": "Be brief.", "conversations": TALK}, [("system", ("Text", "Be brief.")), user(WHAT), assistant()]),
        ({"conversations": CHAT}, [user(WHAT), assistant()]),
        (
            {"images": "a.png", "conversations": [{**TALK[0], "value": "<image>"}, TALK[1]]},
            [user("@/data/a.png"), assistant()],
        ),
        # Messages
        (
            {"messages": [{"role": "system", "content": "S"}, *CHAT]},
            [("system", ("Text", "S")), user(WHAT), assistant()],
        ),
        (
            {"messages": [{"role": "developer", "content": "S"}, *CHAT]},
            [("system", ("Text", "S")), user(WHAT), assistant()],
        ),
        ({"messages": CHAT, "images": []}, [user(WHAT), assistant()]),
        ({"messages": CHAT, "images": ["a.png", "b.png"]}, [user("@/data/a.png", "@/data/b.png", WHAT), assistant()]),
        (
            {
                "messages": [{"role": "user", "content": "Is <image> like <image>?"}, CHAT[1]],
                "images": ["a.png", "b.png"],
            },
            [user("Is ", "@/data/a.png", " like ", "@/data/b.png", "?"), assistant()],
        ),
        ({"messages": asked({"type": "image"}, PART), "images": ["a.png"]}, [user("@/data/a.png", WHAT), assistant()]),
        ({"messages": asked(PART, {"type": "image"}), "image": "a.png"}, [user(WHAT, "@/data/a.png"), assistant()]),
        (
            {
                "messages": asked({"type": "image", "index": 1}, PART, {"type": "image", "index": 0}),
                "images": ["a", "b"],
            },
            [user("@/data/b", WHAT, "@/data/a"), assistant()],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{**COLUMN, "type": "image", "index": 0}, {**COLUMN, **PART}]},
                    {"role": "assistant", "content": [{**COLUMN, "type": "text", "text": CAT}]},
                ],
                "images": [{"bytes": None, "path": "a.png"}],
            },
            [user("@/data/a.png", WHAT), assistant()],
        ),
        ({"messages": asked({"type": "image", "image": "a.png"}, PART)}, [user("@/data/a.png", WHAT), assistant()]),
        ({"messages": asked({"type": "image", "path": "a.png"}, PART)}, [user("@/data/a.png", WHAT), assistant()]),
        (
            {"messages": asked({"type": "image", "url": "file:///data/a.png"}, PART)},
            [user("@/data/a.png", WHAT), assistant()],
        ),
        (
            {"messages": asked({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, PART)},
            [user("@/data/a.png", WHAT), assistant()],
        ),
        (
            {"messages": asked({"type": "image"}, {"type": "text", "text": "<image> is a tag"}), "images": ["a.png"]},
            [user("@/data/a.png", "<image> is a tag"), assistant()],
        ),
        ({"messages": asked("Two ", "texts")}, [user("Two ", "texts"), assistant()]),
        # TRL's prompts and completions
        ({"prompt": WHAT, "completion": CAT}, [user(WHAT), assistant()]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "images": ["a.png"]}, [user("@/data/a.png", WHAT), assistant()]),
        # The Cauldron and FineVision
        (
            {"images": ["a.png"], "texts": [{"user": WHAT, "assistant": CAT, "source": "x"}] * 2},
            [user("@/data/a.png", WHAT), assistant(), user(WHAT), assistant()],
        ),
        # Alpaca
        ({"instruction": WHAT, "input": "", "output": CAT, "answer": "true"}, [user(WHAT), assistant()]),
        ({"instruction": "Add.", "input": "2 and 3", "output": "5"}, [user("Add.", "\n2 and 3"), assistant("5")]),
        (
            {"instruction": "Q", "output": "A", "history": [["q", "a"]], "system": "S"},
            [("system", ("Text", "S")), user("q"), assistant("a"), user("Q"), assistant("A")],
        ),
        ({"instruction": "<image>Q", "output": "A", "images": ["a.png"]}, [user("@/data/a.png", "Q"), assistant("A")]),
    ],
)
def test_messages(item, expected):
    assert read(json.loads(json.dumps(item))) == expected


@pytest.mark.parametrize(
    "item, reason",
    [
        ({"messages": asked({"type": "image"}, PART)}, "0 pictures but 1 place for them (parts of the type image"),
        (
            {"messages": asked({"type": "image"}, PART), "images": ["a", "b"]},
            "2 pictures but 1 place for them (parts of the type image",
        ),
        (
            {"messages": asked({"type": "image", "image": "a"}), "images": ["a"]},
            "1 picture but 0 places for them (parts of the type image",
        ),
        (
            {"messages": asked({"type": "image", "index": 7}, {"type": "image"}), "images": ["a"]},
            "1 picture but 2 places",
        ),
        (
            {"messages": [{"role": "user", "content": "<image>?"}, CHAT[1]], "images": ["a", "b"]},
            "2 pictures but 1 place",
        ),
        ({"messages": [{"role": "user", "content": "<image>?"}, CHAT[1]]}, "but no image"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "<image>"}], "images": ["a"]}, "<image> in an answer"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "image"}]}], "images": ["a"]},
            "a picture in turn 2, an answer: it belongs in a question",
        ),
        ({"messages": CHAT, "image": "a", "images": ["b"]}, "both image and images"),
        ({"messages": asked({"type": "video", "video": "a.mp4"}, PART)}, "has the type 'video': only text and image"),
        ({"messages": asked({"type": "audio", "audio": "a.wav"}, PART)}, "has the type 'audio'"),
        ({"messages": asked({"type": "text", "text": WHAT, "image": "a.png"})}, "image holds 'a.png' of turn 1"),
        (
            {"messages": asked({"type": "image_url", "image_url": {"url": "https://x.org/a"}})},
            "is an address: download it",
        ),
        ({"messages": asked({"type": "image", "image": "data:image/png;base64,iVBO"})}, "is written into the record"),
        (
            {"messages": asked({"type": "image", "image": {"bytes": "abc", "path": None}})},
            "has a picture inside an object",
        ),
        ({"messages": asked(3)}, "a part of turn 1 should be text or an object"),
        (
            {"messages": [{"role": "user", "content": None}, CHAT[1]]},
            "the content of turn 1 should be text, it is missing",
        ),
        (
            {"messages": [{"role": "user", "content": {"image_url": "a.png"}}, CHAT[1]]},
            "content.image_url holds 'a.png'",
        ),
        ({"messages": [*CHAT, {"role": "tool", "content": "3"}]}, "turn 3 is from 'tool'"),
        ({"messages": [*CHAT, {"role": ["user"], "content": "3"}]}, "turn 3 is from ['user']"),
        ({"messages": CHAT[1:]}, "without a question"),
        ({"messages": CHAT, "videos": ["a.mp4"]}, "videos holds 'a.mp4', which is not read"),
        ({"messages": [{**CHAT[0], "content": "<video>\nWhat?"}, CHAT[1]]}, "<video> in question 1"),
        ({"images": ["../a.png"], "messages": CHAT}, "leads out of the image folder"),
        ({"texts": [{"user": WHAT}]}, "the content of turn 2 should be text, it is missing"),
        ({"texts": [WHAT]}, "element 1 of texts should be an object, it is text"),
        ({"texts": [{"user": WHAT, "assistant": CAT, "image": "a.png"}]}, "image holds 'a.png' of element 1"),
        ({"instruction": WHAT, "input": 3, "output": CAT}, "input should be text, it is a number"),
        ({"instruction": WHAT, "output": " "}, "turn 2 is an empty answer"),
        ({"instruction": WHAT, "output": CAT, "history": ["q"]}, "history should be a list of pairs"),
        ({"instruction": WHAT}, "no conversations: a record needs"),
        ({"chosen": CHAT, "rejected": CHAT}, "no conversations: a record needs"),
        ({"image": "a.png", "caption": "A cat"}, "no conversations: a record needs"),
    ],
)
def test_what_cannot_be_used(item, reason):
    with pytest.raises(InvalidRecord) as caught:
        parse(json.loads(json.dumps(item)), "/data")
    assert reason in str(caught.value)


def test_alpaca_from_a_file(tmp_path):
    items = [{"instruction": "Add.", "input": "2 and 3", "output": "5", "answer": "5"}]
    (tmp_path / "alpaca.json").write_text(json.dumps(items))
    [record], problems = read_records(tmp_path / "alpaca.json")
    assert not problems and record.extra == {"answer": "5"} and record.messages[0].text == "Add.\n2 and 3"
    assert record.messages[0].parts == (Text("Add."), Text("\n2 and 3")) and not record.pictures


@pytest.mark.parametrize(
    "item, names",
    [
        ({"image": "a.png", "conversations": 3}, ["a.png"]),
        ({"images": ["a.png", {"path": "b.png", "bytes": None}, 3, Picture("x")]}, ["a.png", "b.png", Picture("x")]),
        ({"messages": asked({"type": "image_url", "image_url": {"url": "c.png"}}, PART)}, ["c.png"]),
        ("text", []),
    ],
)
def test_pictures_are_known_where_the_record_is_wrong(item, names):
    assert named_pictures(item) == names
