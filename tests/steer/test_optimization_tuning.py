"""Learning located weights, factors, maps and vectors: what is outside a mask stays, controls match, nothing changes the model."""

import numpy as np
import pytest
import torch
from tiny import copying

import workbench as wb
from workbench import measure
from workbench.model.edit import edited
from workbench.steer import optimization
from workbench.steer.optimization import masks as masking
from workbench.steer.optimization.learning import Keep, LowRank, Masked, learn
from workbench.steer.optimization.rows import Rows
from workbench.steer.optimization.unlearning import _shuffled

QUICK = {"keep": (), "steps": 30, "every": 10, "batch": 8}


@pytest.fixture(autouse=True)
def unchanged(trained):
    before = {k: v.clone() for k, v in trained.hf.state_dict().items()}
    yield
    now = trained.hf.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in before)


def new(n=24, **extra):
    """w4 at position 2 should now be answered by w8; splits by row."""
    rows = [
        dict(row, answer="w8", split="select" if i % 4 == 0 else "fit", **extra) for i, row in enumerate(copying(n))
    ]
    return wb.Task(rows, "new")


def other():
    """w5 at position 2 should stay w7."""
    rows = [dict(row, clean=row["corrupted"], corrupted=row["clean"], answer="w7", foil="w6", spans={"cause": "w5"},
                 split="select" if i % 4 == 0 else "fit") for i, row in enumerate(copying(24, seed=5))]  # fmt: skip
    return wb.Task(rows, "other")


def accuracy(model, task, *made):
    with edited(model, *made) if made and isinstance(made[0], wb.Delta) else edited(model):
        left = [one for one in made if not isinstance(one, wb.Delta)]
        return task.score(model, *left, metric="accuracy").mean()


@pytest.mark.parametrize("at", [["z.1.0", "q.2.3"], ["neuron.1.*"], "mlp_out.2", "attn_out.1"])
def test_only_the_located_weights_change(trained, at):
    masks = masking.weight_masks(trained, at)
    made = optimization.finetune(trained, new(), at, lr=1e-2, decay=0.1, **QUICK)
    assert set(made.names) == set(masks)
    for name in made.names:
        difference = made.difference(name)
        assert (difference[~masks[name]] == 0).all() and (difference[masks[name]] != 0).float().mean() > 0.9
    weights = dict(trained.hf.named_parameters())
    before = {name: weight.clone() for name, weight in weights.items()}
    with edited(trained, made):
        for name, weight in trained.hf.named_parameters():
            outside = ~masks[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
            assert torch.equal(weight[outside], before[name][outside])


def test_masks_are_the_named_slices(trained):
    """Llama with 4 heads of 8, 2 key-value groups: head 3 uses group 1."""
    masks = masking.weight_masks(trained, "z.1.3")
    block = "model.layers.1.self_attn."
    assert masks[f"{block}q_proj.weight"].any(1).nonzero().flatten().tolist() == list(range(24, 32))
    assert masks[f"{block}k_proj.weight"].any(1).nonzero().flatten().tolist() == list(range(8, 16))
    assert masks[f"{block}o_proj.weight"].any(0).nonzero().flatten().tolist() == list(range(24, 32))
    neuron = masking.weight_masks(trained, "neuron.0.5")
    mlp = "model.layers.0.mlp."
    assert [int(neuron[f"{mlp}{name}.weight"].sum()) for name in ("gate_proj", "up_proj", "down_proj")] == [32, 32, 32]
    assert neuron[f"{mlp}down_proj.weight"][:, 5].all() and neuron[f"{mlp}up_proj.weight"][5].all()
    weights = trained.weight("W_out", 0)[5]
    assert torch.equal(trained.hf.model.layers[0].mlp.down_proj.weight[neuron[f"{mlp}down_proj.weight"]], weights)


@pytest.mark.parametrize("kind", ["z", "neuron", "q"])
def test_masks_on_every_architecture(tiny, kind):
    """Changing what a mask covers changes this component's activations at most where it feeds, and never its neighbour's."""
    if kind == "neuron" and (kind in tiny.names.refused or tiny.names.row.mlp_in is None):
        pytest.skip("fused experts")
    if kind in tiny.names.refused:
        pytest.skip("not offered")
    if kind != "neuron" and tiny.hf.config.model_type == "olmo2":
        pytest.skip("norms queries over all heads together")
    masks = masking.weight_masks(tiny, f"{kind}.1.1")
    prompt, read = "w10 w20 w30 w40", [f"{kind}.1.{i}" for i in range(tiny.names.size(kind))]
    before, moved = tiny.activations(prompt, read), set()
    for sign in (-2, 2):  # a neuron may be off at one of them
        with edited(tiny, wb.Delta(weights={name: mask.float() * sign for name, mask in masks.items()})):
            after = tiny.activations(prompt, read)
        moved |= {str(one) for one in before if not torch.equal(before[one], after[one])}
    shared = tiny.names.n_heads // tiny.names.n_kv_heads if kind == "z" else 1
    assert f"{kind}.1.1" in moved and len(moved) <= shared


def test_finetuning_brings_the_behaviour_and_keeps_the_other(trained):
    made = optimization.finetune(
        trained, new(), ["mlp_out.2", "attn_out.2"], keep=[other()], budget=0.5, lr=1e-2, steps=80, every=20
    )
    assert accuracy(trained, new().split("select")) == 0
    assert accuracy(trained, new().split("select"), made) == 1
    assert accuracy(trained, other().split("select"), made) == 1
    assert {"step", "loss", "target", "collateral", "kept"} <= set(made.history) and made.history.kept.sum() == 1
    kept = made.history[made.history.kept].iloc[0]
    assert kept.collateral <= 0.5 and kept.target == pytest.approx(made.history.target.min(), abs=1e-3)


def test_the_same_seed_gives_the_same_weights(trained):
    one, two, three = (optimization.finetune(trained, new(), "mlp_out.2", seed=seed, **QUICK) for seed in (1, 1, 2))
    assert one == two and one != three


def test_no_check_within_the_budget_is_an_error(trained):
    with pytest.raises(ValueError, match=r"No step kept the KL.*budget=1e-09"):
        optimization.finetune(
            trained, new(), "all", **{**QUICK, "keep": [other()]}, keep_weight=0.0, lr=3e-2, budget=1e-9
        )


def test_what_acts_during_tuning_need_not_be_learnt(trained):
    """A vector that already says w8: with it on, the weights have nothing to learn; a random one prevents nothing."""
    task, at = new(), "mlp_out.2"
    push = optimization.steering_vector(trained, task, "resid_post.1@-1", keep=(), steps=100, every=10, lr=0.2)
    assert accuracy(trained, task, push) > 0.9
    noise = wb.Add(push.at, torch.randn(len(push.vector), generator=torch.Generator().manual_seed(0)))
    settings = QUICK | {"steps": 60, "lr": 1e-2}
    plain, prevented, by_noise = (optimization.finetune(trained, task, at, during=one, **settings)
                                  for one in ((), wb.Recipe([2 * push]), [0.1 * noise]))  # fmt: skip
    learnt = [accuracy(trained, task, made) for made in (plain, prevented, by_noise)]
    assert learnt[0] > 0.9 and learnt[1] < 0.5 and learnt[2] > 0.9, learnt


def test_a_pass_with_something_acting_is_the_pass_of_the_model(trained):
    from workbench.steer.optimization.rows import forward

    rows = Rows.of(trained, new(completion="w8 w9 w10"), "fit")
    push = wb.Add("resid_post.1@-1", torch.randn(trained.names.d_model, generator=torch.Generator().manual_seed(0)))
    name = "model.layers.0.mlp.down_proj.weight"
    weight = dict(trained.hf.named_parameters())[name].detach()
    change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    mine = (weight + change).requires_grad_(True)
    logits = forward(trained, rows.prompts(), {name: mine}, during=[push])
    with edited(trained, wb.Delta(weights={name: change})):
        expected = trained.logits(rows.prompts(), push, positions="all")
    for own, right in zip(logits, expected, strict=True):
        torch.testing.assert_close(own[-len(right) :], right, atol=1e-4, rtol=1e-4)
    (slope,) = torch.autograd.grad(rows.nll(logits), mine)
    assert slope.norm() > 0
    (without,) = torch.autograd.grad(rows.nll(forward(trained, rows.prompts(), {name: mine})), mine)
    (nothing,) = torch.autograd.grad(rows.nll(forward(trained, rows.prompts(), {name: mine}, during=[0 * push])), mine)
    torch.testing.assert_close(nothing, without)
    assert (slope - without).norm() > 1e-3 * without.norm()


def test_early_stopping():
    leaf = torch.zeros(1, requires_grad=True)
    targets = iter([3.0, 2.0, 1.0, 1.5, 1.6, 0.1])
    seen = []

    def check():
        seen.append(leaf.detach().clone())
        return {"target": next(targets), "collateral": 0.0}

    table = learn([leaf], lambda step: (1.0, [torch.ones(1)]), check, steps=100, lr=0.1, every=1, patience=2, budget=1.0,
                  enough=0.0, what="", progress=False)  # fmt: skip
    assert len(table) == 5 and torch.equal(leaf.detach(), seen[2])  # the best, not the last


def test_decay_pulls_towards_nothing():
    leaf = torch.ones(1, requires_grad=True)
    learn([leaf], lambda step: (1.0, [torch.zeros(1)]), lambda: {"target": 1.0, "collateral": 0.0}, steps=1, lr=0.1, decay=0.5,
          budget=1.0, enough=0.0, what="", progress=False)  # fmt: skip
    assert float(leaf.detach()) == pytest.approx(1 - 0.1 * 0.5)


def test_what_stays_counts_alike_for_each_task_and_the_worst_rules(trained, monkeypatch):
    tasks = [other(), wb.Task([row | {"split": row["split"]} for row in right()], "known")]
    name = "model.layers.2.mlp.down_proj.weight"
    weight = dict(trained.hf.named_parameters())[name].detach()
    moved = {name: weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))}
    alone, both = [Keep(trained, [task], 1.0) for task in tasks], Keep(trained, tasks, 3.0)
    everything = lambda keep: float(keep.loss(moved, 999, torch.Generator().manual_seed(0)))  # noqa: E731
    assert everything(both) == pytest.approx(3 * sum(map(everything, alone)) / 2, rel=1e-3)
    collateral = [keep.collateral(moved) for keep in alone]
    assert both.collateral(moved) == max(collateral) > min(collateral)
    monkeypatch.setattr(Rows.parts, "__defaults__", (16,))  # two rows at a time
    assert both.collateral(moved) == pytest.approx(max(collateral), rel=1e-3)


def test_controls_are_the_same_tuning_of_other_weights(trained):
    made = optimization.finetune(trained, new(), ["neuron.1.3", "z.0.1"], seed=3, **QUICK)
    masks = masking.random_masks(trained, ["neuron.1.3", "z.0.1"], 3)
    drawn = made.controls["random mask"]()
    assert set(drawn.names) == set(masks) and all((drawn.difference(n)[~mask] == 0).all() for n, mask in masks.items())
    assert set(made.controls["full tuning"]().names) == {name for name, _ in trained.hf.named_parameters()}


def test_collateral_is_the_divergence_on_select_rows(trained):
    made = optimization.finetune(trained, new(), "mlp_out.2", lr=1e-2, **QUICK)
    keep = Keep(trained, [other()], 1.0)
    change = Masked(
        trained, {name: torch.ones_like(made.difference(name), dtype=torch.bool) for name in made.names}, made
    )
    prompts = other().split("select").column("clean")
    before = trained.logits(prompts)
    with edited(trained, made):
        after = trained.logits(prompts)
    expected = float(measure.kl(before, after).mean())
    assert keep.collateral(change.weights()) == pytest.approx(expected, rel=0.02, abs=1e-3)  # kept in half precision


def test_random_masks_are_as_many_and_other(trained):
    at = ["neuron.1.3", "neuron.2.7", "z.0.1"]
    own, control = masking.weight_masks(trained, at), optimization.random_masks(trained, at, seed=3)
    size = lambda masks: sum(int(mask.sum()) for mask in masks.values())  # noqa: E731
    assert size(own) == size(control)
    assert not any((mask & own[name]).any() for name, mask in control.items() if name in own)
    again = optimization.random_masks(trained, at, seed=3)
    assert all(torch.equal(mask, again[name]) for name, mask in control.items())
    different = optimization.random_masks(trained, at, seed=4)
    assert set(different) != set(control) or not all(
        torch.equal(mask, control[name]) for name, mask in different.items()
    )
    most = [f"mlp_out.{i}" for i in range(2)]  # one other block is not enough: single weights
    loose = optimization.random_masks(trained, most)
    assert size(loose) == size(masking.weight_masks(trained, most))
    made = optimization.finetune(trained, new(), control, lr=1e-2, **QUICK)
    assert all((made.difference(name)[~mask] == 0).all() for name, mask in control.items())


def test_lora_is_of_low_rank_and_is_what_was_trained(trained):
    made = optimization.lora(trained, new(), ["mlp_out.2", "attn_out.2"], rank=2, lr=2e-2, keep=(), steps=60, every=20)
    assert len(made.names) == 7
    assert all(torch.linalg.matrix_rank(made.difference(name)) <= 2 for name in made.names)
    assert accuracy(trained, new().split("select"), made) == 1
    factors = LowRank(trained, list(made.names), 2, 4.0, 0)
    assert all(
        torch.equal(weight, factors.base[name]) for name, weight in factors.weights().items()
    )  # begins with no change
    left, right = factors.factors[made.names[0]]
    with torch.no_grad():
        left += torch.randn(left.shape, generator=torch.Generator().manual_seed(0))
    change = 4.0 / 2 * left @ right  # alpha / rank
    assert torch.allclose(factors.delta().difference(made.names[0]), change)
    assert torch.allclose(factors.weights()[made.names[0]] - factors.base[made.names[0]], change, atol=1e-6)
    usual, twice, once = (
        optimization.lora(trained, new(), "mlp_out.2", rank=2, alpha=a, **QUICK) for a in (None, 4.0, 2.0)
    )
    assert usual == twice != once


@pytest.mark.parametrize("at", ["resid_post.1@cause", "resid_post.1", ["resid_post.1@-1", "resid_post.2@-1"], "z.1.0"])
def test_loreft_is_the_map_that_it_returns(trained, at):
    made = optimization.loreft(trained, new(), at, rank=2, lr=3e-2, **QUICK)
    assert isinstance(made, wb.Affine) and made.matrix.shape[0] == len(made.at)
    moved = made.matrix - torch.eye(made.matrix.shape[-1])
    assert all(torch.linalg.matrix_rank(one, rtol=1e-4) <= 2 for one in moved)
    task = new().split("select")
    last = made.history[made.history.kept].target.iloc[0]
    assert -task.score(trained, made, metric="log_prob").mean() == pytest.approx(last, rel=1e-2, abs=1e-3)
    assert last < -task.score(trained, metric="log_prob").mean()


def test_vectors(trained):
    push = optimization.steering_vector(trained, new(), "resid_post.2@-1", keep=(), steps=60, every=20)
    assert isinstance(push, wb.Add) and accuracy(trained, new().split("select"), push) == 1
    assert torch.equal((2 * push).vector, push.vector)
    several = optimization.bias_only(trained, new(), ["attn_out.2", "mlp_out.2"], **QUICK)
    assert [str(one.at[0]) for one in several] == ["attn_out.2", "mlp_out.2"]
    last = several[0].history[several[0].history.kept].target.iloc[0]
    assert -new().split("select").score(trained, wb.Recipe(several), metric="log_prob").mean() == pytest.approx(
        last, rel=1e-2
    )


def test_completions_and_texts_are_learnt_whole(trained):
    rows = Rows.of(trained, new(completion="w8 w9 w10"), "fit")
    assert all(
        ids[length:].tolist() == trained.ids("w8 w9 w10")[-3:].tolist() for ids, length in zip(rows.ids, rows.lengths)
    )
    rows = Rows.of(trained, new(completion="w9 w10"), "fit")  # does not begin with the answer: not its completion
    assert all(len(ids) == length + 1 for ids, length in zip(rows.ids, rows.lengths))
    logits = trained.logits([one[:-1] for one in rows.ids], positions="all")
    block = torch.stack([one for one in logits])
    by_hand = -torch.stack([one[-1].log_softmax(-1)[int(ids[-1])] for one, ids in zip(logits, rows.ids)]).mean()
    assert rows.nll(block) == pytest.approx(float(by_hand), rel=1e-5)
    texts = Rows.of(trained, wb.Task([{"text": "w10 w11 w12"}]))
    assert texts.lengths == [1]
    assert Rows.of(trained, wb.Task([{"text": " ".join(["w10"] * 12)}]), begun=1 / 3).lengths == [4]
    rows = Rows.of(trained, right(completion="w6 w9 w10"), "fit")  # the first word is right, the others are not
    block = torch.stack(list(trained.logits([one[:-1] for one in rows.ids], positions="all")))
    assert rows.right(block).all()
    said = torch.stack([block[:, at].log_softmax(-1)[:, word] for at, word in zip((-3, -2, -1), (6, 9, 10))])
    assert torch.allclose(rows.log_prob(block), said.sum(0), atol=1e-4)


@pytest.mark.parametrize("call, said", [
    (lambda m: optimization.finetune(m, new(), "resid_post.1", keep=()), "weights belong to"),
    (lambda m: optimization.finetune(m, new(), "neuron.1.3@-1", keep=()), "without a position"),
    (lambda m: optimization.finetune(m, new(), "bias", keep=()), "no biases"),
    (lambda m: optimization.finetune(m, new(), "z.1.0", keep=(), during=wb.Delta(weights={"a": torch.ones(2)})), "model.edited"),
    (lambda m: optimization.finetune(m, new(), "z.1.0", keep=(), during=[wb.Recipe([wb.Zero("z.1.1")], fingerprint="other")]),
     "was made for model other"),
    (lambda m: optimization.lora(m, new(), "z.1.0", keep=()), "whole blocks"),
    (lambda m: optimization.lora(m, new(), rank=99, keep=()), "rank=99"),
    (lambda m: optimization.loreft(m, new(), "neuron.1.3", keep=()), "learnt for vectors"),
    (lambda m: optimization.loreft(m, new(), "resid_post.1", rank=0, keep=()), "rank=0"),
    (lambda m: optimization.steering_vector(m, new(), ["z.1.0", "z.1.1"], keep=()), "Use bias_only"),
    (lambda m: optimization.npo(m, new(), (), beta=0), "beta=0"),
    (lambda m: optimization.finetune(m, new(), "z.1.0", steps=0), "steps=0: give a whole number from 1"),
    (lambda m: optimization.lora(m, new(), every=0), "every=0"),
    (lambda m: optimization.npo(m, new(), (), steps=2.5), "steps=2.5"),
    (lambda m: optimization.rmu(m, new(), (), "resid_post.1", batch=0), "batch=0"),
    (lambda m: optimization.relearn(m, None, new(), every=0), "every=0"),
    (lambda m: optimization.loreft(m, new(), "resid_post.1", steps=True), "steps=True"),
    (lambda m: optimization.steering_vector(m, new(), "resid_post.1", patience=0), "patience=0"),
    (lambda m: optimization.bias_only(m, new(), every=-1), "every=-1"),
    (lambda m: optimization.rmu(m, new(), (), "resid_post.2"), "blocks 0 to 1"),
])  # fmt: skip
def test_refusals(trained, call, said):
    with pytest.raises(ValueError, match=said):
        call(trained)


def test_what_is_no_component_is_said(trained):
    with pytest.raises(TypeError, match=r"written like 'z\.4\.2'.*got 3"):
        optimization.lora(trained, new(), 3)


def test_fused_experts_are_tuned_by_the_name_of_their_weights(trained_mixture):
    """lora and finetune say so; outside the mask nothing changes, and the random control draws from experts, too."""
    name, quick = "model.layers.1.mlp.experts.down_proj", {"steps": 2, "keep": (), "progress": False}
    for tune in (lambda: optimization.lora(trained_mixture, new()),
                 lambda: optimization.finetune(trained_mixture, new(), "mlp_out.*")):  # fmt: skip
        with pytest.raises(ValueError, match=r"mlp_out\.0: .*fused by expert.*'attn_out\.\*'.*experts\..*: mask"):
            tune()
    mask = torch.zeros_like(trained_mixture.hf.get_parameter(name), dtype=torch.bool)
    mask[2] = True
    made = optimization.finetune(trained_mixture, new(), {name: mask}, **quick)
    assert made.names == (name,) and made.difference(name)[2].any() and not made.difference(name)[~mask].any()
    drawn, own = (make(trained_mixture, "attn_out.*") for make in (masking.random_masks, masking.weight_masks))
    assert sum(int(one.sum()) for one in drawn.values()) == sum(int(one.sum()) for one in own.values())
    assert any(".experts." in one for one in drawn)


def right(**extra):
    """What the model knows: w4 is answered by w6."""
    return wb.Task(
        [
            dict(row, entity=str(i), split="select" if i % 4 == 0 else "fit", **extra)
            for i, row in enumerate(copying(24))
        ],
        "known",
    )


def test_npo_forgets_one_thing_and_keeps_another(trained):
    made = optimization.npo(trained, right(), [other()], "mlp_out.2", lr=1e-2, budget=1.0, steps=80)
    assert accuracy(trained, right()) == 1 and accuracy(trained, right(), made) < 0.2
    assert accuracy(trained, other(), made) > 0.9
    kept = made.history[made.history.kept].iloc[0]
    assert kept.target < 0.1


def test_npo_loss_is_that_of_the_paper_at_its_start(trained):
    """At the start p = p_ref, so that the first loss is 2/beta log 2, and the gradient that of log p."""
    mixed = [row | {"answer": "w6" if i % 2 else "w8"} for i, row in enumerate(right())]  # likely and unlikely ones
    made = optimization.npo(trained, wb.Task(mixed), (), "mlp_out.2", beta=0.5, lr=1e-6, steps=1, every=1, budget=9)
    assert made.history.loss[0] == pytest.approx(2 / 0.5 * torch.log(torch.tensor(2.0)).item(), rel=1e-4)


def test_rmu_moves_the_stream_to_one_direction_and_holds_the_rest(trained):
    made = optimization.rmu(
        trained, right(), [other()], "resid_post.1@cause", lr=2e-2, budget=2.0, steps=120, strength=3.0
    )
    assert made.names == tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(2))
    forget, keep = right().on(trained), other().on(trained)
    before = [trained.activations(x.clean, "resid_post.1@cause", spans=x.spans) for x in (forget, keep)]
    with edited(trained, made):
        after = [trained.activations(x.clean, "resid_post.1@cause", spans=x.spans) for x in (forget, keep)]
    moved = [(b - a).norm(dim=-1).mean() / a.norm(dim=-1).mean() for a, b in zip(before, after, strict=True)]
    assert moved[0] > 3 * moved[1]
    goal = after[0].mean(0)  # one direction with positive entries, three times as long as the stream was
    assert goal.norm() / before[0].norm(dim=-1).mean() == pytest.approx(3, rel=0.1) and (goal > 0).all()
    assert torch.nn.functional.cosine_similarity(after[0], goal[None], dim=-1).min() > 0.99


def test_relearning_brings_back_what_was_hidden(trained):
    hidden = optimization.npo(trained, right(), [other()], "mlp_out.2", lr=1e-2, budget=1.0, steps=80)
    table = optimization.relearn(trained, hidden, right(), steps=20, every=10, lr=1e-2)
    assert list(table.columns) == ["arm", "step", "given", "rest"] and set(table.arm) == {"taught", "shuffled"}
    taught = table[table.arm == "taught"].set_index("step")
    assert taught.rest[-1] == 1 and taught.rest[0] < 0.5
    assert taught.rest[20] > 0.9  # one rule answers all rows, so teaching half brings back the rest
    # of two entities, one of which the model never knew, one is taught and the other asked about
    two = [row | {"entity": "ab"[i % 2], "answer": ("w6", "w8")[i % 2]} for i, row in enumerate(copying(8))]
    start = optimization.relearn(trained, hidden, wb.Task(two), steps=0).iloc[0]
    assert {start.given, start.rest} == {0.0, 1.0}
    with pytest.raises(ValueError, match=r"share=1\.5"):
        optimization.relearn(trained, hidden, right(), share=1.5)


def test_the_control_of_relearning_teaches_the_form_alone(trained):
    rows = wb.Task([*right().rows, *other().rows])  # w4 is answered by w6, w5 by w7
    whole = Rows.of(trained, rows)
    mixed = _shuffled(whole, np.random.default_rng(0))
    tails = [sorted(ids[-1].item() for ids in some.ids) for some in (whole, mixed)]
    assert tails[0] == tails[1] and all(torch.equal(a[:-1], b[:-1]) for a, b in zip(whole.ids, mixed.ids))
    nothing = wb.Delta(weights={"model.layers.0.mlp.down_proj.weight": torch.zeros(32, 48)})
    table = optimization.relearn(trained, nothing, rows, steps=30, every=30, lr=1e-2).set_index(["arm", "step"])
    assert table.given["taught", 30] == 1 > 0.9 > table.given["shuffled", 30]
