"""Directions: known truth, splits, strengths."""

import pytest
import torch

import workbench as wb
from workbench.steer.vector import difference_of_means, directional_ablation, leace, set_to_mean


def labelled(**extra):
    rows = [{"text": "w10 w11 w4", "label": "yes", **extra}, {"text": "w12 w13 w4", "label": "yes", **extra},
            {"text": "w14 w15 w5", "label": "no", **extra}, {"text": "w16 w17 w18 w5", "label": "no", **extra}]  # fmt: skip
    return wb.Task(rows, "labelled")


def test_it_is_the_difference_of_means(llama):
    push = difference_of_means(llama, labelled(), "resid_post.1@-1")
    yes = llama.activations(["w10 w11 w4", "w12 w13 w4"], "resid_post.1@-1").mean(0)
    no = torch.cat([llama.activations([t], "resid_post.1@-1") for t in ("w14 w15 w5", "w16 w17 w18 w5")]).mean(0)
    assert torch.allclose(push.vector, yes - no, atol=1e-5)
    assert (push.strength, push.phase, str(push.at[0])) == (1.0, "prompt", "resid_post.1@-1")
    back = difference_of_means(llama, labelled(), "resid_post.1@-1", positive="no")
    assert torch.allclose(back.vector, -push.vector, atol=1e-6)
    states, positive = difference_of_means(llama, wb.Task(labelled().rows[1:]), "resid_post.1@-1").fitted_on
    assert (len(states), positive) == (3, 1)  # for shuffled labels


def test_pairs_give_clean_minus_corrupted_and_only_fit_rows_count(llama, word_pairs):
    rows = [dict(row, split="test" if i else "fit") for i, row in enumerate(word_pairs)]
    push = difference_of_means(llama, wb.Task(rows), "resid_post.1@3", to="resid_post.2")
    one = [llama.activations(rows[0][side], "resid_post.1@3")[0] for side in ("clean", "corrupted")]
    assert torch.allclose(push.vector, one[0] - one[1], atol=1e-5)
    assert push.phase == "both" and str(push.at[0]) == "resid_post.2"


def test_without_a_position_prompts_weigh_the_same(llama):
    push = difference_of_means(llama, labelled(), "resid_post.1")
    means = [llama.activations([row["text"]], "resid_post.1")[0].mean(0) for row in labelled()]
    assert torch.allclose(push.vector, (means[0] + means[1] - means[2] - means[3]) / 2, atol=1e-5)


def test_steering_moves_and_ablation_stops_it(llama, words):
    push = difference_of_means(llama, labelled(), "resid_post.1@-1")
    assert torch.equal(llama.logits(words(5), 0 * push), llama.logits(words(5)))
    off = directional_ablation(llama, labelled(), "resid_post.1@-1")
    seen = llama.activations(words(5), "resid_post.2", off)
    assert (seen @ push.vector).abs().max() < 1e-3 * seen.norm(dim=-1).max() * push.vector.norm()
    assert (llama.activations(words(5), "resid_post.2") @ push.vector).abs().max() > 0.1


def test_ablation_equals_orthogonalized_weights(llama, words):
    """Projecting out of every write is the same as taking the direction out of the weights that write."""
    from tiny import build, tokenizer

    off = directional_ablation(llama, labelled(), "resid_post.1@-1")
    unit = off.direction / off.direction.norm()
    hf = build("llama")
    with torch.no_grad():
        hf.model.embed_tokens.weight -= torch.outer(hf.model.embed_tokens.weight @ unit, unit)
        for block in hf.model.layers:
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= torch.outer(unit, unit @ weight)
    baked = wb.load(hf, tokenizer=tokenizer())
    assert torch.allclose(baked.logits(words(6)), llama.logits(words(6), off), atol=1e-4)


def test_setting_to_a_mean_moves_that_component_only(llama, words):
    at, push = "resid_post.1@-1", difference_of_means(llama, labelled(), "resid_post.1@-1")
    unit = push.vector / push.vector.norm()
    no = llama.activations(["w14 w15 w5", "w16 w17 w18 w5"], at) @ unit
    yes = llama.activations(["w10 w11 w4", "w12 w13 w4"], at) @ unit
    before = llama.activations(words(5, 7), at)
    for share in (0.0, 1.0, 0.25):
        after = llama.activations(words(5, 7), at, set_to_mean(llama, labelled(), at, share=share))
        goal = no.mean() + share * (yes.mean() - no.mean())
        assert torch.allclose(after @ unit, goal.expand(2), atol=1e-4)
        rest = [x - torch.outer(x @ unit, unit) for x in (before, after)]
        assert torch.allclose(*rest, atol=1e-4)
    turned = set_to_mean(llama, labelled(), at, positive="no"), set_to_mean(llama, labelled(), at, share=1.0)
    assert torch.allclose(turned[0].bias, turned[1].bias, atol=1e-4)
    where = set_to_mean(llama, labelled(), at, to=["resid_post.1", "resid_post.2"])
    assert where.phase == "both" and [str(one) for one in where.at] == ["resid_post.1", "resid_post.2"]


def test_after_leace_the_sides_have_one_mean(trained):
    from tiny import copying

    task = wb.Task(copying(24), "copying")
    eraser = leace(trained, wb.Task([row | {"split": "fit"} for row in task] + [row | {"split": "test"} for row in task]),
                   "resid_post.0@2")  # fmt: skip
    yes, no = (trained.activations(task.column(side), "resid_post.0@2", *given) for side in ("clean", "corrupted")
               for given in ([eraser],))  # fmt: skip
    apart = (trained.activations(task.column("clean"), "resid_post.0@2") - trained.activations(task.column("corrupted"),
             "resid_post.0@2")).mean(0).norm()  # fmt: skip
    assert (yes.mean(0) - no.mean(0)).norm() < 1e-3 * apart


def test_turning_keeps_the_length(llama, words):
    turn = 30 * difference_of_means(llama, labelled(), "resid_post.1@-1", to="resid_post.1", unit="angle")
    before, after = (llama.activations(words(6), "resid_post.1", *given)[0] for given in ([], [turn]))
    assert torch.allclose(before.norm(dim=-1), after.norm(dim=-1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity
    start, end = (torch.rad2deg(torch.acos(cosine(x, turn.vector, dim=-1))) for x in (before, after))
    assert torch.allclose(end, (start - 30).clamp(min=0), atol=0.1)
    back = torch.rad2deg(torch.acos(cosine(llama.activations(words(6), "resid_post.1", -turn)[0], turn.vector, dim=-1)))
    assert torch.allclose(back, (start + 30).clamp(max=180), atol=0.1)
    assert torch.equal(llama.logits(words(6), 0 * turn), llama.logits(words(6)))
    far = torch.rad2deg(torch.acos(cosine((6 * turn).change(before, 0), turn.vector, dim=-1).clamp(-1, 1)))
    assert far.abs().max() < 0.1  # as far as the vector, not past it


def test_refusals(llama, word_pairs):
    with pytest.raises(ValueError, match="two labels"):
        difference_of_means(llama, wb.Task([{"text": "w5"}]), "resid_post.1@-1")
    with pytest.raises(ValueError, match="two labels"):
        difference_of_means(llama, labelled(), "resid_post.1@-1", positive="maybe")
    with pytest.raises(ValueError, match=r"do not differ at resid_post\.1@0"):
        difference_of_means(llama, word_pairs, "resid_post.1@0")
    with pytest.raises(ValueError, match="family"):
        difference_of_means(llama, labelled(), "resid_post@-1")
