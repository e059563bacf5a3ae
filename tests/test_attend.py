"""Attention to certain tokens: rescaled with and without the rest adjusting, never on the future, in padded batches."""

import math

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb

PROMPTS = ["w10 w11 w4 w9", "w12 w13 w4 w6 w8 w20"]


def patterns(model, *changes, at="pattern.1.2"):
    return [model.activations(text, at, *changes)[0] for text in PROMPTS]


@pytest.mark.parametrize("factor", [0.0, 0.3, 100.0])
def test_scores_scale_attention_and_the_rest_adjusts(llama, factor):
    at = llama.activations(PROMPTS, "pattern.1.2@-1", wb.Attend("attn_scores.1.2", [1, -2], factor))
    for row, before in enumerate(patterns(llama)):
        wanted = before[-1].clone()
        wanted[[1, len(wanted) - 2]] *= factor
        pads = at.shape[1] - len(wanted)
        assert torch.allclose(at[row, pads:], wanted / wanted.sum(), atol=1e-6)
        assert at[row, :pads].abs().sum() == 0
    one, other = (
        llama.activations(PROMPTS, "pattern.1.1@-1", *given) for given in ([], [wb.Attend("attn_scores.1.2", 1)])
    )
    assert torch.equal(one, other)


def test_pattern_scales_attention_and_the_rest_stays(llama):
    change = wb.Attend("pattern.1.2@-1", 1, 0.25)
    for before, after in zip(patterns(llama), patterns(llama, change), strict=True):
        wanted = before.clone()
        wanted[-1, 1] *= 0.25
        assert torch.allclose(after, wanted, atol=1e-7)


def test_a_query_that_sees_nothing_else_is_left_as_it_is(llama):
    for before, after in zip(patterns(llama), patterns(llama, wb.Attend("attn_scores.1.2", [0, 1])), strict=True):
        assert torch.equal(after[:2], before[:2])
        assert after[2:, :2].abs().sum() == 0
        assert after.triu(1).abs().sum() == 0


def test_it_is_the_change_of_scores_by_log_factor(llama):
    heads = [f"attn_scores.2.{i}" for i in range(4)]
    spans = [{"here": [1, 2]}] * 2
    got = llama.logits(PROMPTS, wb.Attend(heads, "here", 7.0), spans=spans)
    assert torch.equal(got, llama.logits(PROMPTS, wb.Attend("attn_scores.2.*", [1, 2], 7.0)))
    x = torch.randn(2, 3, 6)
    bound = wb.Attend("attn_scores.2.0", 1, 7.0).on(wb.model.Prompts([torch.arange(6)] * 2))
    wanted = x.clone()
    wanted[..., 1] += math.log(7)
    assert torch.allclose(bound.change(x, 0), wanted)
    assert torch.equal(llama.logits(PROMPTS, wb.Attend(heads, 1, 1.0)), llama.logits(PROMPTS))


def test_saving_and_refusals(llama, tmp_path):
    recipe = wb.Recipe([wb.Attend("attn_scores.1.*", ["subject", -1], 0.5)])
    assert list(wb.Recipe.load(recipe.save(tmp_path / "r"))) == list(recipe)
    with pytest.raises(ValueError, match="attn_scores or pattern"):
        wb.Attend("z.1.2", 1)
    with pytest.raises(ValueError, match="factor from 0 on"):
        wb.Attend("pattern.1.2", 1, -1.0)
    with pytest.raises(ValueError, match="at least one key"):
        wb.Attend("pattern.1.2", [])
    with pytest.raises(ValueError, match="no span 'subject'"):
        llama.logits(PROMPTS, recipe)


@pytest.mark.parametrize("arch", ["llama", "mistral"])  # mistral: a window of 4 tokens in every layer
@pytest.mark.parametrize("phase", ["prompt", "generation", "both"])
def test_generated_tokens_look_where_the_phase_says(arch, phase):
    """Greedy text equals that of a change made anew for the whole text at every step."""
    model = wb.load(build(arch), tokenizer=tokenizer())
    start = [model.ids(text) for text in PROMPTS]
    plain = [one.tolist() for one in model.generate_ids(PROMPTS, max_new_tokens=4, eos_token_id=None)]
    moved = []
    for change in (wb.Attend("attn_scores.*.*", [0, -1], 0.0, phase=phase), wb.Attend("pattern.1.*", -1, 4.0, phase=phase),
                   wb.Window(["attn_scores.0.*", "attn_scores.2.1"], sink=0, window=2, phase=phase)):  # fmt: skip
        ids = start
        for _ in range(4):
            new = model.logits(wb.model.Prompts(ids, [len(one) for one in start]), change).argmax(-1)
            ids = [torch.cat([old, one[None]]) for old, one in zip(ids, new)]
        want = [one[len(old) :].tolist() for one, old in zip(ids, start)]
        want = [one[: one.index(2)] if 2 in one else one for one in want]
        for use_cache in (True, False):
            made = model.generate_ids(PROMPTS, change, max_new_tokens=4, eos_token_id=None, use_cache=use_cache)
            assert [one.tolist() for one in made] == want
        moved.append(want != plain)
    assert any(moved)


def test_a_cache_with_room_for_more_keys_is_refused(llama):
    bound = wb.Window("attn_scores.1.*").on(wb.model.Prompts([torch.arange(6)]))
    with pytest.raises(ValueError, match="cache_implementation"):
        bound.change(torch.zeros(1, 6, 9), 0)
