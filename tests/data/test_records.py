import gzip
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from fura_vlm.data import image_checks, json_items
from fura_vlm.data.image_checks import check_images
from fura_vlm.data.json_items import iter_items
from fura_vlm.data.messages import DataError, Problem
from fura_vlm.data.records import read_records, report_problems
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.families.vicuna import render
from fura_vlm.files import write_text

HUMAN = {"from": "human", "value": "What is this?"}
SHOWN = {"from": "human", "value": "<image>\nWhat is this?"}
GPT = {"from": "gpt", "value": "A cat."}
TEXT = {"id": "text", "conversations": [HUMAN, GPT]}
REAL = Path(__file__).parents[3] / "shared/real/real_mixture.json"


def one_problem(path, **options) -> Problem:
    """The only problem, of a record that is left out while the good record beside it is read."""
    records, [problem] = read_records(path, **options)
    assert problem.skipped and problem.file == str(path)
    assert [record.id for record in records] == ["text"]
    return problem


# ---------------------------------------------------------------------------------------------------- reading


def test_a_record_with_an_image(mixture, tmp_path):
    conversations = [SHOWN, GPT, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"}]
    path = mixture([{"id": "a", "image": "images/1.png", "conversations": conversations, "family": "gqa"}])
    [record], problems = read_records(path)
    assert not problems
    assert record.messages == (
        Message("user", (Picture(str(tmp_path / "images/1.png")), Text("\nWhat is this?"))),
        Message("assistant", (Text("A cat."),)),
        Message("user", (Text("Sure?"),)),
        Message("assistant", (Text("Yes"),)),
    )
    assert (record.id, record.place) == ("a", "record 1")
    assert record.pictures[0] == str(tmp_path / "images/1.png")
    assert record.extra == {"family": "gqa"}


def test_json_and_jsonl_give_the_same(mixture):
    items = [
        TEXT,
        {"id": 7, "image": "x.png", "conversations": [SHOWN, GPT]},
        {"conversations": [HUMAN, GPT]},
    ]
    in_list, _ = read_records(mixture(items, "a.jsonl"))  # the content decides, not the name
    in_lines, _ = read_records(mixture("\n".join(map(json.dumps, items)) + "\n", "b.json"))
    assert [r.messages for r in in_list] == [r.messages for r in in_lines]
    assert [r.id for r in in_list] == ["text", "7", "record 3"]
    assert [r.id for r in in_lines] == ["text", "7", "line 3"]


def test_ids_may_repeat_and_image_may_be_null(mixture):
    records, problems = read_records(mixture([TEXT, TEXT, {**TEXT, "image": None}]))
    assert len(records) == 3 and not problems


def test_image_folder(mixture, tmp_path):
    (tmp_path / "pictures").mkdir()
    path = mixture([{"id": "a", "image": "1.png", "conversations": [SHOWN, GPT]}])
    [record], _ = read_records(path, tmp_path / "pictures")
    assert record.pictures[0] == str(tmp_path / "pictures/1.png")
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_records(path, tmp_path / "nowhere")


def test_a_byte_order_mark_is_no_matter(mixture):
    records, _ = read_records(mixture(b"\xef\xbb\xbf" + json.dumps([TEXT]).encode()))
    assert len(records) == 1


def test_image_in_a_later_question(mixture):
    conversations = [HUMAN, GPT, {"from": "human", "value": "And that? <image>"}, GPT]
    records, problems = read_records(mixture([{"image": "1.png", "conversations": conversations}]))
    assert len(records) == 1 and not problems


def test_a_first_turn_of_gpt_is_left_out_and_noted(mixture):
    [record], [problem] = read_records(mixture([{"id": "a", "conversations": [GPT, HUMAN, GPT]}]))
    assert [message.role for message in record.messages] == ["user", "assistant"]
    assert not problem.skipped and "left out" in problem.reason


def test_several_images_in_a_question_are_one(mixture):
    question = {"from": "human", "value": "<image>\n<image>\nWhat is this?"}
    [record], problems = read_records(mixture([{"image": "1.png", "conversations": [question, GPT]}]))
    assert render(record.messages).text.endswith("questions. USER: <image>\nWhat is this? ASSISTANT: A cat.</s>")
    assert not problems


@pytest.mark.parametrize("inside", ["Look: <image> What?", "<image>\n<image>\nWhat?", " What? <image> \n", "<image>"])
def test_the_text_around_an_image_is_kept(mixture, tmp_path, inside):
    [record], _ = read_records(mixture([{"image": "1.png", "conversations": [{**HUMAN, "value": inside}, GPT]}]))
    question = record.messages[0]
    assert question.text == inside.replace("<image>", "")
    assert question.pictures == record.pictures == [str(tmp_path / "1.png")]
    before = inside.partition("<image>")[0]
    assert question.parts[bool(before)] == Picture(str(tmp_path / "1.png")) and (
        not before or question.parts[0] == (before,)
    )


def test_an_image_within_the_text_of_a_record_without_one_is_text(mixture):
    turns = [{"from": "human", "value": "Parse <image>a.png</image>"}, {"from": "gpt", "value": "<image> is a tag."}]
    [record], problems = read_records(mixture([{"id": "svg", "conversations": turns}]))
    assert not problems and [message.text for message in record.messages] == [turn["value"] for turn in turns]


# ------------------------------------------------------------------------------------------------ bad records


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({}, "no conversations"),
        ({"conversations": None}, "no conversations"),
        ({"conversations": "text"}, "should be a list of turns, it is text"),
        ({"conversations": []}, "without a question"),
        ({"conversations": [GPT]}, "without a question"),
        ({"conversations": ["Hello"]}, "turn 1 should be an object"),
        (
            {"conversations": [HUMAN, GPT, {"from": "system", "value": "Be brief."}, HUMAN, GPT]},
            "turn 3 is from system",
        ),
        ({"conversations": [{"from": "system", "value": " "}, HUMAN, GPT]}, "turn 1 is empty"),
        ({"conversations": [{"from": "tool", "value": "x"}, HUMAN, GPT]}, "turn 1 is from 'tool'"),
        ({"conversations": [{"value": "Hello"}, GPT]}, "turn 1 is from None"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "turns 1 and 2 are both from human"),
        ({"conversations": [HUMAN, GPT, GPT]}, "turns 2 and 3 are both from gpt"),
        ({"conversations": [GPT, HUMAN, HUMAN, GPT]}, "turns 2 and 3 are both from human"),
        ({"conversations": [HUMAN]}, "the last question has no answer"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "the last question has no answer"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " \n"}]}, "turn 2 is an empty answer"),
        ({"conversations": [{"from": "human", "value": ""}, GPT]}, "turn 1 is an empty question"),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": 3}]},
            "value of turn 2 should be text, it is a number",
        ),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "value of turn 2 should be text, it is missing"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud83d"}]}, "half of a surrogate pair"),
        ({"conversations": [SHOWN, GPT]}, "<image> in the conversation but no image"),
        ({"conversations": [{**HUMAN, "value": "What is this?\n<image>"}, GPT]}, "but no image"),
        ({"image": "1.png", "conversations": [HUMAN, GPT]}, "an image but no <image>"),
        ({"image": "1.png", "conversations": [SHOWN, GPT, SHOWN, GPT]}, "<image> stands 2 times for one image"),
        (
            {"image": "1.png", "conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]},
            "<image> in an answer",
        ),
        ({"image": "", "conversations": [SHOWN, GPT]}, "image should be a path, it is empty"),
        ({"image": 3, "conversations": [SHOWN, GPT]}, "image should be a path, it is a number"),
        ({"image": [["1.png"]], "conversations": [SHOWN, GPT]}, "image should be a path, it is a list"),
        ({"image": ["1.png", "2.png"], "conversations": [SHOWN, GPT]}, "2 pictures but 1 place for them (<image>)"),
        ({"image": ["1.png"], "conversations": [SHOWN, GPT, SHOWN, GPT]}, "1 picture but 2 places for them (<image>)"),
        ({"images": ["1.png", "2.png"], "conversations": [HUMAN, GPT]}, "2 pictures but no <image>"),
        ({"image": "\ud83d.png", "conversations": [SHOWN, GPT]}, "has half of a surrogate pair"),
        ({"image": "../1.png", "conversations": [SHOWN, GPT]}, "leads out of the image folder"),
        ({"image": "a/../../1.png", "conversations": [SHOWN, GPT]}, "leads out of the image folder"),
        ({"image": "/etc/passwd", "conversations": [SHOWN, GPT]}, "leads out of the image folder"),
    ],
)
def test_bad_record(mixture, bad, reason):
    problem = one_problem(mixture([{"id": "bad", **bad}, TEXT]))
    assert reason in problem.reason
    assert (problem.record, problem.place) == ("bad", "record 1")


MEDIA = [
    *({key: "1.png"} for key in "pictures Image IMAGE img image_path imagePath picture photo file_name path".split()),
    *({key: ["a.png", "b.png"]} for key in ("Images", "image_files", "left_images", "whatever")),
    *({key: "clip"} for key in ("video", "videos", "video_id", "audio", "Video", "media")),
    {"image_id": 0},
    {"has_image": True},
    {"num_images": 2},
    {"pixel_values": [[0.5, 0.25]]},
    {"photos": [{"bytes": None, "path": "1"}]},
    {"photos": [{"url": "https://example.com/a"}]},
    {"url": "https://example.com/a.jpg?size=large"},
    {"data": "data:image/png;base64,iVBORw0KGgo"},
    {"body": "/9j/" + "4AAQSkZJRg" * 20},
    {"meta": {"deep": [{"inside": ["x.mp4"]}]}},
    {"type": "image_url"},
    *({key: ["0001"]} for key in ("frames", "video_frames", "clip", "media_files", "visual_tokens", "sound_path")),
    *({"drawn": f"a.{ending} "} for ending in ("jfif", "svg", "PPM", "dcm", "nii.gz", "mpeg", "opus", "png")),
]


@pytest.mark.parametrize("media", MEDIA, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_media_under_a_key_that_is_not_read(mixture, media, inside):
    turns = [{**HUMAN, **media}, GPT] if inside else [HUMAN, GPT]
    reason = one_problem(mixture([{"id": "bad", "conversations": turns, **({} if inside else media)}, TEXT])).reason
    assert f"{next(iter(media))}" in reason and "which is not read: give the path" in reason
    assert (" of turn 1" in reason) == inside


@pytest.mark.parametrize(
    "media",
    [{"images": ["b.png"]}, {"image2": "b.png"}, {"mask": "m.png"}, {"video": "x"}, {"image_b64": "/9j/" + "A" * 99}],
)
def test_media_beside_the_image(mixture, media):
    item = {"image": "a.png", "conversations": [SHOWN, GPT]}
    assert next(iter(media)) in one_problem(mixture([{**item, **media}, TEXT])).reason


@pytest.mark.parametrize(
    "extra",
    [
        {"images": [], "video": None, "audio": "", "has_image": False, "num_images": 0},
        {"source": "https://sharegpt.com/c/1", "model": "gpt-4", "markdown": None, "lang": "en", "score": 0.5},
        {"figure_of_speech": "metaphor", "category": "image_captioning", "note": "open a.png and look"},
        {"code": "from PIL import Image\nImage.open('a.png')", "dataset": "train.json", "path": "a/b.py"},
    ],
)
def test_keys_that_are_no_sign_of_media(mixture, extra):
    [record], problems = read_records(mixture([{**TEXT, **extra}]))
    assert not problems and record.extra == {key: value for key, value in extra.items() if key != "images"}


def test_what_says_more_about_the_image_is_no_sign_of_media(mixture):
    item = {"id": "1", "image": "coco/1.jpg", "conversations": [SHOWN, GPT]}
    item |= {
        "image_id": 1,
        "image_size": [2, 3],
        "file_name": "1.jpg",
        "coco_url": "http://x.org/9.jpg",
        "type": "image",
    }
    records, problems = read_records(mixture([item]))
    assert len(records) == 1 and not problems


MARKS = """<video> <audio> <img> <Image> <image1> <image_1> <video_0> <images> <|image|> <|image_1|> <|image_pad|>
    <|vision_start|> <|video_pad|> <|AUDIO|> <|begin_of_image|> <start_of_image> <image_soft_token> <ImageHere> [IMG]
    <IMG_CONTEXT> <image_placeholder> <fake_token_around_image> <__media__> [img-1]""".split()


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("form", ["{}\nWhat is this?", "What is this?\n{}", "What does {} show?", "{}"])
def test_places_for_media_of_other_programs(mixture, mark, form):
    question = {"from": "human", "value": form.format(mark)}
    reason = one_problem(mixture([{"conversations": [HUMAN, GPT, question, GPT]}, TEXT])).reason
    assert f"{mark} in question 2 does not mark a picture" in reason
    question["value"] += "\n<image>"
    assert mark in one_problem(mixture([{"image": "a.png", "conversations": [question, GPT]}, TEXT])).reason


@pytest.mark.parametrize("mark", ["<img>a.png</img>", "<video>films/a b.mp4</video>", "<audio>a.FLAC</audio>"])
def test_files_of_media_within_the_text(mixture, mark):
    question = {"from": "human", "value": f"Picture 1: {mark}\nWhat is this?"}
    assert (
        f"{mark} in question 1 does not mark a picture here"
        in one_problem(mixture([{"conversations": [question, GPT]}, TEXT])).reason
    )


def test_a_key_that_is_no_character(mixture, tmp_path, capsys):
    problem = one_problem(mixture([{"conversations": [HUMAN, GPT], "\ud800": "a.png"}, TEXT]))
    print(problem.reason)
    report_problems([problem], 1, tmp_path / "problems.jsonl")
    assert "\\ud800 holds 'a.png'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "question, answer",
    [
        ("<video>\n  <source src='a.mp4'>\n</video>\nWhy does it not play?", "The path is wrong."),
        ('<div>\n<img src="a.png">\n</div>\nCenter this.', "Use flex."),
        ("How do I center an <img>?", "```css\nimg { display: block }\n```"),
        ("What does the <picture> tag do?", "It chooses."),
        ("<img> or <picture>?", "<picture> in HTML5."),
        ("Fix: <Image style={s} source={require('a.png')} />", "Done."),
        ("[img]http://x.org/a.png[/img] Why is it broken?", "It is gone."),
        ("See [image] below and arr[image1]", "Yes."),
        ("![build](https://x.org/badge.svg)\n# Project\nWrite this better.", "# Project"),
        ("if a<image and image>b: pass", "No."),
        ("std::vector<frame> frames;", "In C++, std::vector<frame> is a list."),
        ("Why is token == '<|image_pad|>' false?", "It is an id."),
        ("<|im_start|>user\nHello<|im_end|>", "Hello."),
    ],
)
def test_code_in_questions_is_no_place_for_media(mixture, question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    records, problems = read_records(mixture([{"conversations": turns}]))
    assert len(records) == 1 and not problems


@pytest.mark.parametrize(
    "image, reason",
    [
        ("https://example.com/a.jpg", "is an address: download it"),
        ("s3://bucket/a.jpg", "is an address"),
        ("data:image/png;base64,iVBORw0KGgo", "is written into the record: save it as a file"),
        ("C:\\data\\a.jpg", "starts with a Windows drive: write it relative to the image folder"),
        ("D:/data/a.jpg", "starts with a Windows drive"),
        ("file:///D:/data/a.jpg", "starts with a Windows drive"),
        ("\\\\server\\data\\a.jpg", "starts with a Windows network folder"),
        ("iVBORw0KGgo" + "AAAA" * 40, "is written into the record: save it as a file"),
        ("..\\a.jpg", "leads out of the image folder"),
        ("file:///etc/a.jpg", "leads out of the image folder"),
    ],
)
def test_paths_of_elsewhere(mixture, image, reason):
    assert reason in one_problem(mixture([{"image": image, "conversations": [SHOWN, GPT]}, TEXT])).reason


def test_paths_as_windows_and_as_addresses_of_files(mixture, tmp_path):
    (tmp_path / "odd\\name.jpg").touch()
    names = ["sub\\x.jpg", f"file://{tmp_path}/sub/x.jpg", "odd\\name.jpg"]
    records, problems = read_records(mixture([{"image": name, "conversations": [SHOWN, GPT]} for name in names]))
    expected = [tmp_path / "sub/x.jpg", tmp_path / "sub/x.jpg", tmp_path / "odd\\name.jpg"]
    assert not problems and [record.pictures[0] for record in records] == [str(path) for path in expected]


def test_something_that_is_no_record(mixture):
    assert "it is a number" in one_problem(mixture([3, TEXT])).reason


def test_absolute_paths_within_the_image_folder(mixture, tmp_path):
    path = mixture([{"image": str(tmp_path / "1.png"), "conversations": [SHOWN, GPT]}])
    [record], _ = read_records(path)
    assert record.pictures[0] == str(tmp_path / "1.png")


def test_a_bad_line(mixture):
    problem = one_problem(mixture(f'{{"id": "cut", "conv\n\n{json.dumps(TEXT)}\n', "mixture.jsonl"))
    assert problem.place == "line 1" and "not valid JSON" in problem.reason
    problem = one_problem(mixture(f'{{"id": {"1" * 5000}}}\n{json.dumps(TEXT)}\n'))
    assert problem.place == "line 1" and "Exceeds the limit (4300 digits)" in problem.reason


# -------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "content, reason",
    [
        (json.dumps([TEXT, TEXT], indent=1)[:-30], "is cut off at line 24"),
        ('[\n{"conversations": "a\n', "is cut off at line 2"),
        ('[\n{"conversations": [1]', "is cut off at line 2"),
        ('[\n{"id": 1,}\n]', r"not valid JSON at line 2, column 1\d \("),
        (b'[{"id": "caf\xe9"}]', "is not UTF-8 at byte 12"),
        (json.dumps([TEXT]).encode("utf-16"), "is UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t"),
        (json.dumps([TEXT]).encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
        (json.dumps([TEXT]).encode("utf-32"), "is UTF-32, not UTF-8"),
        (
            '{"id": "图片里有一只猫"}'.encode("gbk"),
            r"at byte 12; it looks like GBK \(Chinese\).* iconv -f GBK -t UTF-8",
        ),
        (('{"id": "' + 30 * "图").encode() + b'\xff\x80"}', "is damaged at byte 98, which is not UTF-8"),
        ('{"id": "图片"}'.encode()[:-3], "is cut off within a character, at byte 11"),
        (gzip.compress(b"[]"), "is gzip, not JSON: unpack it"),
        (b"PAR1\x15", "is Parquet, not JSON: let its name end in .parquet"),
        ("version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, not JSON: fetch it"),
        ("", "is empty"),
        ("[]", "holds no records"),
        ("id,image\n1,2\n", "neither a JSON list nor JSONL"),
        (json.dumps({"data": [TEXT]}, indent=1), "neither a JSON list nor JSONL"),
        (f'[{{}}, {{"id": {"1" * 5000}}}]', r"cannot be read at record 2 \(Exceeds the limit \(4300 digits\)"),
        ("[" * 100_000, "cut off|nested too deeply"),
    ],
)
def test_bad_file(mixture, content, reason):
    path = mixture(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- piece by piece


@pytest.fixture(params=[1, 2, 3, 7, 64])
def small_chunks(request, monkeypatch):
    """Files are read a few bytes at a time, so that everything is cut everywhere."""
    monkeypatch.setattr(json_items, "_CHUNK", request.param)


ITEMS = [
    {"a": 'é 猫 😀 \\ " \n', "b": [1.5e-3, -12, True, None, [], {}]},
    "text with ] and , and {",
    [[["deep"]], 123456789],
    12345,
    False,
    None,
    {"long": "x" * 300},
]


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_a_list_in_pieces_is_what_json_reads(mixture, small_chunks, options):
    path = mixture("\n\n " + json.dumps(ITEMS, **options) + " \n")
    places, items = zip(*iter_items(path), strict=True)
    assert list(items) == ITEMS
    assert places[0] == "record 1" and places[-1] == f"record {len(ITEMS)}"


def test_lines_in_pieces(mixture, small_chunks):
    path = mixture("\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS[:4]))
    assert [item for _, item in iter_items(path)] == ITEMS[:4]


@pytest.mark.parametrize("end, where", [('{"id": 1,}]', "line 3, column 11"), ("{} {}]", "line 3, column 5")])
def test_the_place_of_an_error_in_pieces(mixture, small_chunks, end, where):
    with pytest.raises(DataError, match=f"not valid JSON at {where}"):
        list(iter_items(mixture('[\n{"id": 0},\n ' + end)))


@pytest.mark.parametrize("kept", range(1, 60))
def test_a_list_cut_anywhere_is_an_error(mixture, small_chunks, kept):
    whole = json.dumps([{"id": "é", "conversations": [1.25, True]}, 77])
    with pytest.raises(DataError, match="is cut off at line 1|is neither|is not valid JSON"):
        list(iter_items(mixture(whole[: min(kept, len(whole) - 1)])))


def test_half_a_character_at_the_end(mixture):
    with pytest.raises(DataError, match="is cut off within a character, at byte 11"):
        list(iter_items(mixture(b'{"id": "a"}\xc3')))


def test_files_with_byte_order_marks_that_were_joined(mixture):
    path = mixture(2 * (json.dumps(TEXT) + "\n").encode("utf-8-sig"))
    records, problems = read_records(path)
    assert len(records) == 2 and not problems
    path = mixture("\ufeff\ufeff" + json.dumps([TEXT]))
    assert len(read_records(path)[0]) == 1


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="none.json cannot be read"):
        read_records(tmp_path / "none.json")


# ----------------------------------------------------------------------------------------------------- images


@pytest.fixture
def shown(mixture, tmp_path):
    """Images: a good one (twice), a missing, an empty and a truncated one (twice); and a text."""
    Image.effect_noise((64, 64), 80).save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    names = ["good", "good", "missing", "empty", "cut", "cut"]
    items = [{"id": n, "image": f"{n}.png", "conversations": [SHOWN, GPT]} for n in names]
    return read_records(mixture([*items, TEXT]))[0]


def ids(records):
    return [record.id for record in records]


@pytest.mark.parametrize("verify", ["auto", "decode"])
def test_images_are_decoded(shown, verify):
    good, problems = check_images(shown, verify)
    assert ids(good) == ["good", "good", "text"]
    assert [problem.record for problem in problems] == ["missing", "empty", "cut", "cut"]
    assert "missing.png does not exist" in problems[0].reason
    assert "empty.png is empty" in problems[1].reason
    assert "cut.png is truncated or damaged" in problems[2].reason


def test_headers_only(shown):
    good, problems = check_images(shown, "header")
    assert ids(good) == ["good", "good", "cut", "cut", "text"] and len(problems) == 2


def test_no_check(shown):
    assert check_images(shown, "none") == (shown, [])


def test_large_mixtures_have_headers_read(shown, monkeypatch):
    monkeypatch.setattr(image_checks, "DECODE_UP_TO", 3)  # there are four files
    assert "cut" in ids(check_images(shown)[0])


def test_each_file_is_checked_once(shown, monkeypatch):
    seen = []
    monkeypatch.setattr(image_checks, "check_image", lambda path, *options: seen.append(Path(path).name))
    check_images(shown)
    assert sorted(seen) == ["cut.png", "empty.png", "good.png", "missing.png"]


# ------------------------------------------------------------------------------------------------- the report


def test_report(tmp_path):
    problems = [
        Problem("m.json", "record 3", "é\udc80", "no conversations"),
        Problem("m.json", "record 5", "b", "the end is cut off", skipped=False),
    ]
    line = report_problems(problems, kept=9, path=tmp_path / "run/skipped.jsonl")
    assert line == f"1 of 10 records left out, 1 used in part: see {tmp_path / 'run/skipped.jsonl'}"
    written = [json.loads(row) for row in (tmp_path / "run/skipped.jsonl").read_text("utf-8").splitlines()]
    assert written[0] == {
        "file": "m.json",
        "place": "record 3",
        "record": "é\udc80",
        "reason": "no conversations",
        "skipped": True,
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["skipped.jsonl"]


def test_nothing_to_report(tmp_path):
    assert report_problems([], kept=3, path=tmp_path / "skipped.jsonl", strict=True) == ""
    assert (tmp_path / "skipped.jsonl").read_text() == ""


def test_strict(tmp_path):
    problems = [Problem("m.json", f"record {n}", str(n), f"reason {n}") for n in range(5)]
    with pytest.raises(DataError, match="5 of 7 records cannot be used") as caught:
        report_problems(problems, kept=2, path=tmp_path / "skipped.jsonl", strict=True)
    message = str(caught.value)
    assert "reason 2" in message and "reason 3" not in message and str(tmp_path / "skipped.jsonl") in message
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 5


def test_strict_does_not_mind_notes(tmp_path):
    note = Problem("m.json", "record 1", "1", "cut", skipped=False)
    assert "1 used in part" in report_problems([note], 1, tmp_path / "skipped.jsonl", strict=True)


def test_a_mixture_without_a_good_record(mixture, tmp_path):
    records, problems = read_records(mixture([{"id": "a"}]))
    with pytest.raises(DataError, match=r"None of the 1 records can be used.*record 1.*no conversations"):
        report_problems(problems, len(records), tmp_path / "skipped.jsonl")


def test_a_file_may_be_written_by_several_at_once(tmp_path):
    texts = [f"{number}: 猫\n" * 1000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_text(tmp_path / "a.txt", texts[n % 8]), range(400)))
    assert (tmp_path / "a.txt").read_text("utf-8") in texts
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


# --------------------------------------------------------------------------------------------- a real mixture


@pytest.mark.skipif(not REAL.is_file(), reason="the real mixture is not here")
def test_real_mixture():
    records, problems = read_records(REAL)
    good, broken = check_images(records)
    assert not problems and not broken
    assert [record.id for record in good] == ["ironing-1", "ironing-2", "pier-1", "pier-2", "text-1"]
    assert not good[-1].pictures and len(good[0].messages) == 6


def test_reading_takes_no_torch():
    """The command line reads records before it needs torch."""
    code = "import sys; sys.argv = ['fura-vlm']; import fura_vlm.data.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
