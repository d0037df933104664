"""What training, evaluation and chat need to know about a kind of model.

A family answers five questions: how a conversation becomes text with its answers marked; how many tokens a picture
takes; how pictures become tensors; where the model has its decoder, tower and projector; and how positions go on while
an answer is written. ``Family`` answers them through transformers' own processor and model, for any model whose
processor has a chat template. A file beside this one holds what is different, or can be had faster, for one family.

Pictures take long runs of one token. Rows keep such a run as one token and its length (``Encoded.runs``): a tokenizer
splits a text at its special tokens, so the ids around a run are the same whatever its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from peft import PeftModel
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.initialization import no_init_weights
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.chat_template_utils import render_jinja_template

from fura_vlm.errors import FuraVLMError, ModelError
from fura_vlm.families.messages import Message, Picture, Text, pictures

IGNORE = -100
"""The label of tokens without supervision."""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
"""In a chat template: it marks the answers itself."""


_OTHER_MODEL = "its files belong to different models, so take the processor that was published with this one"


class EncodingError(FuraVLMError):
    """A conversation that cannot become tokens. The message is the reason, fit for a list of problems."""


class Rendered(NamedTuple):
    """A conversation as text, and the character ranges ``[start, end)`` of the answers with their end tokens."""

    text: str
    spans: list[tuple[int, int]]


class Encoded(NamedTuple):
    """A conversation as tokens, in which a run of one picture token is one token.

    Args:
        ids: (n,) int64.
        supervised: (n,) bool.
        runs: (picture tokens in ``ids``,) int64, the length of each run.
    """

    ids: np.ndarray
    supervised: np.ndarray
    runs: np.ndarray

    @property
    def length(self) -> int:
        """Tokens with all runs spread."""
        return len(self.ids) + int(self.runs.sum()) - len(self.runs)


class Parts(NamedTuple):
    """Modules of a model. ``tower`` and ``projectors`` are ``None`` and empty in a language model."""

    decoder: nn.Module
    head: nn.Module
    tower: nn.Module | None
    projectors: list[nn.Module]


class Names(NamedTuple):
    """What the modules of a model are called, as in ``named_modules``."""

    decoder: str
    head: str
    tower: str | None
    projectors: list[str]


@dataclass(frozen=True)
class Patches:
    """The work of a picture in the tower: the patches for each of its tokens, and how many patches attend to each
    other."""

    per_token: float
    together: int


class Family:
    """A kind of model, bound to a processor.

    Args:
        processor: transformers' processor, or the tokenizer of a language model; ``None`` where only the model is
            looked at: ``parts``, ``names``, ``picture_tokens`` and, of families with a file, ``patches``.
        config: the model's configuration.
        ends: the tokens that may end an answer, as text; by default the tokenizer's.
        conversation: one of ``conversations``.

    Attributes:
        model_types: the ``config.model_type`` that a family is for.
        projector_names: where the projector is below ``model.model``; by default what is neither tower nor decoder.
        compiles_tower: whether the tower's layers are one graph for pictures of every number and size.
        needs_sizes: whether a picture's tokens depend on its size, so that indexing has to look at its header.
        sees: whether it takes pictures.
        enough: width and height from which on a larger picture shows the model nothing more, or ``None`` where nobody
            can say: such a picture may be read at a fraction of its size. Only of families that need no sizes.
        path: where its processor is from, a folder or a name on the hub, for messages; ``None`` if nobody has said.
        bare_head: whether logits are what ``parts``' head makes of the decoder's states, not scaled or capped after
            it. Else an answer is written by the model as a whole.
    """

    model_types: tuple[str, ...] = ()
    conversations: tuple[str, ...] = ("template",)
    """The forms of a conversation that the family has; the first is its own."""
    projector_names: tuple[str, ...] | None = None
    compiles_tower = True
    needs_sizes = True
    sees = True
    enough: tuple[int, int] | None = None
    bare_head = False
    path: str | None = None

    def __init__(self, processor, config, ends: Sequence[str] = (), conversation: str | None = None):
        self.processor, self.config = processor, config
        self.conversation = conversation or self.conversations[0]
        if self.conversation not in self.conversations:
            raise ModelError(
                f"conversation is {conversation}, but a model of the type {getattr(config, 'model_type', None)} takes "
                f"only {' and '.join(self.conversations)}: leave the setting out, or use one of these"
            )
        if processor is None:
            return
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.ends = tuple(ends) or (self.tokenizer.eos_token,)
        if self.token_types is None and getattr(processor, "return_mm_token_type_ids", False):
            self.token_types = "mm_token_type_ids"
        self._expansion = lru_cache(maxsize=4096)(self.expansion)
        self._typed = re.compile("|".join(re.escape(token) for token in sorted(self.reserved(), key=len, reverse=True)))

    def __getstate__(self) -> dict:
        # Caches are not sent to other processes, such as a loader's workers: each process fills its own.
        return {name: value for name, value in self.__dict__.items() if name != "_expansion"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._expansion = lru_cache(maxsize=4096)(self.expansion)

    @classmethod
    def load_processor(cls, path: str, config):
        """The processor at ``path`` of a model with this configuration. Pillow does its image work: what it makes
        depends on no chip and no version of torchvision.

        Raises:
            ModelError: it does not belong to the model.
            OSError, ValueError: as transformers.
        """
        # Its part for videos knows no Pillow. Left open, the last argument is asked of whoever sits at a terminal.
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        return processor

    def check_belongs(self, path: str) -> None:
        """Compares the processor with the configuration: they must agree in what both of them contain.

        Args:
            path: where the processor is from, for the message.

        Raises:
            ModelError: they belong to different models.
        """
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        for token in self.ends:
            known = self.tokenizer.convert_tokens_to_ids(token)
            if None not in (known, vocabulary) and known >= vocabulary:
                raise ModelError(
                    f"{path}: {token} is token {known} of its tokenizer, but its config.json has {vocabulary} tokens: "
                    f"{_OTHER_MODEL}"
                )
        if not self.sees:
            return
        token = self.run_token
        if token not in self.tokenizer.get_vocab():
            raise ModelError(
                f"{path}: its tokenizer has no token {token}: take the tokenizer that was published with the model, or "
                "put the model together with fura-vlm assemble"
            )
        known = self.tokenizer.convert_tokens_to_ids(token)
        wanted = getattr(self.config, "image_token_id", getattr(self.config, "image_token_index", known))
        if known != wanted:
            raise ModelError(
                f"{path}: {token} is token {known} in its tokenizer and {wanted} in its config.json: {_OTHER_MODEL}"
            )
        made = getattr(self.processor.image_processor, "patch_size", None)
        seen = _edge(getattr(self.config.vision_config, "patch_size", None))
        if isinstance(made, int) and isinstance(seen, int) and made != seen:
            raise ModelError(
                f"{path}: its processor makes patches of {made} pixels and its config.json has {seen}: {_OTHER_MODEL}"
            )
        theirs = type(self.processor).__name__
        kinds = {kind for kind, name in PROCESSOR_MAPPING_NAMES.items() if name == theirs}
        mine = PROCESSOR_MAPPING_NAMES.get(self.config.model_type)
        if mine and kinds and not kinds & {self.config.model_type, *self.model_types}:
            raise ModelError(
                f"{path} has a {theirs} where a {mine} belongs: take the files that were published with the model"
            )

    def check(self) -> None:
        """Compares, on a small conversation with two pictures, tokens and tensors with the processor's own.

        Raises:
            ModelError: they differ, so the model would be trained on other inputs than it gets later; or answers cannot
                be marked.
        """
        images = [Image.new("RGB", (61, 33), "red"), Image.new("RGB", (30, 95), "blue")]
        turns = [
            Message("user", (Picture(""), Text("What is this?"))),
            Message("assistant", (Text("A cat."),)),
            Message("user", (Text("And this?"), Picture(""))),
            Message("assistant", (Text("A dog."),)),
        ]
        [encoded] = self.encode([(turns, [image.size for image in images])])
        if isinstance(encoded, EncodingError):
            raise ModelError(
                self._of_it(f"a model of the type {self.config.model_type} cannot be trained here: {encoded}")
            )
        ids, _ = self.spread(encoded)
        text = self.template(turns)
        made = self.processor(
            text=[text], images=[images], add_special_tokens=self.adds_special_tokens([text]), return_tensors="pt"
        )
        ours = {"input_ids": torch.from_numpy(ids)[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        ours |= {name: kinds[None] for name, kinds in self.token_type_ids(ids).items()} | self.pixels(images)
        theirs = dict(made)
        differ = sorted(
            name
            for name in {*ours, *theirs}
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        )
        if differ:
            raise ModelError(
                self._of_it(
                    f"a model of the type {self.config.model_type} cannot be trained here: its processor makes other "
                    f"{' and '.join(differ)} of a conversation with two pictures than fura_vlm.families.Family; such a "
                    "model needs a file of its own there"
                )
            )

    def _of_it(self, sentence: str) -> str:
        """The sentence, with what it is about before it."""
        return f"{self.path}: {sentence}" if self.path else sentence[0].upper() + sentence[1:]

    # ------------------------------------------------------------------------------------------------------- text

    @property
    def placeholder(self) -> str:
        """What a chat template writes where a picture stands."""
        return self.processor.image_token

    @property
    def run_token(self) -> str:
        """The token that stands many times for a picture, and that the model replaces with the picture's features."""
        return self.placeholder

    @property
    def run_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.run_token)

    def reserved(self) -> set[str]:
        """Tokens that a text must not contain: they would be taken for pictures, or for the end of a turn."""
        added = self.tokenizer.added_tokens_decoder.values()  # some are special and have no name, as <|im_start|>
        tokens = {*self.tokenizer.all_special_tokens, self.placeholder, self.run_token}
        tokens |= {token.content for token in added if token.special}
        return {token for token in tokens if token.strip()}

    def template(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """The conversation by the chat template: pictures are ``placeholder``; with ``answer_next`` up to where the
        next answer begins."""
        return self.processor.apply_chat_template(
            [self._as_dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_next
        )

    @staticmethod
    def _as_dict(message: Message) -> dict:
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
            for part in message.parts
        ]
        return {"role": message.role, "content": parts}

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation as text.

        Raises:
            EncodingError: a text contains a special token, the template refuses the conversation, or its answers cannot
                be found with certainty.
            ModelError: there is no template.
        """
        self.chat_template()
        self.refuse_typed(messages)
        try:
            text = self.template(messages)
            spans = self._marked(messages, text)
        except (TemplateError, TypeError, ValueError) as error:  # a template may raise any error, with its reason
            raise EncodingError(f"the model's chat template refuses the conversation: {error}") from error
        return Rendered(text, spans)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the model gets to answer the last message, with ``placeholder`` for each picture."""
        return self.template(messages, answer_next=True)

    def refuse_typed(self, messages: Sequence[Message]) -> None:
        """Raises ``EncodingError`` if a text has one of ``reserved``."""
        for message in messages:
            if found := self._typed.search(message.text):
                raise EncodingError(f"the text has {found[0]}, a special token of the model: take it out")

    def _marked(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        if MARKS_ANSWERS.search(self.chat_template()):
            return [(start, self._with_end(text, end)) for start, end in self._generations(messages)]
        spans: list[tuple[int, int]] = []
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        starts = [len(self._before(messages, number, text)) for number in answers]
        for number, start, limit in zip(answers, starts, [*starts[1:], len(text)], strict=True):
            said = messages[number].text.strip()
            at = text.find(said, start, limit)
            if at < 0:
                raise EncodingError("the model's chat template changes answers: they cannot be marked exactly")
            end = self._with_end(text, at + len(said))
            spans.append((start, end))
        return spans

    def _before(self, messages: Sequence[Message], number: int, text: str) -> str:
        before = self.template(messages[:number], answer_next=True)
        if not text.startswith(before):
            raise EncodingError(
                "the model's chat template changes the text of a question once it is answered, so answers cannot be "
                "marked exactly: use a template with {% generation %} around the answers"
            )
        return before

    def _generations(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        tokens = self.tokenizer.special_tokens_map
        _, spans = render_jinja_template(
            [[self._as_dict(message) for message in messages]],
            chat_template=self.chat_template(),
            return_assistant_tokens_mask=True,
            **tokens,
        )
        return [tuple(span) for span in spans[0]]

    def _with_end(self, text: str, end: int) -> int:
        """``end`` moved behind the end token that follows there."""
        if any(text[:end].endswith(token) for token in self.ends):
            return end
        gap = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.ends)) + ")")
        if not (found := gap.match(text, end)):
            raise EncodingError(
                f"the model's chat template does not end an answer with {' or '.join(self.ends)}, so the model would "
                "not learn to stop"
            )
        return found.end()

    def chat_template(self) -> str:
        """Raises ``ModelError`` if the processor has no chat template."""
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ModelError(
                self._of_it(
                    "the model's processor has no chat template: add the file chat_template.jinja that belongs to it, "
                    "or take --conversation vicuna or alpaca for a language model without one"
                )
            )
        return template

    # ----------------------------------------------------------------------------------------------------- tokens

    def expansion(self, width: int, height: int) -> str:
        """What stands in the place of ``placeholder`` for a picture of this size, in pixels.

        By default the processor gets a blank picture of this size, which is exact but slow. A family that can compute
        it from the size alone is faster.

        Raises:
            ModelError: the processor does not say.
            ValueError: as the processor, which refuses such a picture.
        """
        made = self.processor(
            text=[self.placeholder],
            images=[Image.new("RGB", (width, height))],
            return_text_replacement_offsets=True,
        )
        try:
            [[replaced]] = made["text_replacement_offsets"]
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"{type(self.processor).__name__} does not say which tokens a picture becomes, so this model cannot be "
                "trained here"
            ) from error
        return replaced["replacement"]

    def _expanded_picture(self, width: int, height: int) -> str:
        """``expansion``, remembered. Processors refuse a picture beyond their limits with a ``ValueError``."""
        try:
            return self._expansion(width, height)
        except ValueError as error:
            raise EncodingError(f"the model takes no picture of {width} x {height} pixels: {error}") from error

    def encode(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[tuple[int, int]]]]
    ) -> list[Encoded | EncodingError]:
        """Encodes many conversations at once; if one fails, its error takes its place in the result.

        Args:
            conversations: messages, and (width, height) of each of their pictures, in order; of families that do not
                need sizes any numbers will do.
        """
        made: list[Rendered | EncodingError] = []
        runs: list[list[int]] = []
        for messages, sizes in conversations:
            try:
                rendered, counts = self._expanded(self.render(messages), pictures(messages), sizes)
            except EncodingError as error:
                rendered, counts = error, []
            made.append(rendered)
            runs.append(counts)
        texts = [rendered.text if isinstance(rendered, Rendered) else "" for rendered in made]
        if not texts:
            return []
        encodings = self.tokenizer(texts, add_special_tokens=self.adds_special_tokens(texts)).encodings
        return [
            rendered if isinstance(rendered, EncodingError) else self._encoded(rendered, counts, encoding)
            for rendered, counts, encoding in zip(made, runs, encodings, strict=True)
        ]

    def adds_special_tokens(self, texts: Sequence[str]) -> bool:
        """Whether the tokenizer adds the token that begins a text: it must not if the template has written it
        already."""
        bos = self.tokenizer.bos_token
        return not (bos is not None and any(text.startswith(bos) for text in texts))

    def _expanded(self, rendered: Rendered, sources: Sequence[str], sizes) -> tuple[Rendered, list[int]]:
        """The text with each placeholder in its picture's form, runs shortened to one token, and the runs' lengths."""
        places = [found.span() for found in re.finditer(re.escape(self.placeholder), rendered.text)] if sources else []
        if len(places) != len(sources):
            raise EncodingError(
                f"the model's chat template writes only {len(places)} of {len(sources)} pictures: use fewer"
            )
        token, runs, pieces, shifts, last = self.run_token, [], [], [], 0
        for (start, end), size in zip(places, sizes, strict=True):
            text = self._expanded_picture(*size)
            runs += [len(run) // len(token) for run in re.findall(f"(?:{re.escape(token)})+", text)]
            text = re.sub(f"(?:{re.escape(token)})+", lambda _: token, text)
            pieces += [rendered.text[last:start], text]
            shifts.append((end, len(text) - (end - start)))
            last = end
        text = "".join([*pieces, rendered.text[last:]])

        def moved(place: int) -> int:
            return place + sum(shift for end, shift in shifts if end <= place)

        return Rendered(text, [(moved(start), moved(end)) for start, end in rendered.spans]), runs

    def _encoded(self, rendered: Rendered, runs: list[int], encoding) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in rendered.spans:
            first = encoding.char_to_token(start)
            if first is None:  # tokenizers that do not count the space before a word as part of its token
                first = encoding.char_to_token(start + 1)
            supervised[first : encoding.char_to_token(end - 1) + 1] = True
        return Encoded(ids, supervised, np.array(runs, dtype=np.int64))

    def cut(self, encoded: Encoded, max_length: int) -> Encoded:
        """The first tokens, as many as ``max_length`` has room for with all runs spread.

        Raises:
            EncodingError: if a picture would be cut, or if no supervised token is left.
        """
        places = np.flatnonzero(encoded.ids == self.run_id) if len(encoded.runs) else np.empty(0, np.int64)
        surplus = int(encoded.runs.sum()) - len(encoded.runs)
        if len(places) and places[-1] + 1 + surplus > max_length:
            raise EncodingError(
                f"the image ends at token {places[-1] + 1 + surplus}, beyond the maximum length of {max_length}"
            )
        kept = Encoded(encoded.ids[: max_length - surplus], encoded.supervised[: max_length - surplus], encoded.runs)
        if not kept.supervised.any():
            first = encoded.supervised.argmax() + surplus + 1
            raise EncodingError(f"the answer begins at token {first}, beyond the maximum length of {max_length}")
        return kept

    def spread(self, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Input ids and labels, int64, with all runs at their length."""
        copies = np.ones(len(encoded.ids), dtype=np.int64)
        if len(encoded.runs):
            copies[encoded.ids == self.run_id] = encoded.runs
        labels = np.where(encoded.supervised, encoded.ids, IGNORE)
        return np.repeat(encoded.ids, copies), np.repeat(labels, copies)

    # --------------------------------------------------------------------------------------------------- pictures

    token_types: str | None = None
    """The name of the argument that tells the model which tokens belong to pictures (``create_mm_token_type_ids``)."""

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The tensors of the pictures of one conversation, as the model takes them beside its ids."""
        if not images:
            return {}
        made = self.processor(text=[self.placeholder * len(images)], images=[list(images)], return_tensors="pt")
        return {name: value for name, value in made.items() if name not in self.of_text}

    of_text = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}

    def token_type_ids(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Other inputs that the model needs for the tokens ``ids`` (n,): tensors (n,) by name, or none."""
        if self.token_types is None:
            return {}
        [kinds] = self.processor.create_mm_token_type_ids([ids.tolist()])
        return {self.token_types: torch.tensor(kinds)}

    def join(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Joins the pictures' tensors of several conversations along the first dimension; in the other dimensions
        smaller ones are filled with zeros."""
        joined = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            joined[name] = torch.cat([_filled_up(value, shape) for value in values])
        return joined

    # -------------------------------------------------------------------------------------------------- answering

    def inputs(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> dict:
        """The model's inputs to answer the last message, a batch of one: ``input_ids`` and ``attention_mask``
        (1, n) int64, and the tensors of the pictures.

        Args:
            images: the pictures of the messages, in order.
        """
        text = self.prompt(messages)
        made = self.processor(
            text=[text],
            **({"images": [list(images)]} if images else {}),
            add_special_tokens=self.adds_special_tokens([text]),
            return_tensors="pt",
        )
        return dict(made)

    def prompt_length(self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> int:
        """The tokens of ``inputs``, without its pictures.

        Args:
            sizes: (width, height) of each picture, in order; of families that do not need sizes any numbers will do.

        Raises:
            EncodingError: the model does not take the pictures.
        """
        expanded, runs = self._expanded(Rendered(self.prompt(messages), []), pictures(messages), sizes)
        ids = self.tokenizer(expanded.text, add_special_tokens=self.adds_special_tokens([expanded.text]))["input_ids"]
        return len(ids) + sum(runs) - len(runs)

    def picture_length(self, width: int, height: int) -> int:
        """The tokens of a picture of this size that the model puts features in place of.

        Raises:
            EncodingError: the model does not take it.
        """
        return self._expanded_picture(width, height).count(self.run_token)

    def seen(self, image: Image.Image) -> tuple[Image.Image, str]:
        """A picture as the model sees it, to show to people, and a phrase that says what becomes of its pixels, to
        follow "640 x 480 pixels". By default it is the picture itself and its number of tokens.

        Raises:
            EncodingError: the model does not take it.
        """
        return image, f"become {self.picture_length(*image.size):,} tokens."

    def batch(self, several: Sequence[dict]) -> dict[str, torch.Tensor]:
        """``inputs`` of several conversations as one batch, padded on the left."""
        values = {"input_ids": self.tokenizer.pad_token_id}
        texts = {
            name: pad_sequence(
                [each[name][0] for each in several],
                batch_first=True,
                padding_value=values.get(name, 0),
                padding_side="left",
            )
            for name in several[0]
            if name in self.of_text
        }
        tensors = [{name: value for name, value in each.items() if name not in self.of_text} for each in several]
        return texts | self.join([each for each in tensors if each])

    def blank(self) -> dict[str, torch.Tensor]:
        """The tensors of a small blank picture, for a process whose batch has none."""
        return self.pixels([Image.new("RGB", (32, 32))])

    # ------------------------------------------------------------------------------------------------------ model

    def prepare_tower(self, tower: nn.Module) -> None:
        """Has the tower do the same faster, before a training; by default nothing."""

    def parts(self, model: nn.Module) -> Parts:
        """The modules of a model, as it is or within a PEFT model."""
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        decoder, tower = model.get_decoder(), self.tower(model)
        if tower is None:
            return Parts(decoder, model.get_output_embeddings(), None, [])
        if self.projector_names is not None:
            projectors = [model.model.get_submodule(name) for name in self.projector_names]
        else:
            projectors = [part for part in model.model.children() if part is not decoder and part is not tower]
        return Parts(decoder, model.get_output_embeddings(), tower, projectors)

    @cached_property
    def names(self) -> Names:
        """Where ``parts`` are, looked up on a model that takes no memory."""
        # Otherwise transformers would let ZeRO-3 cut this model into parts, too.
        with torch.device("meta"), no_init_weights(), set_zero3_state():
            model = model_class(self.config).from_config(self.config)
        parts = self.parts(model)
        name_of = {id(module): name for name, module in model.named_modules()}
        return Names(
            name_of[id(parts.decoder)],
            name_of[id(parts.head)],
            None if parts.tower is None else name_of[id(parts.tower)],
            [name_of[id(projector)] for projector in parts.projectors],
        )

    def tower(self, model: nn.Module) -> nn.Module | None:
        """The vision tower of a plain model; in some families the projector is a part of it."""
        return model.get_encoder(modality="image")

    def picture_features(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """All that the tower and the projector make of the tensors of ``pixels``."""
        made = model.model.get_image_features(**inputs, return_dict=True)
        return list(_tensors(made.pooler_output)) + list(_tensors(made.get("deepstack_features")))

    def position_offset(self, model: nn.Module, inputs: dict) -> int:
        """After the model has read one prompt: the next token's position minus its place in the sequence. It is not 0
        if a picture takes fewer positions than tokens (M-RoPE).

        Args:
            model: the plain model, which remembers the offset of the pictures that it read last.
            inputs: what it has read, as ``inputs`` makes it.
        """
        if inputs.keys() <= self.of_text:
            return 0
        deltas = getattr(model.model, "rope_deltas", None)
        return 0 if deltas is None else int(deltas.flatten()[0])

    def embed(self, model: nn.Module, input_ids: torch.Tensor, places: torch.Tensor, of_pictures: dict):
        """Words with the features of pictures in their places, (rows, length, hidden size), without reading anything
        back from the device; ``None`` if only the model itself can put them together.

        Args:
            input_ids: (rows, length) int64.
            places: rows and positions of the pictures' tokens, (2, number) int64.
            of_pictures: the tensors of ``pixels``.
        """
        return None

    @property
    def picture_tokens(self) -> int:
        """Tokens of a usual picture, from the configuration alone: the number of every picture if it is the same for
        all, else that of one tile, else LLaVA-1.5's."""
        found = (getattr(self.config, name, None) for name in ("image_seq_length", "mm_tokens_per_image"))
        return next(filter(None, found), 576)

    def patches(self) -> Patches:
        """Of the tower, for the arithmetic of a step: of a square picture of twice the size that the tower takes. By
        default the processor is asked, and without one, four patches a token are assumed, as most models have them."""
        vision = self.config.vision_config
        size, patch = (_edge(getattr(vision, name, 0)) for name in ("image_size", "patch_size"))
        if self.processor is None:
            return Patches(4.0, (size // patch) ** 2 or 32**2)
        edge = 2 * (size or 448)
        elements = self.pixels([Image.new("RGB", (edge, edge))])["pixel_values"].numel()
        number = elements / (3 * patch**2 * getattr(vision, "temporal_patch_size", 1))
        tokens = len(re.findall(re.escape(self.run_token), self._expansion(edge, edge)))
        return Patches(number / tokens, (size // patch) ** 2 or int(number))


def _edge(size) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


def _filled_up(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    missing = [size - have for size, have in zip(shape, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    return nn.functional.pad(value, [width for size in reversed(missing) for width in (0, size)])


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def model_class(config) -> type[AutoModelForImageTextToText | AutoModelForCausalLM]:
    """transformers' class that makes a model of a configuration.

    Raises:
        ModelError: transformers has no class for it, because it is neither a language model nor one with pictures.
    """
    for cls in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in cls._model_mapping:
            return cls
    raise ModelError(
        f"A model of the type {config.model_type} is neither a language model nor one that sees and writes: take one "
        "that transformers' AutoModelForImageTextToText or AutoModelForCausalLM loads"
    )
