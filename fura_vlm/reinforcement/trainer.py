"""TRL's GRPOTrainer over the models and run folders of this project."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

from transformers import ProgressCallback
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from fura_vlm.data.images import load_image
from fura_vlm.decoding.loop import Loop, stay
from fura_vlm.errors import ModelError
from fura_vlm.families.base import Family
from fura_vlm.families.messages import Message, Text, pictures
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.reinforcement.data import Asked, rows
from fura_vlm.reinforcement.memory import fewer_rollouts
from fura_vlm.reinforcement.sampler import PromptSampler
from fura_vlm.training.config import zero
from fura_vlm.training.methods import method_of
from fura_vlm.training.trainer import RunTrainer

KEPT = 1 / 16
"""Of a GPU's memory: what the cache of the answers may take while the model is trained on them."""


class GrpoTrainer(RunTrainer, GRPOTrainer):
    """GRPO as TRL has it. What is different: questions are put in the family's form and read in an order that a
    resumed run keeps; answers are written in evaluation mode, and with advice if memory runs out."""

    def __init__(self, *args, config: GrpoConfig, **kwargs):
        self.config = config
        super().__init__(*args, **kwargs)
        self._loop: Loop | None = None  # made with the first answers: the model is where it stays then
        if self.pop_callback(ProgressCallback):
            self.add_callback(RewardProgress)

    def _get_train_sampler(self, dataset=None) -> PromptSampler:
        return PromptSampler(
            len(self.train_dataset),
            self.config.prompts_per_step,
            self.args.generation_batch_size // self.num_generations,
            self.num_generations,
            self.args.steps_per_generation,
            self.args.seed,
        )

    def _tokenize_prompts(self, prompts):
        """As the model is trained and asked everywhere here; TRL would take the tokenizer's own template. With
        pictures, it takes the processor's, which is the family's."""
        if self.family.sees:
            return super()._tokenize_prompts(prompts)
        asked = [[Message(turn["role"], (Text(turn["content"]),)) for turn in prompt] for prompt in prompts]
        return [self.family.inputs(messages, [])["input_ids"][0].tolist() for messages in asked], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        # In evaluation mode FuRA keeps its blocks from token to token, and nothing is dropped out. But on a CPU
        # bitsandbytes packs a base in 4 bits then, for good, in a form that no gradient goes through.
        if not (method_of(self.config).four_bits and self.args.device.type == "cpu"):
            self.model.eval()
        try:
            with fewer_rollouts(self.config), self._graphs():
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model.train()

    @contextmanager
    def _graphs(self):
        """Within it, ``generate`` takes its steps as CUDA graphs, where the model's weights are all here."""
        if self.use_vllm or zero(self.config).get("stage") == 3:
            yield
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if self._loop is None:
            self._loop = Loop(model, self.family, KEPT)
            if self._loop.able:
                stay(model)
        if not self._loop.able:
            yield
            return
        model.generate = partial(model.generate, custom_generate=self._loop)
        try:
            yield
        finally:
            del model.generate

    def _save(self, output_dir=None, state_dict=None):
        kept, self.processing_class = self.processing_class, None  # it is in the run folder
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = kept

    def create_model_card(self, *args, **kwargs):
        """None: the adapter has its own."""

    def _send_telemetry(self):
        """Nothing is reported to anybody."""


def check_tokens(family: Family, question: Asked) -> None:
    """Compares what TRL makes of a question with pictures with what the family makes of it.

    Raises:
        ModelError: the model would be trained on other tokens than it is asked with.
    """
    images = [load_image(path) for path in pictures(question.messages)]
    [row] = rows([question])
    prompt = prepare_multimodal_messages(row["prompt"], images=images)
    made = family.processor.apply_chat_template(
        conversation=[prompt], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    if list(made["input_ids"][0]) != family.inputs(question.messages, images)["input_ids"][0].tolist():
        raise ModelError(
            f"A model of the type {family.config.model_type} in the form {family.conversation} cannot be trained by "
            "reward on pictures: TRL puts its questions into other tokens than those it is asked with here; leave "
            "--conversation out, or take a model of another family"
        )


class RewardProgress(ProgressCallback):
    """transformers' progress bar, with what matters of the logged figures on a readable line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "reward" not in (logs or {}):
            return
        parts = [f"step {state.global_step}/{state.max_steps}", f"reward {logs['reward']:.3f}"]
        parts.append(f"groups of one reward {100 * logs['frac_reward_zero_std']:.0f} %")
        parts.append(f"unread {100 * logs['unread']:.0f} %")
        parts.append(f"{logs['completions/mean_length']:.0f} tokens")
        parts.append(f"cut off {100 * logs['completions/clipped_ratio']:.0f} %")
        parts.append(f"lr {logs['learning_rate']:.2e}")
        parts.append(f"{logs['step_time']:.1f} s")
        self.training_bar.write("  ".join(parts))
