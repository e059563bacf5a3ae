"""The fast sweep is exactly the slow one."""

import numpy as np
import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.locate.causal import PATCHABLE, patch

NAMES = {"denoising": ("corrupted", "clean"), "noising": ("clean", "corrupted")}


def naive(model, task, component, direction):
    """One plain pass per component and prompt: the metric with the component taken from the other side."""
    pairs, found = task.on(model), []
    base, source = (getattr(pairs, side) for side in NAMES[direction])
    for i, (mine, theirs) in enumerate(zip(base, source)):
        values = model.activations([theirs], component.at(None))[0]
        places = range(len(mine)) if component.position is None else [component.position]
        change = [wb.Replace(component.at(p), values[p]) for p in places]
        logits = model.logits([mine], *change)[0]
        found.append((logits[pairs.answer[i]] - logits[pairs.foil[i]]).item())
    return np.array(found)


def compare(model, task, kinds, direction):
    baseline = task.score(model, prompt=NAMES[direction][0])
    sign = 1 if direction == "denoising" else -1
    for kind in kinds:
        if kind in model.names.refused:
            continue
        scores = patch(model, task, kind, direction=direction, null=False)
        slow = np.stack([sign * (naive(model, task, one, direction) - baseline) for one in scores.components])
        largest = np.abs(slow).max()
        assert largest > 0.01, f"{kind}: effects are too small to test anything"
        assert np.abs(slow - scores.per_prompt).max() <= 1e-5 * largest, kind


@pytest.fixture(autouse=True)
def _any_gap(monkeypatch):
    """Random models need not prefer the answer; the refusal of such tasks is tested elsewhere."""
    monkeypatch.setattr("workbench.locate.causal._refuse_without_gap", lambda *args: None)


@pytest.mark.parametrize("direction", NAMES)
def test_equals_the_naive_loop(tiny, word_pairs, direction):
    compare(tiny, word_pairs[:2], PATCHABLE, direction)


def test_equals_the_naive_loop_on_the_bundled_model(course):
    task = wb.Task.load("ioi").split("test")
    pairs = task.on(course)
    longest = max(map(len, pairs.clean))
    same = [i for i, ids in enumerate(pairs.clean) if len(ids) == longest][:2]
    compare(course, wb.Task([pairs.task.rows[i] for i in same], "ioi"), PATCHABLE, "denoising")


def test_leaves_the_machine(tiny, word_pairs):
    """nnsight's dry run of a remote trace: serialized, with local modules hidden."""
    here = patch(tiny, word_pairs, "resid_pre")
    heads = patch(tiny, word_pairs, "z")
    tiny.remote = "local"
    try:
        assert np.allclose(patch(tiny, word_pairs, "resid_pre").per_prompt, here.per_prompt, atol=1e-5)
        assert np.allclose(patch(tiny, word_pairs, "z").per_prompt, heads.per_prompt, atol=1e-5)
    finally:
        tiny.remote = None


def test_batching_does_not_matter(llama, word_pairs, monkeypatch):
    whole = patch(llama, word_pairs, "resid_pre")
    for cost, tokens in ((0, 8), (10**9, 10**9)):
        monkeypatch.setattr("workbench.model.sweep.CALL_COST", cost)
        monkeypatch.setattr("workbench.model.sweep.TOKENS_PER_CALL", tokens)
        again = patch(llama, word_pairs, "resid_pre")
        assert np.allclose(again.per_prompt, whole.per_prompt, atol=1e-5)


def test_nan_activations_are_named(word_pairs):
    hf = build("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite .* at resid_pre\.2, prompt 0"):
        patch(wb.load(hf, tokenizer=tokenizer()), word_pairs, "resid_pre")


@pytest.mark.parametrize("where", ["between calls", "inside a forward pass"])
def test_an_interrupt_leaves_the_model_as_it_was(word_pairs, words, where, monkeypatch):
    model = wb.load(build("llama"), tokenizer=tokenizer())
    before, weights = model.logits(words(6)), {k: v.clone() for k, v in model.hf.state_dict().items()}
    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    if where == "between calls":
        monkeypatch.setattr("workbench.model.sweep.tqdm.update", stop)
    else:
        handle = model.hf.model.layers[2].mlp.register_forward_hook(lambda *a: stop())
    with pytest.raises(KeyboardInterrupt):
        patch(model, word_pairs, "resid_pre")
    if where != "between calls":
        handle.remove()
    assert torch.equal(model.logits(words(6)), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.hf.state_dict().items())
