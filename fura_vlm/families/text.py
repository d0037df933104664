"""Language models: any causal one with a chat template, and Vicuna's and Alpaca's forms for those without."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import AutoTokenizer

from fura_vlm.families import alpaca, vicuna
from fura_vlm.families.base import EncodingError, Family, Patches, Rendered
from fura_vlm.families.messages import Message, pictures

FORMS = {"vicuna": vicuna, "alpaca": alpaca}


class Language(Family):
    """A language model.

    Its processor is a fast tokenizer. Its conversations are the tokenizer's own template, Vicuna's and Alpaca's form.
    """

    conversations = ("template", *FORMS)
    needs_sizes = False
    sees = False

    def __init__(self, processor, config, ends: Sequence[str] = (), conversation: str | None = None):
        if processor is None:
            return super().__init__(processor, config, ends, conversation)
        kept = processor.init_kwargs  # saved with the tokenizer: a trained model is asked as it was trained
        super().__init__(processor, config, ends, conversation or kept.get("conversation"))
        if self.conversation != self.conversations[0] or "conversation" in kept:
            kept["conversation"] = self.conversation

    @classmethod
    def load_processor(cls, path: str, config):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.pad_token is None:  # Llama 3 has none; masks and labels come from lengths, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    placeholder = run_token = ""

    @property
    def run_id(self) -> int:
        return -1

    def render(self, messages: Sequence[Message]) -> Rendered:
        if pictures(messages):
            raise EncodingError(
                "a picture, and the model takes text alone: leave the record out, or take another model"
            )
        if self.conversation == "template":
            return super().render(messages)
        self.refuse_typed(messages)
        return FORMS[self.conversation].render(messages, self.tokenizer.eos_token)

    def prompt(self, messages: Sequence[Message]) -> str:
        if self.conversation == "template":
            return super().prompt(messages)
        return FORMS[self.conversation].prompt(messages, self.tokenizer.eos_token)

    @staticmethod
    def _as_dict(message: Message) -> dict:
        return {"role": message.role, "content": message.text}

    def adds_special_tokens(self, texts: Sequence[str]) -> bool:
        return self.conversation != "template"  # a template writes them itself

    def inputs(self, messages: Sequence[Message], images: Sequence) -> dict:
        if images:
            raise EncodingError("it has a picture, and the model takes text alone")
        return super().inputs(messages, [])

    def tower(self, model: nn.Module) -> None:
        return None

    def patches(self) -> Patches:
        return Patches(0, 0)
