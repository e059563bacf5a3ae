"""Shared by all tests: one thread, errors in views raised, the models everyone needs."""

import os

os.environ.setdefault("WORKBENCH_STRICT", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the notebooks' kernels: sums in one order, and two tests at a time

import numpy as np
import pytest
import torch
from nnsight import CONFIG
from tiny import CONFIGS, build, tokenizer
from tiny import trained as train

import workbench as wb
from workbench import measure

torch.set_num_threads(1)  # two threads on a busy machine are many times slower
CONFIG.APP.DEBUG = False  # nnsight turns it on when it sees pytest's -v


def pytest_report_header():
    return f"torch threads: {torch.get_num_threads()}"


@pytest.fixture(scope="session")
def course():
    """The bundled model."""
    return wb.load("course")


@pytest.fixture(scope="session")
def llama():
    """A tiny random Llama."""
    return wb.load(build("llama"), tokenizer=tokenizer())


@pytest.fixture(scope="session")
def trained():
    """A tiny Llama that answers w6 after a w4 at position 2, and w7 after a w5 (see tiny.copying)."""
    return wb.load(train(), tokenizer=tokenizer())


@pytest.fixture(scope="session")
def trained_mixture():
    """A tiny Mixtral that answers as `trained` does."""
    return wb.load(train("mixtral"), tokenizer=tokenizer())


@pytest.fixture(scope="session", params=CONFIGS)
def tiny(request):
    """Each of the seventeen architectures in turn."""
    return wb.load(build(request.param), tokenizer=tokenizer())


@pytest.fixture
def drawn(monkeypatch):
    """What a null's threshold is made of, and what it is: filled by the call that is watched."""
    seen, real = {}, measure.null_threshold

    def watched(effects, **more):
        seen.update(under=effects, limit=real(effects, **more), **more)
        return seen["limit"]

    monkeypatch.setattr(measure, "null_threshold", watched)
    return seen


@pytest.fixture(scope="session")
def words():
    """Seeded random prompts over the tiny vocabulary: words(5, 7) is a list of prompts of 5 and 7 words."""

    def make(*lengths, seed=0):
        rng = np.random.default_rng(seed)
        return [" ".join(f"w{i}" for i in rng.integers(4, 64, n)) for n in lengths]

    return make


@pytest.fixture(scope="session")
def word_pairs():
    """Pairs of 9 random words that differ at positions 3 and, in the second, 5."""
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        clean = rng.integers(4, 64, 9)
        corrupted = clean.copy()
        for place in (3, 5) if i == 1 else (3,):
            corrupted[place] = (clean[place] + 7 - 4) % 60 + 4
        sides = (" ".join(f"w{k}" for k in side) for side in (clean, corrupted))
        rows.append(dict(zip(("clean", "corrupted"), sides), answer="w10", foil="w20", template="t"))
    return wb.Task(rows, "words")
