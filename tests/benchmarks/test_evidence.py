"""The study of docs/evidence.md: one run, the queue, and what is counted, on models of a few thousand weights."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from evidence import changes, tables, texts
from evidence.configuration import EvidenceError, Study, Training, Variant, read_study
from evidence.data import Data, Rows, encode, encode_choices, load, save
from evidence.methods import build, linear_names, train_config
from evidence.runs import BASE, append_row, chosen_rate, missing, read_rows, wanted, work
from evidence.scoring import Scorer
from evidence.training import autocast, planned_steps, train
from scipy import stats
from transformers import TrainingArguments, set_seed

from fura_vlm.data.collator import Collator
from fura_vlm.evaluation.generation import Answerer
from fura_vlm.evaluation.likelihood import likelihoods
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training.methods import method_of
from fura_vlm.training.trainer import FuraTrainer

STUDIES = Path(__file__).parents[2] / "benchmarks" / "evidence"

pytestmark = pytest.mark.usefixtures("one_thread")

FURA = Variant("fura", "fura", (1e-2, 3e-2))
LORA = Variant("lora", "lora", (1e-2,), adapter={"r": 4, "lora_alpha": 8})
DORA = Variant("dora", "dora", (1e-2,), adapter={"r": 4, "lora_alpha": 8})
FULL = Variant("full", "full", (1e-3,))
LINEAR = Variant("linear", "full", (1e-3,), trains="linear")


def record(number: int) -> dict:
    """A question of LLM-Adapters' form with two, three or four choices."""
    names = [f"answer{each}" for each in range(1, 3 + number % 3)]
    choices = " ".join(f"Answer{each}: {'red cat dog'.split()[(number + each) % 3]}" for each in range(len(names)))
    text = f"Please choose: is this a cat or a dog {number}?\n\n{choices}\n\nAnswer format: {'/'.join(names)}"
    answer = names[number * 7 % len(names)]
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.fixture(scope="module")
def study(folder_of, tmp_path_factory) -> Study:
    """A whole study of a small language model, its data prepared."""
    folder = tmp_path_factory.mktemp("evidence")
    for name, numbers in (
        ("ARC-Easy-train", range(24)),
        ("ARC-Easy-test", range(30, 42)),
        ("openbookqa-test", range(50, 57)),
    ):
        (folder / f"{name}.json").write_text(json.dumps([record(number) for number in numbers]))
    (folder / "english.txt").write_text("This is a dog. And what is that? A red cat. " * 40)
    found = Study(
        name="small", kind="text", model=str(folder_of("text")), output=str(folder / "runs"), conversation="alpaca",
        methods=(FURA, LORA, LINEAR), groups={"trained": ["ARC-Easy"], "held out": ["openbookqa"]}, headline="trained",
        training=Training(batch=4, epochs=1, warmup=0.2, precision="float32"), seeds=(11, 12),
        compare={"fura": ["lora", "linear"]}, spectrum=(1,),
    )  # fmt: skip
    settings = texts.TextData(
        str(folder), str(folder / "english.txt"), ["ARC-Easy"], ["openbookqa"], validation=0.25, plain_tokens=300
    )
    save(texts.prepare(found, family_of(found), settings), found.folder / "data.pt")
    return found


def family_of(study):
    return load_family(study.model, conversation=study.conversation)


def scorer_of(study, model=None):
    model = load_base(study.model, torch.float32).eval() if model is None else model
    return Scorer(model, family_of(study), autocast(study, "cpu"))


# ---------------------------------------------------------------------------------------------------------- scoring


def test_choices_are_judged_as_the_suite_judges_them(study):
    """All answers of a question in one row give the numbers that each gives alone; they begin alike, or not, and are of
    different lengths."""
    family, data = family_of(study), load(study.folder / "data.pt")
    questions = [
        ("Is this a cat?", ["the correct answer is true", "the correct answer is false"], 0, -1),
        ("What is this?", ["the correct answer is answer1", "the correct answer is answer12", "a dog"], 1, -1),
        ("And that?", ["red", "red cat", "red cat dog", "A cat. A dog."], 3, -1),
    ]
    answerer = Answerer(load_base(study.model, torch.float32).eval(), family, torch.float32, 4, num_workers=0)
    asked = [(question, question, answers) for question, answers, _, _ in questions]
    expected = {}
    for batch in likelihoods(answerer, asked, progress=False):
        expected |= batch
    choices = encode_choices(family, questions)
    found = scorer_of(study).likelihoods(choices, data)
    for number, values in enumerate(found):
        assert values == pytest.approx(expected[number], abs=1e-5)
    assert min(len({round(value, 3) for value in values}) for values in found) > 1
    right = [values.index(max(values)) == right for values, (_, _, right, _) in zip(found, questions, strict=True)]
    assert scorer_of(study).score(choices, data) == right


@pytest.mark.parametrize("name", ["text", "llava"])
def test_an_answer_is_right_if_the_model_writes_it(folder_of, name):
    """Greedily, word for word, with and without a picture; and wrong if any token is another."""
    family = load_family(str(folder_of(name)))
    model = load_base(str(folder_of(name)), torch.float32).eval()
    with_picture = name == "llava"
    pictures = torch.randint(0, 255, (2, 3, 112, 112), dtype=torch.uint8) if with_picture else None
    data = Data(Rows(), {}, {}, torch.zeros(0), pictures, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    rows = Rows()
    for number in range(4):
        shown = number % 2 if with_picture and number < 3 else -1
        asked = encode(family, [(f"What is this{' ?' * number}", "a", shown)], 512)
        prompt = asked.ids[0][asked.labels[0] == -100]
        given = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
        given |= {"pixel_values": data.pixels([shown], "cpu")} if shown >= 0 else {}
        made = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0]
        said = made[len(prompt) :] if made.shape[0] > 3 else made
        for changed in (None, 0, 2):
            answer = said.clone()
            if changed is not None:
                answer[changed] = (answer[changed] + 1) % 300
            rows.ids.append(torch.cat([prompt, answer]))
            rows.labels.append(torch.cat([torch.full_like(prompt, -100), answer]))
            rows.pictures.append(shown)
    found = Scorer(model, family, autocast(_any_study(folder_of(name)), "cpu")).exact(rows, data)
    assert found == [True, False, False] * 4


def _any_study(model) -> Study:
    return Study("x", "text", str(model), "unused", (FURA,), {"a": ["a"]}, "a", training=Training(precision="float32"))


def test_perplexity_is_that_of_the_models_own_loss(study):
    plain = load(study.folder / "data.pt").plain[:200]
    model = load_base(study.model, torch.float32).eval()
    expected = math.exp(model(input_ids=plain[None], labels=plain[None]).loss.item())
    assert scorer_of(study, model).perplexity(plain) == pytest.approx(expected, rel=1e-5)


def test_data_are_what_was_saved(study, tmp_path):
    data = load(study.folder / "data.pt")
    assert len(data.train) == 18 and len(data.validation["ARC-Easy"]) == 6 and len(data.tests["openbookqa"]) == 7
    assert [len(answers) for answers in data.tests["ARC-Easy"].answers[:3]] == [2, 3, 4]
    again = save(data, tmp_path / "data.pt")
    assert again == data.fingerprint
    data.tests["ARC-Easy"].right[0] += 1
    assert save(data, tmp_path / "data.pt") != again


# ---------------------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize(
    "variant",
    [FURA, LORA, FULL, replace(FURA, singular_values=5.0), replace(FURA, decay=3.0)],
    ids=["fura", "lora", "full", "rates", "decay"],
)
def test_losses_are_those_of_the_projects_trainer(study, variant, tmp_path):
    """Records, order, loss, clipping, schedule, rates of parts and decay are all the same."""
    study = replace(study, training=replace(study.training, epochs=2))
    data, family = load(study.folder / "data.pt"), family_of(study)
    losses = []
    for ours in (True, False):
        set_seed(5)
        model = build(load_base(study.model, torch.float32), study, variant, family)
        if ours:
            losses.append(train(model, data, family, study, variant, 1e-2, seed=7).losses)
            continue
        rows = _RowsOfTrainer(data.train)
        steps = planned_steps(study, len(rows))
        arguments = TrainingArguments(
            tmp_path, num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=7,
            lr_scheduler_type="cosine", warmup_steps=math.ceil(0.2 * steps), adam_beta1=0.9, adam_beta2=0.95,
            max_grad_norm=1.0, weight_decay=variant.decay, logging_steps=1, use_cpu=True, report_to=[],
            disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
        )  # fmt: skip
        of_values = 1e-2 * variant.singular_values if variant.method == "fura" else None
        collate = Collator(family, pad_to_multiple_of=8)
        trainer = FuraTrainer(model, arguments, collate, rows, family=family, singular_values_lr=of_values)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    ours, theirs = losses
    assert len(ours) == len(theirs) == 10
    assert ours == pytest.approx(theirs, abs=2e-4)  # the Trainer rounds what it logs
    assert ours[-1] < ours[0] - 0.05


class _RowsOfTrainer(list):
    def __init__(self, rows: Rows):
        super().__init__({"input_ids": ids, "labels": labels, "pictures": {}}
                         for ids, labels in zip(rows.ids, rows.labels, strict=True))  # fmt: skip
        self.lengths, self.has_image = rows.lengths, [False] * len(rows)


def test_a_model_with_pictures_is_trained_as_the_trainer_does(folder_of, tmp_path):
    """The pictures come from the study's own store of bytes."""
    study = replace(_any_study(folder_of("llava")), training=Training(batch=2, epochs=1, precision="float32"))
    family = load_family(study.model)
    pictures = torch.randint(0, 255, (3, 3, 112, 112), dtype=torch.uint8)
    settings = family.processor.image_processor
    data = Data(
        encode(family, [*(("What is this?", "A cat", n % 3) for n in range(4)), *[("Who?", "A dog", -1)] * 2], 300),
        {}, {}, torch.zeros(0), pictures, tuple(settings.image_mean), tuple(settings.image_std),
    )  # fmt: skip
    losses = []
    for ours in (True, False):
        set_seed(5)
        model = build(load_base(study.model, torch.float32), study, FURA, family)
        if ours:
            losses.append(train(model, data, family, study, FURA, 1e-2, seed=3).losses)
            continue
        rows = _RowsOfTrainer(data.train)
        rows.has_image = [picture >= 0 for picture in data.train.pictures]
        for row, picture in zip(rows, data.train.pictures, strict=True):
            row["pictures"] = {"pixel_values": data.pixels([picture], "cpu")} if picture >= 0 else {}
        arguments = TrainingArguments(
            tmp_path, num_train_epochs=1, per_device_train_batch_size=2, learning_rate=1e-2, seed=3, warmup_steps=1,
            lr_scheduler_type="cosine", adam_beta2=0.95, logging_steps=1, use_cpu=True, report_to=[],
            disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
        )  # fmt: skip
        trainer = FuraTrainer(model, arguments, Collator(family, pad_to_multiple_of=8), rows, family=family)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_full_fine_tuning_of_what_adapters_adapt(study):
    """``linear`` trains the weights that FuRA's adapters are on, and nothing else."""
    family, base = family_of(study), load_base(study.model, torch.float32)
    linear = build(base, study, LINEAR, family)
    trained = {name.removesuffix(".weight") for name, p in linear.named_parameters() if p.requires_grad}
    adapted = {
        name.removeprefix("base_model.model.").partition(".fura_")[0]
        for name, p in build(base, study, FURA, family).named_parameters()
        if p.requires_grad
    }
    assert trained == adapted == set(linear_names(base, study, family)) and len(trained) == 14
    everything = build(base, study, FULL, family)
    assert all(p.requires_grad for p in everything.parameters())


# ---------------------------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize("variant", [FURA, LORA, DORA, LINEAR], ids=["fura", "lora", "dora", "linear"])
def test_the_change_of_a_weight_is_what_merging_adds(study, variant):
    family, base = family_of(study), load_base(study.model, torch.float32)
    model = build(base, study, variant, family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    names = linear_names(base, study, family)
    found = {name: delta for name, _, delta in changes.weights(model.eval(), base, names)}
    sizes = changes.sizes(model, base, names)
    merged = model.merge_and_unload() if variant.method != "full" else model
    expected = {name: merged.get_submodule(name).weight - base.get_submodule(name).weight for name in names}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    expected = {name: delta.detach() for name, delta in expected.items()}
    changed = sum(float(delta.square().sum()) for delta in expected.values())
    total = sum(float(base.get_submodule(name).weight.square().sum()) for name in names)
    assert sizes["frobenius"] == pytest.approx((changed / total) ** 0.5, rel=1e-4) and changed > 0
    ratios = [torch.linalg.matrix_norm(expected[name], 2) / torch.linalg.matrix_norm(base.get_submodule(name).weight, 2)
              for name in names]  # fmt: skip
    assert sizes["spectral"] == pytest.approx(float(torch.stack(ratios).mean()), rel=0.1)


def test_a_change_along_known_directions():
    """Of ``W = U diag(s) V^T``: two pairs of directions with shares 0.8 and 0.2, and one beside the columns."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(60, 41)).Q, torch.linalg.qr(torch.randn(40, 40)).Q
    before = U[:, :40] @ torch.diag(torch.linspace(8, 1, 40)) @ V.T
    delta = 2 * torch.outer(U[:, 1], V[:, 2]) + torch.outer(U[:, 39], V[:, 39])
    found = changes.spectrum(changes.Directions.of(before), delta)
    assert found["left"][0] == pytest.approx(0.8, abs=1e-4) and found["left"][-1] == pytest.approx(0.2, abs=1e-4)
    assert found["right"][1] == pytest.approx(0.8, abs=1e-4) and sum(found["right"]) == pytest.approx(1, abs=1e-4)
    assert found["top"] == pytest.approx(0.8, abs=1e-4) and found["outside"] == pytest.approx(0, abs=1e-4)
    assert found["rank"] == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), rel=1e-4)
    assert found["stable"] == pytest.approx(1 / 0.8, rel=1e-4)
    assert found["values"][0] == pytest.approx((8 + 8 - 7 / 39) / 2 / 8, rel=1e-3)
    squares = torch.linspace(8, 1, 40).square()
    assert found["squares"][0] == pytest.approx(float(squares[:2].sum() / squares.sum()), abs=1e-4)
    beside = changes.spectrum(changes.Directions.of(before), torch.outer(U[:, 40], V[:, 0]))
    assert beside["outside"] == pytest.approx(1, abs=1e-4) and beside["top"] == pytest.approx(0, abs=1e-4)


def test_a_product_from_the_right_writes_along_the_spectrum():
    """``W D`` with a random block-diagonal ``D`` has along each left vector the share that the square of its singular
    value has of all, and is spread evenly over the right ones (docs/evidence.md)."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(64, 64)).Q, torch.linalg.qr(torch.randn(64, 64)).Q
    before = U @ torch.diag(torch.logspace(1, -1, 64)) @ V.T
    base = changes.Directions.of(before)
    found = [changes.spectrum(base, before @ torch.block_diag(*torch.randn(8, 8, 8))) for _ in range(200)]
    left, right = (torch.tensor([each[side] for each in found]).mean(0) for side in ("left", "right"))
    torch.testing.assert_close(left, torch.tensor(found[0]["squares"]), rtol=0.15, atol=2e-4)
    assert right.max() / right.min() < 2 < left.max() / left.min() / 1000


# ---------------------------------------------------------------------------------------------------------- the queue

OF_THE_CLOCK = ("seconds", "train_seconds", "date")


def rows_of(study: Study) -> dict[tuple, dict]:
    rows = read_rows(study.folder / "rows.jsonl")
    found = {(row["variant"], row["rate"], row["seed"]): row for row in rows}
    assert len(found) == len(rows)
    return {key: {name: value for name, value in row.items() if name not in OF_THE_CLOCK} for key, row in found.items()}


def elsewhere(study: Study, folder) -> Study:
    """The same study with a folder of its own."""
    moved = replace(study, output=str(folder))
    moved.folder.mkdir()
    os.link(study.folder / "data.pt", moved.folder / "data.pt")
    return moved


@pytest.fixture(scope="module")
def finished(study) -> Study:
    work(study, "cpu", 0, None, lambda line: None)
    return study


def chosen(study: Study) -> float:
    """FuRA's rate."""
    rows = read_rows(study.folder / "rows.jsonl")
    return tables.results(study, rows, tables.fingerprint(study)).rates["fura"]


def test_every_run_is_made_once(finished):
    """The base, the search of a method with several rates, and two seeds of each method at its rate."""
    rows = rows_of(finished)
    best = tables.results(finished, list(rows.values()), tables.fingerprint(finished)).rates
    expected = {(BASE, None, None), ("fura", 1e-2, 1), ("fura", 3e-2, 1)}
    expected |= {(name, rate, seed) for name, rate in best.items() for seed in (11, 12)}
    assert set(rows) == expected and None not in best.values()
    assert {row["steps"] for key, row in rows.items() if key[0] != BASE} == {5}
    [first, second] = (rows["fura", best["fura"], seed] for seed in (11, 12))
    assert first["loss"] != second["loss"] and "spectra" in first and "spectra" not in second
    assert {name.split(".")[2] for name in first["spectra"]} == {"1"}
    right = int(first["right"]["ARC-Easy"], 16)
    assert first["tests"]["ARC-Easy"] == pytest.approx(100 * right.bit_count() / 12)
    assert work(finished, "cpu", 0, None, lambda line: None) == 0


def test_an_interrupted_queue_goes_on_to_the_same_rows(finished, tmp_path):
    """SIGTERM in the midst of the search, a row cut off by a full disk, and a deadline that has passed."""
    study, said = elsewhere(finished, tmp_path / "runs"), []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert work(study, "cpu", 0, None, say) == 3
    with open(study.folder / "rows.jsonl", "a") as file:
        file.write('{"variant": "lora", "ra')
    assert work(study, "cpu", 0, 0.0, lambda line: None) == 0
    before = rows_of(study)
    assert len(before) == 3
    assert work(study, "cpu", 0, None, lambda line: None) == len(rows_of(finished)) - 3
    assert rows_of(study) == rows_of(finished)


def test_several_processes_make_the_same_rows(finished, tmp_path):
    study = elsewhere(replace(finished, methods=(LORA,), compare={}), tmp_path / "runs")
    assert work(study, "cpu", 2, None, lambda line: None) == 3
    mine, theirs = rows_of(study), rows_of(finished)
    assert set(mine) == {key for key in theirs if key[0] in ("lora", BASE)}
    for key, row in mine.items():
        assert row["tests"] == theirs[key]["tests"] and row["loss"] == pytest.approx(theirs[key]["loss"], abs=1e-5)


def test_a_base_in_4_bits_is_fresh_for_each_run(finished, tmp_path):
    """So that a run is the same whatever ran before it; the change of weights that are not there is not measured."""
    pytest.importorskip("bitsandbytes")
    found = []
    for place, seeds in (("both", (11, 12)), ("second", (12,))):
        methods = (Variant("qfura", "qfura", (1e-2,)),)
        study = elsewhere(replace(finished, methods=methods, compare={}, seeds=seeds), tmp_path / place)
        assert work(study, "cpu", 0, None, lambda line: None) == 1 + len(seeds)
        found.append(rows_of(study)["qfura", 1e-2, 12])
    both, second = found
    assert both == second and "change" not in both
    assert both["trained"] == rows_of(finished)["fura", chosen(finished), 12]["trained"]


def test_a_run_that_fails_is_named_and_the_others_are_made(finished, tmp_path):
    broken = replace(finished.methods[0], name="broken", adapter={"num_blocks": 7})
    study = elsewhere(replace(finished, methods=(broken, LORA)), tmp_path / "runs")
    with pytest.raises(EvidenceError, match="2 runs failed, the first with FuraError.*num_blocks=7"):
        work(study, "cpu", 0, None, lambda line: None)
    assert {key[0] for key in rows_of(study)} == {BASE, "lora"}


def row(variant, rate, seed, validation=50.0, tests=50.0, perplexity=10.0, settings="s", **more) -> dict:
    """A row that nobody has made."""
    reached = {"validation": {"a": validation}, "tests": {"ARC-Easy": tests, "openbookqa": tests / 2}}
    made = {"seconds": 9.0, "machine": "none", "torch": "0", "date": "2026-01-01", "steps": 5, "trained": 10**6}
    key = {"variant": variant, "rate": rate, "seed": seed, "settings": settings}
    return key | reached | made | {"loss": 1.0, "perplexity": perplexity} | more


def test_the_rate_is_chosen_by_validation_alone(study):
    """Whatever the tests say, and whatever other seeds and settings reached; of equals the smallest."""
    variant = Variant("m", "lora", (1e-4, 1e-3, 1e-2))
    rows = [row("m", 1e-4, 1, 60.0, 10.0), row("m", 1e-3, 1, 70.0, 0.0), row("m", 1e-2, 1, 50.0, 99.0)]
    others = [row("m", 1e-2, 11, 99.0), row("m", 1e-2, 1, 99.0, settings="old"), row("n", 1e-2, 1, 99.0)]
    assert chosen_rate(study, variant, rows + others, "s") == 1e-3
    assert chosen_rate(study, variant, rows[:2] + others, "s") is None
    assert chosen_rate(study, variant, [row("m", rate, 1) for rate in variant.rates], "s") == 1e-4
    diverged = [*rows[:1], row("m", 1e-3, 1, 99.0, loss=None), rows[2]]
    assert chosen_rate(study, variant, diverged, "s") == 1e-4


def test_runs_that_say_most_come_first(study):
    """The middle of each range before its ends, tier by tier, and seeds as soon as a method's search is done."""
    one, two = Variant("one", "lora", (1.0, 2.0, 3.0)), Variant("two", "lora", (4.0,), tier=2)
    study = replace(study, methods=(two, one))
    runs = [(run.variant, run.rate, run.seed) for run in wanted(study, [], "d")]
    last = [("two", 4.0, 11), ("two", 4.0, 12)]  # of one rate there is no search
    assert runs == [(BASE, None, None), ("one", 2.0, 1), ("one", 1.0, 1), ("one", 3.0, 1), *last]
    settings = study.settings(one, "d")
    rows = [row("one", rate, 1, 60 + rate, settings=settings) for rate in one.rates]
    left = [(run.variant, run.rate, run.seed) for run in missing(study, rows, "d")]
    assert left == [(BASE, None, None), ("one", 3.0, 11), ("one", 3.0, 12), *last]


def test_a_row_is_written_whole_behind_whole_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    for number in range(2):
        append_row(file, row("m", 1e-3, number))
    file.write_bytes(file.read_bytes() + b'{"variant": "m"')
    assert [found["seed"] for found in read_rows(file)] == [0, 1]
    append_row(file, row("m", 1e-3, 2))
    assert [found["seed"] for found in read_rows(file)] == [0, 1, 2]
    file.write_bytes(b"no row\n" + file.read_bytes())
    with pytest.raises(EvidenceError, match="line 1: it is no row"):
        read_rows(file)


# ---------------------------------------------------------------------------------------------------------- tables


def test_intervals_and_differences_are_scipys(study):
    """Of made-up rows: means and intervals over seeds, and differences seed by seed."""
    study = replace(study, methods=(FURA, LORA), seeds=(11, 12, 13, 14, 15), compare={"fura": ["lora"]})
    settings = {variant.name: study.settings(variant, "d") for variant in study.methods}
    one, two = [61.0, 63.5, 60.2, 64.0, 62.2], [60.5, 61.0, 60.0, 62.1, 61.0]
    fine, coarse = [11.0, 12.5, 11.7, 12.0, 13.1], [10.0, 10.4, 10.2, 10.1, 10.9]
    mine, theirs = settings["fura"], settings["lora"]
    rows = [row("fura", rate, 1, 50 + rate, settings=mine) for rate in FURA.rates]
    rows += [
        row("lora", 1e-2, 1, settings=theirs),
        row(BASE, None, None, tests=30.0, settings=study.settings(None, "d")),
    ]
    for n in range(5):
        rows.append(row("fura", 3e-2, 11 + n, tests=one[n], perplexity=fine[n], settings=mine))
        rows.append(row("lora", 1e-2, 15 - n, tests=two[4 - n], perplexity=coarse[4 - n], settings=theirs))
    rows.append(row("fura", 1e-2, 11, tests=99.0, settings=mine))  # not the chosen rate
    rows.append(row("fura", 3e-2, 12, tests=99.0, settings="old"))
    found = tables.results(study, rows, "d")

    [base, fura, lora] = tables.result_table(found).rows
    low, high = stats.t.interval(0.95, 4, mean(one), stats.sem(one))
    assert fura[4] == f"{mean(one):.1f} ± {(high - low) / 2:.1f}" and fura[:4] == ["fura", "1.0 M", "0.03", "5"]
    assert fura[5] == f"{mean(one) / 2:.1f} ± {(high - low) / 4:.1f}" and base[4] == "30.0"
    logs = [math.log(value) for value in fine]
    low, high = stats.t.interval(0.95, 4, mean(logs), stats.sem(logs))
    assert fura[6] == f"{math.exp(mean(logs)):.1f} ({math.exp(low):.1f} to {math.exp(high):.1f})"

    [difference] = tables.difference_table(found).rows
    interval = stats.ttest_rel(one, two).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert interval.low > 0
    assert difference[:3] == ["fura - lora", "5", f"**{mean(one) - mean(two):+.1f} ± {half:.1f}**"]
    interval = stats.ttest_rel(
        [100 * x for x in logs], [100 * math.log(value) for value in coarse]
    ).confidence_interval()
    center, half = (interval.high + interval.low) / 2, (interval.high - interval.low) / 2
    assert difference[4] == f"**{center:+.1f} ± {half:.1f}**"
    [first] = tables.search_table(found).rows
    assert first == ["fura", "0.01: 50.0 / **0.03: 50.0**", "at the end of the range"]


def test_tables_and_pictures_are_written_of_real_rows(finished):
    text = tables.write(finished)
    assert text == (finished.folder / "small.md").read_text()
    for words in ("## Learning rates", "## Results", "## Paired differences", "fura - linear", "effective rank"):
        assert words in text
    for name in ("small-accuracy.png", "small-spectrum.png"):
        assert (finished.folder / name).read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metods": {}}, "no setting 'metods'"),
        ({"headline": "none"}, "headline 'none' is none of the groups"),
        ({"search_seeds": [11]}, "a seed is in search_seeds and in seeds"),
        ({"methods": {"m": {"method": "lora", "rates": ["1e-3", "1e-4"]}}}, "rates of m are not in ascending order"),
        ({"methods": {"m": {"method": "lora", "rates": ["fast"]}}}, "'fast' among the rates of m is no number"),
        ({"methods": {"m": {"method": "adalora", "rates": [1]}}}, "m has the method adalora"),
        ({"compare": {"m": ["n"]}}, "compare names n"),
    ],
)
def test_a_wrong_study_gets_a_sentence(change, said, tmp_path):
    whole = {"kind": "text", "model": "m", "groups": {"all": ["boolq"]}, "headline": "all",
             "methods": {"m": {"method": "lora", "rates": ["1e-4", "1e-3"]}}} | change  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(whole))
    with pytest.raises(EvidenceError, match=said):
        read_study(tmp_path / "study.yaml")


def test_other_settings_are_other_rows(study):
    """What changes a result changes the mark of its rows; a name and other rates do not."""
    mark = study.settings(FURA, "d")
    assert study.settings(replace(FURA, name="x", rates=(1.0,), tier=3), "d") == mark
    assert study.settings(replace(FURA, adapter={"spectral_power": 1.0}), "d") != mark
    assert replace(study, training=replace(study.training, batch=5)).settings(FURA, "d") != mark
    assert study.settings(FURA, "e") != mark


@pytest.mark.parametrize("name", ["text", "text-paper-protocol", "pictures", "better", "better-pictures"])
def test_the_studies_are_read(name):
    """With six rates or more to choose from and five seeds; those that share a folder have the same data and base."""
    study = read_study(STUDIES / f"{name}.yaml")
    alone = name == "text-paper-protocol"
    assert all(len(variant.rates) >= 6 or alone for variant in study.methods) and len(study.seeds) == 5
    parent = read_study(STUDIES / ("pictures.yaml" if study.kind == "pictures" else "text.yaml"))
    shared = ("data", "model", "conversation", "output") + (() if alone else ("training", "seeds", "search_seeds"))
    assert all(getattr(study, field) == getattr(parent, field) for field in shared)
    both = {variant.name for variant in study.methods} & {variant.name for variant in parent.methods}
    assert "fura" in both
    for same in both:  # then a run of the one is a row of the other
        marks = study.settings(study.variant(same), "d"), parent.settings(parent.variant(same), "d")
        assert (marks[0] == marks[1]) is not alone
    for variant in study.methods:
        config = train_config(study, variant)
        if method_of(config).adapter is not None:
            config = method_of(config).adapter(config, {"target_modules": ["q_proj"]})
            type(config)(**{"target_modules": ["q_proj"]} | variant.adapter)
