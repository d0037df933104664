"""transformers' ``generate``, with the steps after the prompt as CUDA graphs.

``generate`` lets a caller bring the loop in which tokens are written. This one writes what its own does, with the
settings, the logits processors and the stopping criteria that ``generate`` has made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from fura_vlm.decoding.attention import NAME
from fura_vlm.decoding.rows import Decoder, Rows, can_join
from fura_vlm.families.base import Family
from fura_vlm.fura.layer import FuraLayer


class Loop:
    """For ``generate(..., custom_generate=loop)`` of one model whose weights are all on one GPU, without beams, a
    streamer and ``stop_strings``, which ``generate`` does not hand on.

    The cache and the graphs are kept for the next call. Graphs are made anew where the model's tensors have moved or
    another adapter is on. What has been trained in place is seen, for the prompt is read by the model itself. Calls
    that it cannot make are left to ``generate``'s own loop.

    Attributes:
        able: the model's steps can be recorded. If not, ``generate`` is to be called without the loop.

    Args:
        model: as it is or within a PEFT model.
        family: that of the model.
        keeps: a cache of up to this share of the GPU's memory is kept from call to call, and the graphs with it.
    """

    def __init__(self, model, family: Family, keeps: float = 1.0) -> None:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        self._config = plain.config.get_text_config(decoder=True)
        with self._own_attention():
            self._decoder = Decoder(plain, family, graphs=can_join(self._config))
        self.able, self._keeps = self._decoder.records, keeps
        self._forget()

    def _forget(self) -> None:
        self._rows, self._recorded = Rows(self._decoder, keeps=float("inf")), None

    def __call__(
        self,
        model,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ):
        """As ``GenerationMixin._sample``. Returns: prompts and answers, (rows, length) int64."""
        arguments = model, input_ids, logits_processor, stopping_criteria, generation_config
        asks_more = (
            generation_config.return_dict_in_generate
            or generation_config.prefill_chunk_size is not None
            or generation_config.cache_implementation is not None
            or getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False)
            or model_kwargs.get("inputs_embeds") is not None
        )
        if asks_more or not self.able or model.dtype != self._decoder.dtype:
            return model._sample(*arguments[1:], **model_kwargs)
        try:
            with model._optimize_model_for_decode():
                written = self._write(*arguments, dict(model_kwargs))
            return model._sample(*arguments[1:], **model_kwargs) if written is None else written
        except BaseException:
            self._forget()  # it may be a lack of memory, so let go of ours
            raise
        finally:
            self.able = self.able and not self._rows.failed
            self._rows.clear()
            if input_ids.is_cuda and self._rows.bytes > self._keeps * torch.cuda.mem_get_info(input_ids.device)[1]:
                self._forget()

    def _write(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs):
        count, length = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        pads = [0] * count if mask is None else (length - mask.sum(1)).tolist()
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        room = generation_config.max_length - length
        model_kwargs["past_key_values"] = self._rows.read(pads, length, room, input_ids.device)
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits, unfinished = outputs.logits[:, -1], torch.ones_like(input_ids[:, 0])
        del outputs
        while True:
            # As ``generate`` has it: which of equal ones is taken depends on the dtype.
            scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if ends:
                padding = generation_config._pad_token_tensor.to(tokens.device)
                tokens = torch.where(unfinished.bool(), tokens, padding)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            if not unfinished.any():
                return input_ids
            if not self._rows.rows:
                positions = self._next_positions(model, input_ids, model_kwargs)
                if positions is None:
                    self.able = False
                    return None
                places = torch.tensor(pads, device=tokens.device).neg_().add_(length)
                self._rows.begin(list(range(count)), tokens, positions - places)
                self._check_memory()
            self._rows.last = tokens
            with self._own_attention():
                logits = self._rows.step()

    @staticmethod
    def _next_positions(model, input_ids: torch.Tensor, model_kwargs: dict) -> torch.Tensor | None:
        """Where the tokens are that come first after the prompts, (rows) int64, as the model itself has it: a picture
        may take fewer positions than tokens. ``None`` if the model does not say."""
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        positions = inputs.get("position_ids")
        return None if positions is None else positions.reshape(-1, len(input_ids))[-1]

    def _check_memory(self) -> None:
        """Lets go of the graphs if they were recorded with other tensors, or with other adapters on."""
        now: list = []
        for module in self._decoder.modules():
            now += [tensor.data_ptr() for tensor in (*module._parameters.values(), *module._buffers.values())
                    if tensor is not None]  # fmt: skip
            if isinstance(module, BaseTunerLayer):
                now += [*module.active_adapters, module.disable_adapters, *module.merged_adapters]
            if isinstance(module, FuraLayer):
                now += [blocks.data_ptr() for blocks in module.kept_blocks()]
        if now != self._recorded:
            self._rows.forget()
        self._recorded = now

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Within it, the decoder's attention is that of ``fura_vlm.decoding.attention``, if the model's is ``sdpa``."""
        before = self._config._attn_implementation
        if before == "sdpa":
            self._config._attn_implementation = NAME
        try:
            yield
        finally:
            self._config._attn_implementation = before


def stay(model: nn.Module) -> None:
    """For a model that is trained between calls of a `Loop`: its FuRA adapters keep their block matrices in the same
    memory, so that recorded graphs stay valid."""
    for module in model.modules():
        if isinstance(module, FuraLayer):
            module.blocks_stay = True
