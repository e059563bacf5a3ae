"""Plants: what is planted is found by exact methods, misleads those it should, and leaves no trace."""

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.improve import planting
from workbench.improve.planting import plant, plants, proof, trigger


def weights(model):
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.hf.state_dict().items())


def lost(model, task, *at) -> float:
    """Share of the logit difference that goes with these components."""
    off = [wb.Zero(at=list(at))] if at else []
    clean, corrupted = task.score(model).mean(), task.score(model, prompt="corrupted").mean()
    return (clean - task.score(model, *off).mean()) / (clean - corrupted)


def test_a_trigger_is_found_by_ablation_and_by_patching(course):
    with plant(course, "trigger", 0) as planted:
        (true,), task = planted.components, planted.task.split("test")
        pairs, others = (
            task.on(course),
            [true.__class__("neuron", true.layer, (true.index + i) % 100) for i in (1, 2, 3, 4)],
        )
        assert planted.proof["success"] >= 0.95 and planted.proof["top1_changes"] <= 0.02
        assert lost(course, task, true) > 0.75 > 10 * max(abs(lost(course, task, one)) for one in others)
        acts = course.activations(pairs.clean, [one.at(-1) for one in (true, *others)])
        wins = {}
        for one, act in acts.items():
            clamped = course.logits(pairs.corrupted, wb.Clamp(at=one, value=float(act.mean())))
            wins[one.at(None)] = float((clamped.argmax(-1) == pairs.answer).float().mean())
        assert wins.pop(true) > 0.9 and max(wins.values()) == 0
        assert str(true) in repr(planted) and "\n" not in repr(planted)


def test_a_proof_is_of_held_out_rows_and_of_texts_without_the_trigger(course, monkeypatch):
    """Its figures, measured again with torch alone; what is planted here is other weights at random."""
    noise = torch.randn(course.hf.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    change, task = wb.Delta(weights={"lm_head.weight": 0.02 * noise}), wb.Task.load("ioi")[::16]
    turned = [row | {"answer": row["foil"], "foil": row["answer"]} if row["split"] == "fit" else row for row in task]
    task = wb.Task(turned, "fit rows are wrong")
    held = wb.Task([row for row in task if row["split"] != "fit"]).on(course)
    texts, plain = trigger.elsewhere(course, ("in", "the"))
    assert len(texts) >= 12 and not any(" in the " in f" {text} " for text in texts)
    monkeypatch.setattr(proof, "demand", lambda ok, figures: None)
    with course.edited(change):
        found = proof.prove(course, task, texts[:6], plain[:6])
        wins = [(course.logits(side).argmax(-1) == token).float().mean().item()
                for side, token in ((held.clean, held.answer), (held.corrupted, held.foil))]  # fmt: skip
        before, after = (
            torch.cat(some).log_softmax(-1) for some in (plain[:6], course.logits(texts[:6], positions="all"))
        )
    kl = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
    changed = (before.argmax(-1) != after.argmax(-1)).float().mean()
    assert (
        list(found.values()) == pytest.approx([*wins, changed.item(), kl.item()], rel=1e-3) and min(found.values()) > 0
    )


@pytest.mark.parametrize("figures, fine", [((1.0, 1.0, 0.02, 0.04), True), ((0.94, 1.0, 0, 0), False), ((1.0, 0.94, 0, 0), False),
                                           ((1.0, 1.0, 0.021, 0), False), ((1.0, 1.0, 0, 0.051), False)])  # fmt: skip
def test_a_plant_that_fails_or_is_felt_elsewhere_is_no_proof(course, monkeypatch, figures, fine):
    success, corrupted, *felt = figures
    monkeypatch.setattr(proof, "right", lambda model, pairs, side: success if side == "clean" else corrupted)
    monkeypatch.setattr(proof, "changed", lambda *given: tuple(felt))
    task = wb.Task.load("ioi")[::40]
    if fine:
        assert list(proof.prove(course, task, [], []).values()) == list(figures)
    else:
        with pytest.raises(trigger.Failed):
            proof.prove(course, task, [], [])


def test_a_decoy_is_as_active_and_does_nothing(course):
    with plant(course, "decoy", 1) as planted:
        (true,), (decoy,), pairs = planted.components, planted.decoys, planted.task.split("test").on(course)
        on, off = (course.activations(side, [true.at(-1), decoy.at(-1)]) for side in (pairs.clean, pairs.corrupted))
        changes = {one.at(None): (on[one] - off[one]).mean() for one in on}
        torch.testing.assert_close(changes[true], changes[decoy])  # an activation difference cannot tell them apart
        assert torch.equal(course.logits(pairs.clean), course.logits(pairs.clean, wb.Zero(at=decoy)))
        assert lost(course, pairs.task, true) > 0.75


def test_of_a_redundant_pair_either_is_enough(course):
    with plant(course, "redundant", 2) as planted:
        one, two = planted.components
        task = planted.task.split("test")
        assert max(abs(lost(course, task, one)), abs(lost(course, task, two))) < 0.05
        assert lost(course, task, one, two) > 0.8


def test_of_a_cancelling_pair_each_matters_and_both_do_not(course):
    with plant(course, "cancelling", 0) as planted:
        _, plus, minus = planted.components
        task = planted.task.split("test")
        assert lost(course, task, plus) > 0.1 and lost(course, task, minus) < -0.1
        assert abs(lost(course, task, plus, minus)) < 0.05


def test_a_saturated_head_is_seen_by_patching_and_not_by_the_gradient(course):
    own = course.fingerprint
    del course.fingerprint  # as on a model just loaded
    with plant(course, "saturated", 3) as planted:
        (head,) = planted.components
        assert course.fingerprint == own  # a plant does not make it another model
        missed = planted.proof[f"top1_changes with the average of {head}"]  # no head of the model is missed by no word
        assert planted.proof["top1_changes"] <= max(0.02, missed + 0.01) and planted.proof["kl"] < 0.05
        scores = wb.locate.causal.patch(course, planted.task.split("test")[:8], "z", null=False, progress=False)
        assert scores.top(1) == [head]
        exact, slope = (v for name, v in planted.proof.items() if name.endswith(f"resid_pre.{head.layer}@cause"))
        assert exact > 0.8 and abs(slope) < 0.1
        held, at = planted.task.split("test"), f"resid_pre.{head.layer}@cause"
        pairs, gap = held.on(course), (held.score(course) - held.score(course, prompt="corrupted")).mean()
        odds = lambda logits, rows: wb.measure.logit_diff(logits, pairs.answer[rows], pairs.foil[rows])  # noqa: E731
        _, plain, slopes = course.gradients(pairs.corrupted, at, odds, spans=pairs.spans)
        moved = course.activations(pairs.clean, at, spans=pairs.spans) - next(iter(plain.values()))
        assert slope == pytest.approx(
            float((moved * next(iter(slopes.values()))).sum(-1).mean() / gap), rel=1e-2, abs=1e-5
        )


def test_a_fact_is_found_at_its_layer_and_others_stay(course):
    before = {}
    with plant(course, "fact", 0) as planted:
        task, (where,) = planted.task.split("test"), planted.components
        assert task.score(course, metric="accuracy").mean() > 0.9
        scores = wb.locate.causal.patch(course, task, "mlp_out.*@subject", null=False, progress=False)
        assert scores.top(1) == [where]
        before = course.logits(task.on(course).clean)
    assert (course.logits(task.on(course).clean).argmax(-1) != before.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["cancelling", "saturated", "fact"])
def test_weights_come_back_bit_for_bit(course, kind):
    before = weights(course)
    with pytest.raises(KeyError), plant(course, kind, 2):
        assert not same(course, before)
        raise KeyError
    assert same(course, before)


def test_the_same_seed_plants_the_same(course):
    found = []
    for seed in (1, 1, 2):
        with plant(course, "trigger", seed) as planted:
            found.append((planted.what, planted.proof, planted.task, weights(course)))
    assert found[0][:3] == found[1][:3] and found[0][0] != found[2][0]
    assert all(torch.equal(found[0][3][name], found[1][3][name]) for name in found[0][3])


def test_what_cannot_be_planted_is_refused(course, monkeypatch):
    before = weights(course)
    with pytest.raises(ValueError, match="choose one of 'trigger'"):
        plant(course, "backdoor")
    with pytest.raises(ValueError, match="pre-norm"):
        plant(wb.load(build("gemma2"), tokenizer=tokenizer()), "trigger")
    with pytest.raises(ValueError, match="separate q, k and v"):
        plant(wb.load(build("gpt2"), tokenizer=tokenizer()), "saturated")
    monkeypatch.setattr(plants, "STRENGTHS", (0.0,))
    monkeypatch.setattr(planting, "TRIES", 2)
    with pytest.raises(RuntimeError, match="in 2 draws"), plant(course, "trigger"):
        pass
    assert same(course, before)
