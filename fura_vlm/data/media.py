"""Signs of pictures, videos and sound in what is not read of a record.

A record whose picture stands where nobody looks would be trained on as blind text. So what is left of a record
once it has been read is searched for

- keys that name media (``images``, ``imagePath``, ``left_img``, ``video_id``), unless they are empty;
- values that are media under any key: names of picture, video or sound files, ``data:`` addresses, bytes and base64
  of such files, parts such as ``{"type": "image_url"}``;
- places for media that other programs write into text: ``<video>``, ``<|image_pad|>``, ``[IMG]``.

What says more about a picture that is read (``image_id``, ``image_size``, the address it came from) is no sign. Nor is
code: ``<img>``, ``<video>`` and ``<picture>`` are HTML, too, and tens of thousands of records of LLaVA v1.5's mixture
are talks about code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from fura_vlm.families.messages import Picture

_PICTURES = (
    "image images img imgs picture pictures pic pics photo photos screenshot screenshots thumbnail pixel pixels".split()
)
_PICTURES += "gifs jpg jpeg png gif webp bmp tif tiff heic avif jfif svg".split()
_FILMS = """video videos vid vids movie movies clip clips film films frame frames audio audios sound sounds mp4 webm mkv
    mov avi m4v mp3 wav flac ogg m4a""".split()
_POINTERS = """path paths file files filename filenames filepath filepaths name names url urls uri uris link links src
    id ids key keys data bytes base64 b64 list ref refs location locations dir folder token tokens values feature
    features embedding embeddings""".split()

_WORD = re.compile(r"mp[34]|m4[av]|[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ENDING = r"""\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|hei[cf]|avif|jxl|jp2|svg|p[pgbn]m|dcm|nii(?:\.gz)?|mp4|webm|mkv
    |mov|avi|m4v|mpe?g|wmv|flv|3gp|ogv|mp3|wav|flac|ogg|opus|aac|m4a)""".replace("\n    ", "")
_FILE = re.compile(_ENDING + r"\s*$", re.I)
_INLINE = re.compile(r"data:(?:image|video|audio)/|(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/=]{80}")
_TYPES = re.compile(r"(?:input_)?(?:image|image_url|img|picture|video|video_url|audio|audio_url|input_audio)", re.I)

_TOKEN = re.compile(
    r"(?<![\"'`])(?:"  # in quotes it is code
    # <|image|>, <|image_1|>, <|vision_start|>, <|video_pad|>, <|AUDIO|>, <|begin_of_image|>, <|media_pad|>
    r"<\|[\w-]{0,40}(?:image|img|vision|video|audio|media|picture)[\w-]{0,40}\|>"
    # <start_of_image>, <image_soft_token>, <IMG_CONTEXT>, <ImageHere>, <fake_token_around_image>, <global-img>
    r"|<(?:start|end|begin)_of_(?:image|video|audio)>|<boi>|<fake_token_around_image>|<global-img>|<im_patch>"
    r"|<(?:image|img|video|audio|vision|vid)_?(?:soft_)?(?:here|placeholder|tokens?|pad|patch|context|start|end|feature)>"
    r"|<__(?:media|image)__>|(?-i:\[IMG(?:_BREAK|_END)?\])|\[img-\d+\])",
    re.I,
)
# Neither list<image> nor (?P<image> nor "<image>"
_TAG = re.compile(
    r"(?<![A-Za-z0-9_?\"'`])<(?P<name>image|img|picture|photo|video|audio|sound|speech|frame)s?[ _-]?\d*>", re.I
)
# <img>a.png</img>, as Qwen-VL's first data have it; HTML has nothing between the two
_ENCLOSED = re.compile(rf"<(img|image|video|audio)>[^<>\n]{{1,400}}{_ENDING}\s*</\1>", re.I)
_BRACKETS = re.compile(r"\[(?:image|picture|photo|video|audio)s?[ _-]?\d*\]", re.I)
_CODE = re.compile(r"</?[a-z]\w*[ >/]|/>|```|\b\w+=[\"']|\b(?:x?html5?|xml|svg|css|jsx|dom)\b", re.I)
_ABOUT_CODE = re.compile(r"</|/>|```|\b\w+=[\"']|\b(?:x?html5?|xml|svg|css|jsx|dom|markup|tags?|elements?)\b", re.I)


def unused_media(rest: Any, pictures: Sequence[str] = ()) -> str | None:
    """What in ``rest`` says that there are media.

    Args:
        rest: what has been read of no record: objects, lists, text, numbers, bytes, one in the other.
        pictures: the paths of the pictures that are read; what names them again is no sign.

    Returns:
        The beginning of a sentence, ``"images holds 'a.png'"``, or ``None``.
    """
    stems = {_stem(path) for path in pictures}
    for keys, value in _leaves(rest):
        named = next((kind for kind in map(_kind_of, reversed(keys)) if kind), None)
        if _is_media(keys[-1] if keys else "", value, named, stems):
            where = ".".join(keys).encode(errors="backslashreplace").decode()  # JSON can write half characters
            return f"{where or 'it'} holds {_short(value)}"
    return None


def is_inline(text: str) -> bool:
    """Whether a text is itself a picture, video or sound: a ``data:`` address, or base64 of such a file."""
    return _INLINE.match(text) is not None


def unused_mark(question: str, answer: str = "") -> str | None:
    """The place for a picture, video or sound in a question, or ``None``. ``<image>`` itself is not looked for.

    Args:
        question: the text.
        answer: what follows it: where that has code, the question is about code.
    """
    question = question.replace("<image>", "")
    if "<" not in question and "[" not in question:
        return None
    if enclosed := _ENCLOSED.search(question):
        return enclosed[0]
    lower = question.lower()
    for token in _TOKEN.finditer(question):
        if token[0][:4] != "[IMG" or "[/img]" not in lower:  # forums close what they open
            return token[0]
    about_code = None
    for tag in _TAG.finditer(question):
        if f"</{tag['name'].lower()}" in lower:  # so does HTML
            continue
        before, after = question[: tag.start()], question[tag.end() :]
        first, last = not before.strip(), not after.strip()
        if about_code is None:
            about_code = bool(_ABOUT_CODE.search(question) or _CODE.search(answer))
        if not about_code or first and (last or after.startswith("\n")) or last and before.endswith("\n"):
            return tag[0]
    lines = question.strip().split("\n")
    return next((line for line in (lines[0].strip(), lines[-1].strip()) if _BRACKETS.fullmatch(line)), None)


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is neither object nor list, with the keys that lead to it. No recursion: JSON may be nested deeply."""
    stack = [((), value)]
    while stack:
        keys, value = stack.pop()
        if isinstance(value, dict):
            stack += [((*keys, str(key)), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, (list, tuple)) and not isinstance(value, Picture):
            stack += [(keys, inner) for inner in reversed(value)]
        elif value or type(value) is int and keys and keys[-1].lower().endswith("id"):  # an id may be 0
            yield keys, value


def _is_media(key: str, value: Any, named: str | None, stems: set[str]) -> bool:
    if isinstance(value, (bytes, bytearray, Picture)):
        return True
    if isinstance(value, str):
        if is_inline(value):
            return True
        if (
            _FILE.search(value.partition("?")[0] if "://" in value else value)
            and "\n" not in value
            and (named or _points(key) or " " not in value.strip())
        ):
            return not stems or _stem(value.strip()) not in stems and "://" not in value
        if key == "type":
            return not stems and _TYPES.fullmatch(value) is not None
    # The rest is media by its name alone: an id, a name without ending, a number, true.
    return named == "film" or named == "picture" and not stems


def _kind_of(key: str) -> str | None:
    """``"picture"`` or ``"film"`` (videos and sound) if the key names such, at its end or before path, url, id, ..."""
    words = [word.lower() for word in _WORD.findall(key)]
    while words and words[-1] in _POINTERS:
        words.pop()
    if words in (["media"], ["visual"], ["visuals"], ["attachment"], ["attachments"]):
        return "picture"
    if not words:
        return None
    return "picture" if words[-1] in _PICTURES else "film" if words[-1] in _FILMS else None


def _points(key: str) -> bool:
    words = _WORD.findall(key)
    return bool(words) and words[-1].lower() in _POINTERS


def _stem(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/").partition("?")[0]).stem


def _short(value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    if isinstance(value, Picture):
        return "a picture"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
