"""LLaVA, with or without an adapter, as a model of lmms-eval: batched, left-padded, several processes.

lmms-eval finds it by the entry point in ``pyproject.toml``::

    python -m lmms_eval --model fura_llava --model_args pretrained=BASE,adapter=FOLDER --tasks gqa --batch_size auto

What differs from lmms-eval's own ``llava_hf``: any batch size; an exception names the document and ends the
evaluation, where ``llava_hf`` goes on with an empty answer; no video library is needed; finished batches are kept on
disk, where a ``cache`` is named.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from importlib.metadata import version

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig

import fura_vlm.fura  # noqa: F401  registers FuRA with PEFT
from fura_vlm.data.conversation import prompt
from fura_vlm.data.records import IMAGE, Turn
from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.answers import AnswerStore, request_key
from fura_vlm.evaluation.source import find_model

MAX_NEW_TOKENS = 128
"""Where a task sets no limit: that of LLaVA's own evaluation scripts."""

MAX_BATCH_SIZE = 128
"""Where ``auto`` starts. On one H200 the 7B gains nothing from larger batches."""


class EvaluationError(FuraVLMError):
    """An evaluation that cannot go on; the message names the task and the document."""


class FuraLlava(lmms):
    """A LLaVA for lmms-eval. ``loglikelihood`` and rounds of questions are not among what it can do.

    Args:
        pretrained: a LLaVA, merged or not (a folder or a name on the hub), a run folder, or an adapter's folder.
        adapter: any PEFT adapter over ``pretrained``.
        processor: where the processor is, if not with the model.
        batch_size: requests answered at once, or ``"auto"``: as many as fit, at most ``max_batch_size``. Either is
            halved, for good, when memory runs out.
        max_batch_size: the most that ``"auto"`` tries.
        device: where the model runs; by default the GPU of this process, or the CPU.
        dtype: ``"auto"`` is bfloat16 on a GPU and float32 elsewhere; or the name of a torch dtype.
        attn_implementation: as in transformers.
        square_padding: pad pictures to a square with the mean colour, as LLaVA v1.5 was trained; published
            processors crop the centre instead, which ``False`` leaves to the processor.
        num_workers: processes that decode and preprocess ahead of the model; by default up to 8 beside a GPU, none
            without one.
        cache: a folder for finished answers; by default none are kept. Only greedy answers are.

    Raises:
        ModelError: if model, adapter or processor cannot be used.
        EvaluationError: if ``batch_size`` is no number above 0 and not ``"auto"``.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        adapter: str | None = None,
        processor: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        square_padding: bool = True,
        num_workers: int | None = None,
        cache: str | None = None,
    ) -> None:
        source = find_model(str(pretrained), adapter)
        source = replace(source, processor=processor or source.processor)
        self._set_up(batch_size, max_batch_size, device, dtype)
        model, self.processor = source.load(self.dtype, attn_implementation)
        self._use(model, square_padding, num_workers)
        if cache:
            self._store = AnswerStore(cache, self._rank)
            kind = (str(self.dtype), square_padding, version("lmms-eval"), version("transformers"))
            self._identity = [source.fingerprint(), *kind]

    @classmethod
    def from_model(cls, model, processor, batch_size: int | str = "auto", num_workers: int | None = None) -> FuraLlava:
        """For a model in memory, which stays on its device and in its dtype."""
        self = cls.__new__(cls)
        self._set_up(batch_size, None, str(model.device), str(model.dtype).removeprefix("torch."))
        self.processor = processor
        self._use(model, True, num_workers)
        return self

    def _set_up(self, batch_size, max_batch_size, device, dtype) -> None:
        lmms.__init__(self)
        if batch_size == "auto":
            self._fits = int(max_batch_size or MAX_BATCH_SIZE)
        elif str(batch_size).isdigit() and int(batch_size) > 0:
            self._fits = int(batch_size)
        else:
            raise EvaluationError(f"batch_size is {batch_size!r}: give a number above 0, or auto")
        cuda = torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.accelerator = Accelerator(cpu=not cuda)
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = device or str(self.accelerator.device)
        self.device = torch.device(device or ("cuda" if cuda else "cpu"))
        if dtype == "auto":
            self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        else:
            self.dtype = getattr(torch, dtype)

    def _use(self, model, square_padding: bool, num_workers: int | None) -> None:
        self.model = model.to(self.device).eval()
        if square_padding:
            self.processor.image_processor.do_pad = True
        if num_workers is None:
            num_workers = min(8, os.cpu_count() or 1) if self.device.type == "cuda" else 0
        self._num_workers = num_workers
        self._store, self._identity = None, []
        # The workers are copies of this process; tokenizers would warn about its threads once for each of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    @property
    def batch_size(self) -> int:
        """Requests answered at once, as far as is known now."""
        return self._fits

    def loglikelihood(self, requests: list[Instance]):
        raise EvaluationError("fura_llava generates answers; this task asks for log-likelihoods: choose another one")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise EvaluationError("fura_llava answers single questions; this task has several rounds: choose another one")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the order of ``requests``.

        Requests with the same generation arguments share batches; the longest come first, so that little is padded
        and a batch that does not fit shows at once.

        Raises:
            EvaluationError: if a request cannot be answered; the message has its task and document.
        """
        answers: list[str | None] = [None] * len(requests)
        keys, groups = {}, {}
        for position, request in enumerate(requests):
            if request.metadata.get("__padding_only__"):  # evens out the processes; nobody reads its answer
                answers[position] = ""
                continue
            generation = generation_arguments(request.args[1])
            if self._store and not generation["do_sample"]:
                keys[position] = self._key(request, generation)
                answers[position] = self._store.get(keys[position])
            if answers[position] is None:
                name = repr(sorted(generation.items()))
                groups.setdefault(name, (generation, []))[1].append(position)

        batches = []
        for generation, positions in groups.values():
            lengths = self.processor.tokenizer([requests[p].args[0] for p in positions], return_length=True)["length"]
            order = [p for _, p in sorted(zip(lengths, positions, strict=True), key=lambda pair: -pair[0])]
            size = self._fits
            batches += [(generation, order[start : start + size]) for start in range(0, len(order), size)]

        loader = DataLoader(
            _Prepared(self.processor, self.task_dict, requests, [positions for _, positions in batches], self.dtype),
            batch_size=None,
            num_workers=min(self._num_workers, len(batches)),
            pin_memory=self.device.type == "cuda",
        )
        todo = sum(len(positions) for _, positions in batches)
        bar = tqdm(total=todo, desc="answers", disable=self._rank != 0 or not todo, mininterval=1)
        for (generation, positions), prepared in zip(batches, loader, strict=True):
            if isinstance(prepared, EvaluationError):
                raise prepared
            try:
                texts = self._answer(prepared, generation)
            except Exception as error:
                raise EvaluationError(f"{_name(requests, positions)}: {_first_line(error)}") from error
            for position, text in zip(positions, texts, strict=True):
                answers[position] = text
            if self._store and positions[0] in keys:
                self._store.add({keys[position]: answers[position] for position in positions})
            bar.update(len(positions))
        bar.close()
        return answers

    def _key(self, request: Instance, generation: dict) -> str:
        context, _, _, document, task, split = request.args
        return request_key(
            model=self._identity,
            task=task,
            data=self.task_dict[task][split]._fingerprint,
            document=document,
            context=context,
            generation=generation,
        )

    def _answer(self, prepared: dict, generation: dict) -> list[str]:
        """The answers of a batch, in as many parts as memory asks for."""
        texts: list[str] = []
        while len(texts) < len(prepared["pictures"]):
            part = slice(len(texts), len(texts) + self._fits)
            try:
                texts += self._generate(_rows(prepared, part), generation)
            except RuntimeError as error:
                if self._fits == 1 or not should_reduce_batch_size(error):
                    raise
                self._fits = max(1, min(self._fits, len(prepared["pictures"])) // 2)
                logger.warning(f"Out of memory: batches of {self._fits} from here on")
            else:
                continue
            gc.collect()  # after the except clause, whose traceback holds the tensors of the failed batch
            torch.cuda.empty_cache()
        return texts

    @torch.inference_mode()
    def _generate(self, inputs: dict[str, torch.Tensor], generation: dict) -> list[str]:
        tokenizer = self.processor.tokenizer
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        until = generation["until"]
        generated = self.model.generate(
            **inputs,
            **{name: value for name, value in generation.items() if name != "until"},
            **({"stop_strings": until, "tokenizer": tokenizer} if until else {}),
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_cut(text, until) for text in texts]


class _Prepared(Dataset):
    """Batches as the model takes them; an item is a batch, or the ``EvaluationError`` that preparing it met.

    An item has ``input_ids`` and ``attention_mask`` (n, tokens) int64, padded on the left, ``pictures`` (n,) int64,
    their number for each request, and, if there are any, ``pixel_values`` (pictures, 3, height, width).
    """

    def __init__(self, processor, documents: dict, requests: list[Instance], batches: list[list[int]], dtype):
        self.processor, self.documents, self.requests = processor, documents, requests
        self.batches, self.dtype = batches, dtype

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor] | EvaluationError:
        positions = self.batches[number]
        try:
            return self._prepare(positions)
        except Exception:
            pass
        for position in positions:  # which one it was
            try:
                self._prepare([position])
            except Exception as error:
                return EvaluationError(f"{_name(self.requests, [position])}: {_first_line(error)}")
        return EvaluationError(f"{_name(self.requests, positions)}: they cannot be put into one batch")

    def _prepare(self, positions: list[int]) -> dict[str, torch.Tensor]:
        texts, pictures, numbers = [], [], []
        for position in positions:
            context, _, doc_to_visual, document, task, split = self.requests[position].args
            visuals = doc_to_visual(self.documents[task][split][document])
            visuals = visuals if isinstance(visuals, list) else [visuals] if visuals is not None else []
            if not all(isinstance(visual, Image.Image) for visual in visuals):
                raise TypeError("it has a video or a sound, and LLaVA takes pictures")
            texts.append(_question(context, len(visuals)))
            pictures += visuals
            numbers.append(len(visuals))
        inputs = self.processor(
            text=texts, images=pictures or None, padding=True, padding_side="left", return_tensors="pt"
        )
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if pictures:
            batch["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return batch | {"pictures": torch.tensor(numbers)}


def _question(context: str, pictures: int) -> str:
    """The prompt of the Vicuna v1 conversation. Pictures stand before the question, as in training."""
    text = context.replace(IMAGE, "").strip()
    if not pictures:
        return prompt([Turn("human", text)])
    return prompt([Turn("human", f"{IMAGE}\n{text}")]).replace(IMAGE, " ".join([IMAGE] * pictures))


def _rows(prepared: dict[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    """The inputs of some requests of a batch."""
    inputs = {name: prepared[name][part] for name in ("input_ids", "attention_mask")}
    ends = prepared["pictures"].cumsum(0).tolist()
    first, last = ([0] + ends)[part.start], ends[min(part.stop, len(ends)) - 1]
    if last > first:
        inputs["pixel_values"] = prepared["pixel_values"][first:last]
    return inputs


_KNOWN = frozenset(GenerationConfig().to_dict()) | {"min_p", "typical_p"}
_FOR_OTHER_MODELS = frozenset({"image_aspect_ratio"})


def generation_arguments(task: dict | None) -> dict:
    """The arguments of ``generate`` for what a task asks, with ``until``, a list of strings that end an answer.

    lmms-eval's tasks write a temperature of 0 for greedy decoding, which transformers refuses, and name sampling
    settings beside it, which it warns about.
    """
    given = dict(task or {})
    until = given.pop("until", None) or []
    limit = given.pop("max_gen_toks", None)
    temperature = given.pop("temperature", None)
    sample = bool(given.pop("do_sample", temperature)) and temperature != 0
    settings = {name: given.pop(name, None) for name in ("top_p", "top_k")}
    arguments = {name: value for name, value in given.items() if name in _KNOWN}
    unknown = given.keys() - arguments.keys() - _FOR_OTHER_MODELS
    if unknown:
        logger.warning(f"Generation arguments that transformers does not know are left out: {sorted(unknown)}")
    if not sample:
        settings, temperature = {"top_p": None, "top_k": None}, None
    elif temperature is None:
        temperature = 1.0
    arguments |= {name: value for name, value in settings.items() if not sample or value is not None}
    arguments["max_new_tokens"] = given.get("max_new_tokens") or limit or MAX_NEW_TOKENS
    return arguments | {
        "until": [until] if isinstance(until, str) else list(until),
        "do_sample": sample,
        "temperature": temperature,
    }


def _cut(text: str, until: list[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text.strip()


def _name(requests: list[Instance], positions: list[int]) -> str:
    _, _, _, _, task, _ = requests[positions[0]].args
    documents = ", ".join(str(requests[position].args[3]) for position in positions[:8])
    more = ", ..." if len(positions) > 8 else ""
    return f"{task}, document{'s' * (len(positions) > 1)} {documents}{more}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
