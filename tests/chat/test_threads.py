"""The choice of the number of threads, on machines whose times are given."""

import random

import pytest
import torch

from fura_vlm.chat.threads import LONGEST_REST, ThreadTuner, thread_tuner


class Machine:
    """Steps take ``seconds(threads)``, within a tenth at random. The clock is what has passed."""

    def __init__(self, seconds):
        self.seconds, self.now, self.threads = seconds, 0.0, 0
        self.draw = random.Random(0)
        self.used: list[int] = []

    def run(self, tuner, steps, work=1):
        for _ in range(steps):
            with tuner.step(work):
                self.used.append(self.threads)
                self.now += work * self.seconds(self.threads) * self.draw.uniform(0.95, 1.05)

    def tuner(self, most):
        return ThreadTuner(most, clock=lambda: self.now, apply=lambda threads: setattr(self, "threads", threads))


def shared(threads):  # each thread waits for the others
    return 1.0 * threads


def alone(threads):
    return 8.0 / threads


def bandwidth(threads):  # more than four gain nothing
    return 8.0 / min(threads, 4) + 0.2 * threads


@pytest.mark.parametrize("seconds, best", [(shared, 1), (alone, 16), (bandwidth, 4)])
def test_the_fastest_number_stays(seconds, best):
    machine = Machine(seconds)
    tuner = machine.tuner(16)
    machine.run(tuner, 4000)
    assert tuner.threads == best
    assert sum(threads == best for threads in machine.used[-2000:]) > 1900  # trials are rare


@pytest.mark.parametrize("seconds, first", [(0.001, 1), (0.2, 8), (30.0, 8)])
def test_it_begins_with_one_thread_where_steps_are_short(seconds, first):
    """And does not try one thread twice where that takes long."""
    machine = Machine(lambda threads: seconds / threads)
    tuner, steps = machine.tuner(8), []

    def step():
        steps.append(machine.threads)
        machine.now += machine.seconds(machine.threads)

    tuner.begin(step)
    assert tuner.threads == first
    assert steps == [1] * (1 if seconds > 1 else 2)
    machine.run(tuner, 3000)
    assert tuner.threads == 8  # nobody else is on this machine


def test_it_follows_when_others_come_and_go():
    machine = Machine(alone)
    tuner = machine.tuner(8)
    machine.run(tuner, 3000)
    assert tuner.threads == 8
    machine.seconds = shared
    machine.run(tuner, LONGEST_REST + 200)
    assert tuner.threads == 1
    machine.seconds = alone
    machine.run(tuner, LONGEST_REST + 200)
    assert tuner.threads == 8


@pytest.mark.parametrize("seconds, best", [(shared, 1), (alone, 8)])
def test_different_work_is_not_compared(seconds, best):
    """Steps of two kinds in any order, one of which is a hundred times as long: no number is better by that."""
    machine = Machine(seconds)
    tuner = machine.tuner(8)
    for _ in range(4000):
        machine.run(tuner, 1, work=machine.draw.choice([1, 100]))
    assert tuner.threads == best


def test_what_the_user_set_stays(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tuner = thread_tuner(torch.device("cpu"))
    assert not tuner.tunes
    for _ in range(100):
        with tuner.step("one"):
            assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert thread_tuner(torch.device("cpu")).threads == before
    assert not thread_tuner(torch.device("cuda")).tunes
