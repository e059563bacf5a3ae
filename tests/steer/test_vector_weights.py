"""Differences of weights merged by hand; DARE's mean; DoLa's formula."""

import math

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.steer import vector
from workbench.steer.vector import decoding


def delta(*values, strength=1.0):
    return wb.Delta(
        weights={"a": torch.tensor(values[:2]), "b": torch.tensor(values[2:]).view(2, 2)}, strength=strength
    )


def flat(one):
    return torch.cat([one.difference("a"), one.difference("b").flatten()])


def test_a_task_vector_makes_one_model_the_other(llama, words):
    tuned = wb.load(build("llama", seed=1), tokenizer=tokenizer())
    v = vector.task_vector(llama, tuned)
    base, goal = llama.logits(words(5, 7)), tuned.logits(words(5, 7))
    assert torch.allclose(llama.logits(words(5, 7), v), goal, atol=1e-4)
    assert torch.allclose(tuned.logits(words(5, 7), -v), base, atol=1e-4)
    assert torch.equal(llama.logits(words(5, 7)), base)
    with pytest.raises(ValueError, match="same weights"):
        vector.task_vector(llama, llama)
    with pytest.raises(ValueError, match="needs one architecture"):
        vector.task_vector(llama, wb.load(build("gpt2"), tokenizer=tokenizer()))


def test_ties_by_hand():
    one = delta(4.0, -3.0, 0.1, 2.0, 0.0, -0.2)  # the largest half: 4, -3, 2
    two = delta(2.0, 5.0, 0.3, -3.0, 0.1, 0.2)  # 2, 5, -3
    # sums 6, 2, 0, -1: signs +, +, ., -; the mean is over those that agree
    assert torch.allclose(flat(vector.ties([one, two], keep=0.5)), torch.tensor([3.0, 5.0, 0.0, -3.0, 0.0, 0.0]))
    # at its strength: the second twice as heavy
    merged = flat(vector.ties([one, 2 * two], keep=0.5))
    assert torch.allclose(merged, torch.tensor([4.0, 10.0, 0.0, -6.0, 0.0, 0.0]))
    assert torch.equal(flat(vector.ties([one], keep=1.0)), flat(one))
    assert torch.allclose(flat(vector.ties([one, one, one], keep=1.0)), flat(one))
    # a parameter that only one of them changes
    only = wb.Delta(weights={"a": torch.tensor([1.0, -1.0])})
    assert torch.allclose(flat(vector.ties([one, only], keep=1.0)), torch.tensor([2.5, -2.0, 0.1, 2.0, 0.0, -0.2]))
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match="share above 0"):
            vector.ties([one], keep=keep)
    with pytest.raises(TypeError, match="differences of weights"):
        vector.ties([one, wb.Zero("z.0.1")])


def test_dare_is_right_on_average():
    one = wb.Delta(weights={"a": torch.linspace(-1, 1, 41)}, strength=2.0)
    draws = torch.stack([vector.dare(one, drop=0.9, seed=seed).difference("a") for seed in range(200)])
    truth = one.difference("a")
    assert ((draws == 0) | torch.isclose(draws, truth / 0.1)).all()
    assert float((draws[:, truth != 0] == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    error = truth.abs() * math.sqrt(0.9 / 0.1 / 200)  # the standard error of the mean of 200 draws
    assert ((draws.mean(0) - truth).abs() <= 4.5 * error).all()
    slope = float((draws.mean(0) @ truth) / (truth @ truth))
    assert slope == pytest.approx(1, abs=0.15) and slope != 1
    assert torch.equal(vector.dare(one, drop=0.0).difference("a"), truth)
    assert torch.equal(draws[3], vector.dare(one, drop=0.9, seed=3).difference("a"))
    with pytest.raises(ValueError, match="below 1"):
        vector.dare(one, drop=1.0)


def test_dola_is_the_difference_to_the_layer_that_differs_most(llama, words):
    prompts = words(5, 8)
    got = vector.dola(llama, prompts, layers=[0, 1], alpha=0.05)
    read = wb.locate.vocabulary.readout.Readout(llama)
    with torch.no_grad():
        early = [read(llama.activations(prompts, f"resid_post.{layer}@-1")).log_softmax(-1) for layer in (0, 1)]
    final = llama.logits(prompts).log_softmax(-1)

    def jsd(a, b):
        m = ((a.exp() + b.exp()) / 2).log()
        return float((a.exp() * (a - m)).sum() + (b.exp() * (b - m)).sum()) / 2

    for row in range(2):
        apart = [jsd(final[row], layer[row]) for layer in early]
        wanted = final[row] - early[apart.index(max(apart))][row]
        kept = final[row].exp() >= 0.05 * final[row].exp().max()
        assert torch.isinf(got[row][~kept]).all() and kept.sum() > 1
        assert torch.allclose(got[row][kept], wanted[kept], atol=1e-4)
    one, other = final, early[0]  # of two predictions neither comes first
    assert torch.allclose(decoding._divergence(one, other[None]), decoding._divergence(other, one[None]), rtol=1e-3)
    assert torch.allclose(vector.dola(llama, prompts[0], layers=[0, 1], alpha=0.05)[0], got[0], atol=1e-4)
    off = vector.dola(llama, prompts, wb.Zero("mlp_out.1"), layers=[0, 1], alpha=0.05)
    assert not torch.equal(off, got)


def test_dola_generates_what_its_logits_say(llama, words):
    prompts = words(5, 8)
    said = vector.dola_generate(llama, prompts, max_new_tokens=3)
    for prompt, text in zip(prompts, said, strict=True):
        whole = prompt
        for word in text.split():
            assert llama.token(int(vector.dola(llama, whole).argmax())) == word
            whole = f"{whole} {word}"
    assert vector.dola_generate(llama, prompts[0], max_new_tokens=3) == said[0]
    assert [decoding._layers(8, half) for half in ("low", "high")] == [[0, 2], [4, 6]]  # never the last
    for layers, match in (([2], "from 0 to 1"), ("middle", "'low', 'high'"), ([], "before the last")):
        with pytest.raises(ValueError, match=match):
            vector.dola(llama, prompts, layers=layers)
    with pytest.raises(ValueError, match="alpha"):
        vector.dola(llama, prompts, alpha=0.0)
