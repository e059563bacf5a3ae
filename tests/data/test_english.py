"""The task files for pretrained English models: well formed, true, split as promised, and fit for byte-level BPE."""

import importlib.util
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tiny import CONFIGS
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import workbench as wb

SCRIPT = Path(__file__).parents[2] / "data" / "make_english.py"
spec = importlib.util.spec_from_file_location("make_english", SCRIPT)
english = importlib.util.module_from_spec(spec)
spec.loader.exec_module(english)

NAMES = sorted(english.TASKS)


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return wb.Task.load(request.param)


@pytest.fixture(scope="module")
def bpe():
    """A random GPT-2 whose byte-level BPE has every word of these tasks as one token, and no beginning-of-text."""
    rows = [row for name in NAMES for row in wb.Task.load(name)]
    texts = [row["clean"] + row["answer"] for row in rows] + [row["corrupted"] + row["foil"] for row in rows]
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator(texts, vocab_size=10_000, min_frequency=1, show_progress=False)
    tokenizer = GPT2TokenizerFast(tokenizer_object=raw._tokenizer)
    return wb.load(GPT2LMHeadModel(GPT2Config(**CONFIGS["gpt2"] | {"vocab_size": len(tokenizer)})), tokenizer=tokenizer)


def test_the_files_are_what_the_script_writes(task):
    rows = english.TASKS[task.name](random.Random(f"0 {task.name}"))
    path = SCRIPT.parent / "tasks" / f"{task.name}.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert path.name.startswith("english_") and "arXiv" in english.SOURCES[task.name]


def test_rows_are_well_formed(task):
    seen = set()
    for row in task:
        clean, corrupted = row["clean"].split(), row["corrupted"].split()
        assert len(clean) == len(corrupted) and clean != corrupted, row
        assert re.fullmatch(r" \w+", row["answer"]) and re.fullmatch(r" \w+", row["foil"]), row
        assert row["answer"] != row["foil"], row
        for name, (start, end) in row["spans"].items():
            span = row["clean"][start:end]
            assert span and span == span.strip() and (name == "end" or row["clean"][start - 1] == " "), row
            assert (end == len(row["clean"])) == (name == "end"), row
        assert (row["clean"], row["corrupted"]) not in seen, row
        seen.add((row["clean"], row["corrupted"]))


def test_splits_share_what_they_should(task):
    def found(column, split):
        return {row[column] for row in task.split(split)}

    fit, select, test = (found("entity", split) for split in ("fit", "select", "test"))
    assert not fit & select and not fit & test and not select & test
    assert not found("entity", "ood") & (fit | select)
    trained, new = found("template", "fit"), found("template", "ood")
    assert found("template", "test") == trained and not trained & new and len(trained) >= 5 and len(new) >= 3
    templates = sorted(trained | new)
    assert not any(b.startswith(a) for a in templates for b in templates if a != b)
    assert all(60 <= len(task.split(split)) <= 120 for split in wb.task.SPLITS)


def test_every_row_fits_a_byte_level_tokenizer_and_runs(task, bpe):
    pairs = task.on(bpe)
    assert pairs.dropped.empty
    for row, positions, ids in zip(pairs.task, pairs.spans, pairs.clean, strict=True):
        assert positions["end"][-1] == len(ids) - 1
        for name, (start, end) in row["spans"].items():
            assert bpe.tokenizer.decode(ids[positions[name]]).strip() == row["clean"][start:end]
    score = task[:8].score(bpe)
    assert score.shape == (8,) and np.isfinite(score).all()


def test_capitals_are_true():
    for row in wb.Task.load("english_capitals"):
        countries = [re.search(rf"\b({'|'.join(english.CAPITALS)})\b", row[side])[0] for side in ("clean", "corrupted")]
        assert [f" {english.CAPITALS[c]}" for c in countries] == [row["answer"], row["foil"]]
    assert len(set(english.CAPITALS.values())) == len(english.CAPITALS) > 40


def test_numbers_are_greater_where_they_should_be():
    def value(word):
        return english.NUMBERS.index(word) + 2 if word in english.NUMBERS else int(word)

    task = wb.Task.load("english_greater_than")
    for row in task:
        x, y = map(value, row["entity"].split("/"))
        answer, foil = value(row["answer"].strip()), value(row["foil"].strip())
        assert y < foil < x < answer < 100, row
    share = np.mean([row["answer"].strip() in english.NUMBERS for row in task])
    assert 0.35 < share < 0.65  # for tokenizers that cut digits off the space


def test_the_answer_of_ioi_is_named_once():
    for row in wb.Task.load("english_ioi"):
        for prompt, once, twice in (("clean", "answer", "foil"), ("corrupted", "foil", "answer")):
            named = re.findall(r"\w+", row[prompt])
            assert named.count(row[once].strip()) == 1 and named.count(row[twice].strip()) == 2, row
    orders = {
        row["clean"].index(row["answer"]) < row["clean"].index(row["foil"]) for row in wb.Task.load("english_ioi")
    }
    assert orders == {True, False}


@pytest.mark.parametrize("name", ["english_pronouns", "english_sentiment", "english_refusal"])
def test_both_answers_are_about_equally_common(name):
    for split in wb.task.SPLITS:
        answers = wb.Task.load(name).split(split).column("answer")
        first = min(answers)
        if name != "english_sentiment":
            assert 0.3 < np.mean([a == first for a in answers]) < 0.7
        else:
            assert 0.3 < np.mean([a in (" good", " love", " happy") for a in answers]) < 0.7


@pytest.mark.parametrize("name", [name for name in NAMES if name != "english_sentiment"])
def test_one_word_decides(name):
    for row in wb.Task.load(name):
        differ = [words for words in zip(row["clean"].split(), row["corrupted"].split()) if words[0] != words[1]]
        assert len(differ) == 1, row


def test_neither_words_nor_verbs_alone_decide():
    """Sentiment has pairs of the same words in another order; the refusals have verbs that harm only some objects."""
    rows = wb.Task.load("english_sentiment")
    same = [sorted(re.findall(r"\w+", row["clean"])) == sorted(re.findall(r"\w+", row["corrupted"])) for row in rows]
    assert 0.2 < np.mean(same) < 0.5
    assert {row["entity"].endswith("...") for row in wb.Task.load("english_refusal")} == {True, False}
