"""Gradients at tokens and along ways: sums that must come out, nulls by hand, what is kept and drawn."""

import warnings

import numpy as np
import pytest
import torch
from test_causal_null import other_causes
from test_gradient import ATP, task, told_apart
from tiny import copying

import workbench as wb
from workbench.locate import gradient
from workbench.locate.causal.null import partners


def test_integrated_gradients_add_up(course, llama, word_pairs):
    for model, some in ((course, wb.Task.load("capital").split("select")[:8]), (llama, told_apart(llama, word_pairs))):
        scores = gradient.integrated_gradients(model, some)
        pairs = some.on(model)
        gap = some.score(model) - some.score(model, prompt="corrupted")
        assert np.median(scores.gaps) < 0.01 and scores.cost == 2 + 2 * (64 + 2 * 8)
        sums = np.array([one.sum() for one in scores.by_token])
        assert np.allclose(np.abs(sums - gap) / np.abs(gap), scores.gaps, atol=1e-4)
        for values, one, two in zip(scores.by_token, pairs.clean, pairs.corrupted, strict=True):
            assert ((values != 0) == (one != two).numpy()).all()
        if model is course:
            assert scores["embed@subject"] == pytest.approx(1, abs=0.02) and scores.above_null() == scores.top(1)


def test_integrated_gradients_of_texts_and_their_warning(trained, words):
    texts = words(6, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many, few = (gradient.integrated_gradients(trained, texts, steps=k, baseline="mean") for k in (128, 2))
    mean = trained.hf.get_input_embeddings().weight.mean(0)
    with pytest.warns(UserWarning, match="take more steps"):
        given = gradient.integrated_gradients(trained, texts, steps=2, baseline=mean)
    assert np.median(many.gaps) < np.median(few.gaps) and np.allclose(given.values, few.values, atol=1e-4)
    assert "first choice" in many.metric and len(many.components) == 6


def test_saliency(trained, word_pairs):
    some = task()
    turned = gradient.saliency(trained, some)
    assert (turned.values >= 0).all() and turned.cost == 2
    swapped = gradient.saliency(trained, some, how="input")
    first = ATP(trained, some, "resid_pre.0", positions="each", direction="noising", null=False)
    assert np.allclose(swapped.per_prompt, first.per_prompt, atol=1e-4)  # the stream begins with the embeddings
    ids, table = some.on(trained).clean, trained.hf.get_input_embeddings().weight
    _, acts, slopes = trained.gradients(ids, "embed", lambda logits, rows: logits[:, 6] - logits[:, 7])
    (x,), (slope,) = acts.values(), slopes.values()
    assert torch.equal(x, table[torch.stack(ids)])
    assert np.allclose(
        gradient.saliency(trained, some, how="input", baseline="zero").per_prompt.T, (x * slope).sum(-1), atol=1e-4
    )
    assert np.allclose(turned.per_prompt.T, x.norm(dim=-1) * slope.norm(dim=-1), atol=1e-4)


def test_saliency_on_the_bundled_model(course):
    """Turning the subject matters most. Shrinking an embedding does nothing where the model begins with a norm."""
    some = wb.Task.load("capital").split("select")[:16]
    turned, swapped = gradient.saliency(course, some), gradient.saliency(course, some, how="input")
    shrunk = gradient.saliency(course, some, how="input", baseline="zero")
    subject = wb.Component.parse("embed@subject")
    assert turned.top(1) == swapped.top(1) == swapped.above_null() == [subject] and subject in turned.above_null()
    assert abs(shrunk[subject]) < 0.01 * swapped[subject]


def test_token_scores_are_kept_and_drawn(trained, tmp_path):
    longer = [dict(row, clean="w11 " + row["clean"], corrupted="w11 " + row["corrupted"]) for row in task(4, 9)]
    scores = gradient.saliency(trained, wb.Task([*task(8), *longer]))
    assert {one.position for one in scores.components} == {"cause"} and [len(one) for one in scores.tokens] == [
        7
    ] * 8 + [8] * 4
    again = gradient.TokenScores.load(scores.save(tmp_path / "scores"))
    assert again.tokens == scores.tokens and all(map(np.array_equal, again.by_token, scores.by_token))
    assert repr(again) == repr(scores) and len(scores.token_frame) == 8 * 7 + 4 * 8
    assert wb.Scores.load(tmp_path / "scores").components == scores.components
    assert len(scores.strip([0, 9]).axes[0].texts) == 15


def test_knowledge_neurons_add_up_layer_by_layer(llama, word_pairs):
    some = wb.Task(told_apart(llama, word_pairs).rows[:4])
    clean = some.score(llama)
    for position in (-1, 3):
        scores = gradient.knowledge_neurons(llama, some, position=position, metric="logit_diff", steps=64)
        for layer in range(3):
            own = [i for i, one in enumerate(scores.components) if one.layer == layer]
            gone = clean - some.score(llama, wb.Zero(f"neuron.{layer}.*@{position}"))
            assert np.allclose(scores.per_prompt[own].sum(0), gone, rtol=0.01, atol=0.001)
            assert np.abs(gone).max() > 0.02 or (layer == 2 and position == 3 and not gone.any())
        assert len(scores.components) == 3 * 48 and (scores.columns["shared"] <= 1).all()


# nulls


def test_the_null_of_saliency_by_hand(trained, drawn):
    """Other prompts' embeddings in the place of the own one, or of the baseline; of lengths, the same numbers dealt anew."""
    some = other_causes(8)
    pairs = some.on(trained)
    others = partners(pairs, pairs.clean, [list(range(8))], 2, 4)
    _, acts, slopes = trained.gradients(pairs.clean, "embed", lambda logits, rows: logits[:, 6] - logits[:, 7])
    (x,), (slope,) = acts.values(), slopes.values()
    for baseline, minus in (("corrupted", x), ("zero", 0 * x)):
        scores = gradient.saliency(trained, some, how="input", baseline=baseline, null=2, seed=4)
        for draw, found in enumerate(drawn["under"]):
            theirs = x[[own[draw] for own in others]]
            assert np.allclose(found.T, ((theirs - minus) * slope).sum(-1), atol=1e-4)
        assert np.allclose(scores.null_p95, drawn["limit"])
    norms = gradient.saliency(trained, some, null=2).per_prompt
    for found in drawn["under"]:
        assert np.allclose(np.sort(found, 0), np.sort(norms, 0)) and not np.allclose(found, norms)


@pytest.mark.filterwarnings("ignore:Integrated gradients miss")
def test_the_null_of_integrated_gradients_adds_up_too(trained, drawn):
    """The same walk to another prompt: its numbers add up to that prompt's metric, less the baseline's."""
    some = other_causes(6)
    pairs = some.on(trained)
    mean = trained.hf.get_input_embeddings().weight.detach().mean(0)
    start = {"corrupted": some.score(trained, prompt="corrupted"),
             "mean": some.score(trained, wb.Replace("embed", mean))}  # fmt: skip
    for baseline in ("corrupted", "mean"):
        side = "corrupted" if baseline == "corrupted" else "clean"
        scores = gradient.integrated_gradients(trained, some, baseline=baseline, steps=256, null=2, seed=4)
        others, ends = partners(pairs, getattr(pairs, side), [list(range(6))], 2, 4), some.score(trained, prompt=side)
        for draw, found in enumerate(drawn["under"]):
            expected = ends[[own[draw] for own in others]] - start[baseline]
            assert np.allclose(found.sum(0), expected, rtol=0.2, atol=0.5)
        unit = abs(scores.clean - scores.corrupted) if baseline == "corrupted" else 1
        assert np.allclose(scores.null_p95 * unit, drawn["limit"])


def test_of_texts_the_first_choice_is_told_from_the_second(trained, words):
    texts, mean = words(6, 6, 6), trained.hf.get_input_embeddings().weight.detach().mean(0)
    scores = gradient.integrated_gradients(trained, texts, steps=256, baseline="mean", null=False)
    before, after = (trained.logits(texts, *given) for given in ([], [wb.Replace("embed", mean)]))
    first, second = before.topk(2).indices.T[..., None]
    gaps = [(x.gather(1, first) - x.gather(1, second))[:, 0].numpy() for x in (before, after)]
    assert np.allclose([one.sum() for one in scores.by_token], gaps[0] - gaps[1], rtol=0.1, atol=0.2)


def test_the_null_of_knowledge_neurons_is_the_other_fact(trained, drawn):
    """The corrupted prompts with the foil as answer; `shared` counts prompts in which a neuron reaches a share of the best."""
    turned = wb.Task([row | {"clean": row["corrupted"], "corrupted": row["clean"], "answer": "w7", "foil": "w6", "spans": {}}
                      for row in copying(4)])  # fmt: skip
    for metric in ("prob", "logit_diff"):
        scores = gradient.knowledge_neurons(trained, task(4), "neuron.1.*", metric=metric, steps=4, reach=0.3)
        assert drawn["together"] == 4 and drawn["under"].shape == (4, 48, 1)
        other = gradient.knowledge_neurons(trained, turned, "neuron.1.*", metric=metric, steps=4, null=False)
        assert np.allclose(drawn["under"][:, :, 0].T, other.per_prompt, atol=1e-5)
        assert scores.clean == pytest.approx(task(4).score(trained, metric=metric).mean(), abs=1e-5)
        assert scores.corrupted == pytest.approx(turned.score(trained, metric=metric).mean(), abs=1e-5)
        for values, shared in zip(scores.per_prompt, scores.columns["shared"], strict=True):
            best = [max(scores.per_prompt[:, prompt]) for prompt in range(4)]
            assert shared == sum(values[prompt] >= 0.3 * best[prompt] for prompt in range(4)) / 4
