"""Settings that are auto: what is chosen, what happens when memory runs out, and that nothing is left of the trial."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from family_models import BUILDERS
from family_talk import PICTURES, conversations, encode
from peft import PeftModel
from safetensors.torch import load_file
from transformers import MambaConfig

from fura_vlm.data.collator import Collator
from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.data.records import read_records
from fura_vlm.families.llava import named_config
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.plan.choose import Choice, Data, in_order, possible, without_gpu
from fura_vlm.plan.costs import GIB, SLACK, Gpu, Setting, memory, step_seconds, update_seconds
from fura_vlm.plan.shapes import Counts
from fura_vlm.training.auto import as_chosen, counts_of, keep_to, room
from fura_vlm.training.config import AUTO as FIELDS
from fura_vlm.training.config import TrainConfig, least_settings
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.loss import train_on_labels_only
from fura_vlm.training.methods import METHODS, prepare, quantization
from fura_vlm.training.rehearsal import rehearse

H100 = Gpu("H100", 989e12, 3.35e12, 300e9)
AUTO = dict.fromkeys(FIELDS, "auto")
# LoRA has dropout, and so shows whether random numbers were drawn.
RUN = {"train_batch_size": 4, "method": "lora", "lora_r": 8, "max_steps": 2, "warmup_steps": 0}


def choice(batch, needed, rate, checkpointing=False):
    return Choice(batch, checkpointing, 1.0, [0], needed, 0, rate)


# ------------------------------------------------------------------------------------------------------------ the plan


def test_the_fastest_that_fits_then_the_fastest_of_the_smaller():
    big, good, close, slow, tiny = table = [
        choice(16, 90, 1000), choice(8, 50, 900), choice(4, 30, 890), choice(16, 20, 700, True), choice(1, 10, 650),
    ]  # fmt: skip
    assert in_order(table, 100) == [big, good, close, slow, tiny]
    assert in_order(table, 60) == [good, close, slow, tiny]
    assert in_order(table, 5) == [tiny]  # the smallest, all the same: a plan may be wrong
    assert in_order(table, 100, kept=slow) == [slow, tiny]
    assert in_order([choice(8, 50, 899), choice(8, 49.9, 900)], 60) == [choice(8, 50, 899)]  # nearly equal: the simpler


@pytest.mark.parametrize(("method", "gpus", "gigabytes"), [("fura", 1, 72), ("lora", 2, 72), ("fura", 1, 20)])
def test_the_choice_against_all_sums(method, gpus, gigabytes):
    """LLaVA-1.5-7B, 128 records a step of 832 tokens and one of 2048, a quarter of them with a loss, against memory and
    time of every setting in an explicit table."""
    train = TrainConfig(method=method, train_batch_size=128, compile_layers=True, **AUTO)
    counted = Counts(named_config("7b"), train)
    data = Data(np.array([832] * 999 + [2048]), np.array([208] * 999 + [512]))
    found = possible(train, counted, (1, False), gpus, H100, data)
    first = in_order(found, gigabytes * GIB)[0]
    best = 0.0
    for batch, checkpointing, budget in itertools.product((1, 2, 4, 8, 16, 32), (False, True), (1.0, 0.9)):
        setting = Setting(method, gpus, 1, False, checkpointing, batch, True, budget)
        labelled = (512 + (batch - 1) * 208) / (batch * 2048)
        parts = memory(TrainConfig(model_max_length=2048), counted, setting, labelled)
        needed = SLACK * (sum(parts.values()) - parts["reserve"])
        turns = 128 / batch / gpus
        mean = (832 * 999 + 2048) / 1000
        seconds = turns * step_seconds(counted, setting, batch * mean, H100) + update_seconds(counted, setting, H100)
        rate = 128 * mean / seconds
        [same] = [c for c in found if (c.batch, c.checkpointing, c.budget) == (batch, checkpointing, budget)]
        assert same.needed == pytest.approx(needed) and same.rate == pytest.approx(rate)
        if needed <= gigabytes * GIB:
            best = max(best, rate)
    assert len(found) == 24
    assert first.needed <= gigabytes * GIB and first.rate >= 0.98 * best > 0


def test_what_the_recipe_says_is_left_alone():
    train = TrainConfig(train_batch_size=128, compile_layers=True, gradient_checkpointing="auto")
    counted = Counts(named_config("7b"), train)
    data = Data(np.array([100, 200]), np.array([50, 50]))
    found = possible(train, counted, (1, False), 1, H100, data)
    assert [(c.batch, c.checkpointing, c.budget) for c in found] == [(16, False, 1.0), (16, True, 1.0)]
    assert [c.checkpointing for c in possible(train, counted, (1, False), 1, H100, data, can_checkpoint=False)] == [
        False
    ]
    settings = found[1].put_into(train)
    assert (settings.per_device_train_batch_size, settings.gradient_checkpointing) == (16, True)
    assert settings.train_batch_size == 128  # as the recipe says


def test_no_batch_takes_more_than_the_heaviest():
    """Against every batch of three of seven records: what it is padded to, and its labels."""
    rng = np.random.default_rng(0)
    for token, label in ((3, 0), (1, 5), (2, 2)):
        data = Data(rng.integers(1, 20, 7), rng.integers(0, 5, 7))

        def weight(rows, data=data, token=token, label=label):
            return 3 * token * data.lengths[rows].max() + label * data.labels[rows].sum()

        rows = data.heaviest(3, token, label)
        assert len(set(rows)) == 3 and data.lengths.max() == data.lengths[rows].max()
        others = [weight(list(batch)) for batch in itertools.combinations(range(7), 3)]
        assert weight(rows) >= max(others) - label * data.labels.max()  # the longest may be one of few labels
        assert sorted(data.heaviest(99, token, label)) == list(range(7))


def test_without_a_gpu_nothing_is_planned():
    data = Data(np.array([5, 9, 7]), np.array([1, 1, 1]))
    order = without_gpu(TrainConfig(train_batch_size=24, **AUTO), 1, data)
    assert [(c.batch, c.checkpointing) for c in order] == [
        (8, False), (6, False), (4, False), (3, False), (2, False), (1, False), (1, True),
    ]  # fmt: skip
    assert order[-1].rows == [1] and order[-2].rate is None
    given = TrainConfig(train_batch_size=24, per_device_train_batch_size=12, gradient_checkpointing="auto")
    assert [(c.batch, c.checkpointing) for c in without_gpu(given, 1, data)] == [(12, False), (12, True)]


def test_labels_are_counted_as_they_are(mixture):
    family = load_family("data/tiny-llava")
    records, _ = read_records(str(mixture / "train.json"), str(mixture))
    dataset = ConversationDataset(records, family, 200)
    assert dataset.supervised().tolist() == [int((row["labels"] != -100).sum()) for row in dataset]


# ------------------------------------------------------------------------------------------------------------ real runs


def weights(job):
    [file] = [*job.run.glob("adapter/*.safetensors"), *job.run.glob("model/*.safetensors")]
    return load_file(file)


def assert_same(job, other):
    """Bit for bit, dropout included."""
    assert job.status == 0 == other.status, job.output + other.output
    assert job.losses() == other.losses() and len(job.losses()) == RUN["max_steps"]
    ours, theirs = weights(job), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def chosen(job):
    return json.loads((job.run / "chosen.json").read_text())


@pytest.fixture
def go(train):
    """Trains with one thread. ``most``: the records that each process has memory for, as ``prefork.py`` takes them."""

    def run(name, most=None, env=None, **settings):
        env = {"OMP_NUM_THREADS": "1"} | ({"MOST_RECORDS": most} if most else {}) | (env or {})
        return train(name, env=env, **RUN | settings)

    return run


def test_memory_that_runs_out_and_the_next_setting(go):
    job = go("auto", "1/1", **AUTO)
    tried = [line for line in job.output.splitlines() if line.startswith("auto: ")]
    assert len(tried) == 3, job.output
    assert tried[0].startswith("auto: the memory is too small for 4 records at once, no gradient checkpointing")
    assert tried[0].endswith("next is 2 records at once, no gradient checkpointing")
    assert "too small for 2 records at once" in tried[1] and "next is 1 record at once" in tried[1]
    assert tried[2].startswith("auto: 1 record at once, no gradient checkpointing, as always without a GPU")
    assert chosen(job) == dict(zip(FIELDS, (1, False, 1.0), strict=True))
    assert_same(job, go("given", per_device_train_batch_size=1))
    written = as_chosen(TrainConfig(train_batch_size=4, **AUTO), job.run)
    assert written == TrainConfig(train_batch_size=4, per_device_train_batch_size=1)


def test_gradient_checkpointing_comes_last(go):
    job = go("auto", "0/1", **AUTO)
    assert chosen(job) == dict(zip(FIELDS, (1, True, 1.0), strict=True)), job.output
    assert_same(job, go("given", per_device_train_batch_size=1, gradient_checkpointing=True))


def test_nothing_fits(go):
    job = go("auto", "0/0", **AUTO)
    last = job.output.splitlines()[-1]
    assert job.status == 1 and last.startswith("fura-vlm train: The memory of this machine is too small for 1 records")
    assert "Traceback" not in job.output and not (job.run / "chosen.json").exists()


def test_a_resumed_run_keeps_what_it_found(go):
    """Also where memory is no longer short."""
    settings = AUTO | {"save_steps": 1}
    killed = go("auto", "2/2", until="checkpoint-1", **settings)
    assert killed.status == -9, killed.output
    job = go("auto", **settings)
    assert "auto: 2 records at once" in job.output and "too small" not in job.output
    assert_same(job, go("given", per_device_train_batch_size=2))


@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_agree_when_one_runs_out(stage, go):
    settings = {"deepspeed": f"zero{stage}", "processes": 2}
    job = go("auto", "2/2 1/1", **settings | AUTO)
    assert job.output.count("too small for 2 records at once") == 1 == job.output.count("auto: 1 record at once")
    assert_same(job, go("given", **settings | {"per_device_train_batch_size": 1}))


@pytest.mark.parametrize(("method", "stage"), [("fura", 3), ("full", 2)])
def test_no_trace_of_it_in_a_run(method, stage, go):
    settings = {"deepspeed": f"zero{stage}", "method": method, "learning_rate": 5e-4}
    job = go("auto", "2/2", **settings | AUTO)
    assert chosen(job)["per_device_train_batch_size"] == 2, job.output
    assert_same(job, go("given", **settings | {"per_device_train_batch_size": 2}))


def test_layers_are_not_compiled_again_after_the_trial(go):
    """When DeepSpeed has taken the model."""
    settings = {"compile_layers": True, "env": {"TORCH_LOGS": "recompiles"}}
    job, given = go("auto", **settings | AUTO), go("given", **settings | {"per_device_train_batch_size": 4})
    assert job.status == 0 == given.status, job.output
    assert job.output.count("Recompiling function") <= given.output.count("Recompiling function")


def test_the_end_says_where_the_time_went(go):
    job = go("run", per_device_train_batch_size=4, save_steps=1)
    [line] = [line for line in job.output.splitlines() if line.startswith("time ")]
    told = line.removeprefix("time").strip()
    assert f"Time: {told}." in (job.run / "report.md").read_text().splitlines()
    shares = {part: int(share) for share, part in (each.split(" % ") for each in told.partition(": ")[2].split(", "))}
    assert {"preparing", "forward", "backward"} <= set(shares) and all(shares.values())
    assert 100 - len(shares) <= sum(shares.values()) <= 100 + len(shares)


# -------------------------------------------------------------------------------------------------------- one rehearsal


def state_of(model):
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [
        (module.training, getattr(module, "gradient_checkpointing", None), len(module._forward_pre_hooks))
        for module in model.modules()
    ]
    return numbers, tensors, modules, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "method", "checkpointing"),
    [(name, "lora", checkpointing) for name in BUILDERS for checkpointing in (False, True)]
    + [("llava", method, True) for method in METHODS if method != "lora"],
)
def test_nothing_is_left_of_it(name, method, checkpointing, folder_of, one_thread):
    """In any family and of any method. And it is the forward and the backward of training: every weight that is trained
    gets its gradient."""
    family, model, batch = prepared(name, str(folder_of(name)), method)
    seen = set()
    hooks = [
        parameter.register_hook(lambda gradient, name=name: seen.add(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    before = state_of(model)
    assert rehearse(model, family, batch, 0, torch.float32, checkpointing) == 0
    after = state_of(model)
    assert before[0] == after[0] and before[2:] == after[2:]
    assert all(torch.equal(after[1][key], tensor) for key, tensor in before[1].items())
    assert len(seen) == len(hooks) > 0


def prepared(name, folder, method="lora"):
    """A family, a model of it as a run has it before its trial, and a batch."""
    family, config = load_family(folder), TrainConfig(model_name_or_path=folder, method=method, lora_r=4, block_size=8)
    model = load_base(folder, torch.float32, quantization_config=quantization(config, family, torch.float32))
    model = prepare(model, config, family)
    train_on_labels_only(model.get_base_model() if isinstance(model, PeftModel) else model, family)
    ids, labels = encode(family, conversations(name)[0 if name == "text" else 2])
    row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    pictures = {} if name == "text" else family.pixels([PICTURES[1]])
    return family, model, Collator(family)([row | family.token_type_ids(ids) | {"pictures": pictures}] * 2)


def test_other_errors_are_no_lack_of_memory(folder_of, one_thread):
    family, model, batch = prepared("text", str(folder_of("text")))
    for error, outcome in (
        ("CUDA error: an illegal memory access", None),
        ("DefaultCPUAllocator: not enough memory", 1),
    ):

        def fail(*_, error=error):
            raise RuntimeError(error)

        hook = family.parts(model).decoder.layers[-1].register_forward_pre_hook(fail)
        before = state_of(model)
        if outcome is None:
            with pytest.raises(RuntimeError, match="illegal"):
                rehearse(model, family, batch, 0, torch.float32, True)
        else:
            assert rehearse(model, family, batch, 0, torch.float32, True) is None
        after = state_of(model)
        assert before[0] == after[0] and before[2:] == after[2:]
        hook.remove()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_memory_of_a_gpu(folder_of):
    """With no more of it than 4 GB: what is held beside counts, and all of it is given back."""
    family, model, batch = prepared("llava", str(folder_of("llava")))
    share = torch.cuda.get_per_process_memory_fraction()
    try:
        keep_to(4)
        assert 2 * GIB < room() < 4 * GIB
        model.to("cuda", torch.bfloat16)
        peak = rehearse(model, family, batch, 1 * GIB, torch.bfloat16, False)
        assert GIB < peak < 2 * GIB
        before = torch.cuda.memory_allocated()
        assert rehearse(model, family, batch, 5 * GIB, torch.bfloat16, False) is None
        assert torch.cuda.memory_allocated() == before and torch.cuda.memory_reserved() < GIB
    finally:
        torch.cuda.set_per_process_memory_fraction(share)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_auto_needs(train):
    job = train("auto", **AUTO)
    assert job.output.splitlines()[-1] == (
        "fura-vlm train: per_device_train_batch_size is auto, and nothing says how many records a step has: set "
        "train_batch_size, or give per_device_train_batch_size a number"
    )
    job = train("odd", processes=2, train_batch_size=7, **AUTO)
    assert "train_batch_size 7 cannot be divided among 2 processes: change one of them" in job.output
    assert "Traceback" not in job.output
    job = train("capped", gpu_memory=24, max_steps=1)
    assert "gpu_memory is 24, and there is no GPU here: leave it out" in job.output.splitlines()[-1]


def test_models_that_cannot_be_planned():
    config = TrainConfig(method="lora", train_batch_size=8, **AUTO | {"activation_memory_budget": 1.0})
    mamba = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    names = "give numbers for per_device_train_batch_size, gradient_checkpointing$"
    with pytest.raises(TrainingError, match=f"A model of the type mamba cannot be planned .*, so nothing .*{names}"):
        counts_of(config, mamba)
    nothing = TrainConfig(method="lora", target_modules="nothing", **AUTO)
    with pytest.raises(TrainingError, match="^lora cannot be set up with these settings: Target modules nothing not"):
        counts_of(nothing, named_config("7b"))


def test_what_was_chosen_cannot_be_read(tmp_path):
    config = TrainConfig(train_batch_size=8, **AUTO)
    (tmp_path / "chosen.json").write_text('{"per_device_train_batch_size": 4')
    with pytest.raises(TrainingError, match="chosen.json, which says what auto was, cannot be read .*: remove it"):
        as_chosen(config, tmp_path)
    assert least_settings(config) == TrainConfig(train_batch_size=8, per_device_train_batch_size=1)
    assert as_chosen(TrainConfig(), tmp_path) == TrainConfig()
