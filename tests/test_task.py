"""Tasks: three kinds of rows, splits, fitting to a model with reasons."""

import sys

import pandas as pd
import pytest
import torch
from tiny import copying

import workbench as wb
from workbench.task import DATA

PAIR = {"clean": "w5 w6 w7", "corrupted": "w5 w8 w7", "answer": "w10", "foil": "w11"}


def test_three_kinds():
    assert wb.Task([PAIR]).kind == "pairs"
    assert wb.Task([{"text": "a", "label": "x"}]).kind == "labelled"
    assert wb.Task([{"text": "a"}]).kind == "plain"
    with pytest.raises(ValueError, match="make no task"):
        wb.Task([{"prompt": "a"}])
    for wrong in ("hello", ["hello"], PAIR):
        with pytest.raises(TypeError, match="list of dicts"):
            wb.Task(wrong)
    with pytest.raises(ValueError, match="at least one row"):
        wb.Task([])
    with pytest.raises(ValueError, match=r"Row 1 .* needs a text in 'foil'"):
        wb.Task([PAIR, PAIR | {"foil": None}])
    with pytest.raises(ValueError, match="split 'train' is unknown"):
        wb.Task([PAIR | {"split": "train"}])


def test_splits_and_slices():
    task = wb.Task([PAIR | {"split": s} for s in ("fit", "fit", "ood")], "t")
    assert repr(task) == "Task(t, 3 pairs: fit 2, ood 1)"
    assert len(task.split("fit")) == 2 and len(task[:1]) == len(task[0]) == 1
    assert len(wb.Task([*task, PAIR]).split("fit")) == 2  # a row that names no split is in none
    with pytest.raises(ValueError, match="no rows of split 'test'; it has fit, ood"):
        task.split("test")


def test_files_round_trip(tmp_path, llama):
    task = wb.Task(copying(3), "mine")
    assert wb.Task.load(task.save(tmp_path / "mine.jsonl")) == task
    task.frame.to_csv(tmp_path / "mine.csv", index=False)
    assert wb.Task.load(tmp_path / "mine.csv").on(llama).spans == task.on(llama).spans
    uneven = pd.DataFrame([*task.rows, PAIR, PAIR | {"split": "ood"}])
    assert len(wb.Task(uneven).on(llama).task) == 5
    with pytest.raises(ValueError, match=r"no task 'iol'\. Did you mean 'ioi'"):
        wb.Task.load("iol")


def test_ids_answers_and_spans(llama):
    task = wb.Task(copying(3))
    pairs = task.on(llama)
    clean, corrupted = task.tokens(llama)
    assert clean.shape == corrupted.shape == (3, 7) and (clean != corrupted).sum() == 3
    assert pairs.answer.tolist() == [6] * 3 and pairs.foil.tolist() == [7] * 3
    assert pairs.spans == [{"cause": [2]}] * 3 and pairs.dropped.empty
    task = wb.Task([PAIR | {"spans": {"two": [0, 5], "one": [0, 3]}}])  # the space after it belongs to no token
    bos = wb.load(llama.hf, tokenizer=llama.tokenizer, bos=True)
    for model, shift in ((llama, 0), (bos, 1)):  # the same task, cut for each
        assert task.on(model).spans == [{"two": [shift, shift + 1], "one": [shift]}]


@pytest.mark.parametrize("wrong, said", [
    ({"corrupted": "w5 w8"}, "'w5 w6 w7' has 3 tokens, 'w5 w8' 2"), ({"answer": "w10 w12"}, "is no single token"),
    ({"clean": "w5 what w7"}, "'what'"), ({"foil": "w10"}, "same token"), ({"spans": {"x": "w9"}}, "stands 0 times"),
    ({"clean": "w5 w6 w5", "spans": {"x": "w5"}}, "stands 2 times"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused_with_the_reason(llama, wrong, said):
    with pytest.raises(ValueError, match=said):
        wb.Task([PAIR | wrong]).on(llama)
    pairs = wb.Task([PAIR, PAIR | wrong]).on(llama)
    assert len(pairs.task) == 1 and len(pairs.dropped) == 1
    with pytest.raises(ValueError, match="Only 1 of 5 rows"):
        wb.Task([PAIR] + [PAIR | wrong] * 4).on(llama)


def test_score_is_the_metric_row_by_row(llama):
    task = wb.Task([PAIR])
    logits = llama.logits(PAIR["clean"])[0]
    assert task.score(llama)[0] == pytest.approx((logits[10] - logits[11]).item())
    other = llama.logits(PAIR["corrupted"])[0]
    assert task.score(llama, prompt="corrupted")[0] == pytest.approx((other[10] - other[11]).item())
    assert task.score(llama, metric="prob")[0] == pytest.approx(torch.softmax(logits, 0)[10].item())
    named, counted = (wb.Task(copying(3)).score(llama, wb.Zero(f"mlp_out.1@{at}")) for at in ("cause", 2))
    assert (named == counted).all()
    with pytest.raises(ValueError, match="needs pairs"):
        wb.Task([{"text": "w5"}]).score(llama)


def test_every_bundled_task_fits_the_bundled_model(course):
    sys.path.insert(0, str(DATA))
    from make_english import SOURCES

    for name in wb.Task.names():
        if name in SOURCES:  # for pretrained English models
            continue
        task = wb.Task.load(name)
        if task.kind == "pairs":
            assert task.on(course).dropped.empty, name
            by_split = {s: {r["entity"] + r["template"] for r in task if r.get("split") == s} for s in ("fit", "ood")}
            assert not by_split["fit"] & by_split["ood"], name
        else:
            for text in task.column("text"):
                course.ids(text)


def test_clusters_are_entities_and_templates():
    rows = [{"text": f"text {i}", "entity": "ab"[i % 2], "template": "one"} for i in range(4)]
    assert wb.Task(rows).clusters() == [["entity a", "entity b"] * 2]  # one template tells no rows apart
    rows[3] |= {"template": "two"}
    assert wb.Task(rows).clusters()[1] == ["template one"] * 3 + ["template two"]
    assert wb.Task(rows).clusters([0, 1]) == [["entity a", "entity b"]]
    del rows[1]["entity"], rows[3]["entity"]
    assert wb.Task(rows).clusters()[0] == ["entity a", "row 1", "entity a", "row 3"]
    assert wb.Task([{"text": "a"}, {"text": "b"}]).clusters() is None


def test_a_task_is_cut_once_for_each_tokenizer(llama, course):
    task = wb.Task([{"clean": "paris is", "corrupted": "berlin is", "answer": "in", "foil": "a"}])
    first = task.on(course)
    first.clean.clear()  # the caller's own list
    again = task.on(course)
    assert len(again.clean) == 1 and again.dropped is first.dropped  # cut once
    with pytest.raises(ValueError):
        task.on(llama)  # which knows other words
    assert task.on(course).answer.tolist() == first.answer.tolist()


def test_what_a_caller_does_to_the_ids_stays_out_of_later_scores(llama):
    task = wb.Task(copying(4), "copying")
    scores, pairs = task.score(llama), task.on(llama)
    pairs.answer.add_(1), pairs.foil.zero_(), pairs.clean[0].zero_(), pairs.spans[0]["cause"].append(5)
    task.answers(llama)[0].zero_()
    assert (task.score(llama) == scores).all()
    assert task.on(llama).spans == wb.Task(copying(4)).on(llama).spans


def test_the_docstring_names_every_column():
    for column in (*PAIR, "text", "label", "spans", "split", "entity", "template", "completion"):
        assert f"`{column}`" in wb.Task.__doc__
