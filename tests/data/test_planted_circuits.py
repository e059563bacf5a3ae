"""Circuits written by hand: each does its task by its circuit, and by nothing else."""

import json

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.task import DATA

NAMES = ("induction", "lookup", "inhibition")


@pytest.fixture(scope="module", params=NAMES)
def circuit(request):
    folder = DATA / "planted" / request.param
    return wb.load(folder), wb.Task.load(folder / "task.jsonl"), json.loads((folder / "circuit.json").read_text())


def test_every_row_is_answered(circuit):
    model, task, _ = circuit
    assert task.score(model, metric="accuracy").mean() == 1
    flipped = wb.Task([{**r, "clean": r["corrupted"], "corrupted": r["clean"], "answer": r["foil"], "foil": r["answer"],
                        "spans": {}} for r in task])  # fmt: skip
    assert flipped.score(model, metric="accuracy").mean() == 1
    assert len(task.on(model).dropped) == 0 and {row["split"] for row in task} == {"fit", "select", "test", "ood"}


def test_heads_of_the_circuit_are_needed_and_others_are_not(circuit):
    model, task, about = circuit
    for layer in range(model.names.n_layers):
        for index in range(model.names.n_heads):
            accuracy = task.score(model, wb.Zero(at=f"z.{layer}.{index}"), metric="accuracy").mean()
            assert accuracy <= 0.6 if f"z.{layer}.{index}" in about["heads"] else accuracy == 1


def test_patching_ranks_the_circuit_first(circuit):
    model, task, about = circuit
    scores = wb.locate.causal.patch(model, task.split("test"), "z.*.*", null=False, progress=False)
    values = dict(zip(map(str, scores.components), scores.values, strict=True))
    assert all(values.pop(head) > 0.9 for head in about["heads"])
    assert max(map(abs, values.values())) < 0.1


def test_the_norm_of_the_stream_is_nearly_constant(circuit):
    model, task, _ = circuit
    for layer in range(model.names.n_layers):
        norms = model.activations(task.on(model).clean, f"resid_pre.{layer}@-1").norm(dim=-1)
        assert norms.max() / norms.min() < 1.02


def test_edges_join_parts_in_forward_order(circuit):
    _, _, about = circuit
    for source, target, how in about["edges"]:
        assert target == "logits" or wb.Component.parse(source) < wb.Component.parse(target)
        assert how in ("", "q", "k", "v")
    assert {part for edge in about["edges"] for part in edge[:2]} >= set(about["heads"])


def test_each_neuron_of_the_lookup_knows_one_capital():
    folder = DATA / "planted" / "lookup"
    model, task = wb.load(folder), wb.Task.load(folder / "task.jsonl")
    knows = task.score(model, metric="log_prob")
    for name, says in json.loads((folder / "circuit.json").read_text())["neurons"].items():
        country, capital = says.split(": ")
        own = np.array([row["entity"] == country for row in task])
        without = task.score(model, wb.Zero(at=name), metric="log_prob")
        assert (without[own] < -2).all() and (knows > -0.1).all() and own.any()
        np.testing.assert_allclose(without[~own], knows[~own], atol=1e-3)
        assert all(row["answer"] == capital for row in task if row["entity"] == country)


def test_the_previous_token_head_looks_one_back():
    model = wb.load(DATA / "planted" / "induction")
    pattern = model.hf(**model.inputs(model.ids("pen cup hat fox map pen")[None]), output_attentions=True).attentions
    torch.testing.assert_close(pattern[0][0, 1].diagonal(-1), torch.ones(6), atol=1e-3, rtol=0)
    assert pattern[1][0, 2, -1, 2] > 0.99  # from the second "pen" to what followed the first
