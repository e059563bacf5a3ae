"""Amplitudes: what the constructors compute, known truth, controls, refusals."""

import numpy as np
import pytest
import torch
from test_sae import make
from tiny import copying

import workbench as wb
from workbench.locate.circuit import Circuit
from workbench.steer import amplitude

ROWS = [row | {"split": split} for row, split in zip(copying(24), ["fit", "select", "test"] * 8, strict=True)]
TASK = wb.Task(ROWS, "copying")


def scores_of(components, values, null=0.5, **columns):
    n = np.full(len(values), np.nan)
    return wb.Scores([wb.Component.parse(one) for one in components], np.array(values), n, n, np.full(len(values), null),
                     np.zeros((len(values), 2)), "by hand", "x", columns=columns)  # fmt: skip


def test_components_come_from_scores_or_are_taken_as_they_are():
    scores = scores_of(["z.0.1", "z.1.2", "z.2.0"], [0.9, -1.5, 0.1])
    assert amplitude.zero(scores) == wb.Zero(["z.1.2", "z.0.1"])
    assert amplitude.zero(scores, 3) == wb.Zero(["z.1.2", "z.0.1", "z.2.0"])
    assert amplitude.scale(["z.0.1", "z.0.2@-1"], 0.5, phase="prompt") == wb.Scale(
        ["z.0.1", "z.0.2@-1"], 0.5, phase="prompt"
    )
    assert amplitude.skip([1, 0]) == wb.Zero(["attn_out.1", "mlp_out.1", "attn_out.0", "mlp_out.0"])
    with pytest.raises(ValueError, match="above its null"):
        amplitude.zero(scores_of(["z.0.1"], [0.1]))
    with pytest.raises(ValueError, match="k=2"):
        amplitude.zero("z.0.1", 2)


def test_means_and_resamples_are_activations_of_the_fit_rows(trained):
    fit = [row for row in ROWS if row["split"] == "fit"]
    prompts = [row["clean"] for row in fit] + [row["corrupted"] for row in fit]
    mean = amplitude.mean(trained, TASK, ["z.1.0@2", "z.2.3"])
    first = trained.activations(prompts, "z.1.0@2").mean(0)
    second = trained.activations(prompts, "z.2.3").mean((0, 1))
    assert mean.phase == "prompt" and amplitude.mean(trained, TASK, "z.2.3", phase="generation").phase == "generation"
    assert isinstance(mean, wb.Mean) and torch.allclose(mean.values, torch.stack([first, second]), atol=1e-5)
    drawn = amplitude.resample(trained, TASK, ["mlp_out.1@-1"], seed=3)
    every = trained.activations(prompts, "mlp_out.1@-1")
    assert (every - drawn.values).abs().amax(1).min() < 1e-5
    different = {tuple(amplitude.resample(trained, TASK, "mlp_out.1@-1", seed=s).values[0].tolist()) for s in range(8)}
    assert len(different) > 2
    numbers = amplitude.mean(trained, TASK, ["neuron.1.3", "neuron.1.4"])
    assert numbers.values.shape == (2,)
    both = amplitude.mean(trained, TASK, ["z.1.0", "mlp_out.1"])
    assert [type(one) for one in both] == [wb.Mean, wb.Mean] and isinstance(both, wb.Recipe)
    assert torch.isfinite(trained.logits(prompts, both, numbers, drawn)).all()


def test_the_mean_of_the_cause_takes_the_answer_away(trained):
    """The stream at the causing word at its mean over both sides: no row can know its answer any more."""
    held = TASK.split("test")
    assert held.score(trained, metric="accuracy").mean() == 1
    off = amplitude.mean(trained, TASK, "resid_pre.0@2")
    margin = held.score(trained, off)
    assert margin.std() < 0.7 * abs(held.score(trained)).mean()
    assert abs(margin - held.score(trained, off, prompt="corrupted")).max() < 1e-3


def test_holding_at_the_most(trained):
    prompts = [row[side] for row in ROWS if row["split"] == "fit" for side in ("clean", "corrupted")]
    held = amplitude.clamp_to_max(trained, TASK, ["neuron.1.3", "neuron.2.7@-1"], -2.0)
    most = trained.activations(prompts, "neuron.1.3").max(), trained.activations(prompts, "neuron.2.7@-1").max()
    assert torch.allclose(held.values, -2 * torch.stack(most), atol=1e-4)
    seen = trained.activations(prompts[:2], "neuron.1.3", held)
    assert torch.allclose(seen, held.values[0].expand_as(seen))
    assert amplitude.clamp("neuron.1.3", 2) == wb.Clamp("neuron.1.3", 2.0)
    with pytest.raises(ValueError, match="is a vector"):
        amplitude.clamp("z.1.3", 2)
    mixed = wb.Task([{"text": f"w11 {text}" if i % 3 == 0 else text} for i, text in enumerate(prompts[:6])])
    own = [trained.activations([row["text"]], "neuron.1.*") for row in mixed]  # one by one, without padding
    every = torch.cat([torch.stack([x[0] for x in seen.values()], 1) for seen in own])
    held = amplitude.clamp_to_max(trained, mixed, "neuron.1.*").values
    assert torch.allclose(held, every.amax(0), atol=1e-5) and (held < every.abs().amax(0) - 0.01).any()  # no |most|
    try:
        trained.attach(make("resid_post.1"), "d")
        held = amplitude.clamp_to_max(trained, TASK, "feature.d.5", 1.0)
        assert float(held.values) == pytest.approx(float(trained.activations(prompts, "feature.d.5").max()), abs=1e-5)
    finally:
        trained.detach("d")


def test_suppression_goes_by_selectivity(trained):
    auroc = [1.0, 0.75, 0.5, 0.2]
    scores = scores_of([f"neuron.1.{i}" for i in range(4)], [1.0, 0.5, 0.0, -1.0], auroc=np.array(auroc))
    assert amplitude.suppress(trained, scores) == wb.Scale(["neuron.1.0", "neuron.1.1"], [0.0, 0.5])
    assert amplitude.suppress(trained, scores, share=0.5) == wb.Scale(["neuron.1.0", "neuron.1.1"], [0.5, 0.75])
    found = amplitude.suppress(trained, TASK, "neuron.2.*", statistic="mean")
    contrast = wb.locate.magnitude.contrast(trained, TASK.split("fit"), "neuron.2.*", null=False, draws=2)
    selective = dict(zip(map(str, contrast.components), contrast.columns["auroc"], strict=True))
    assert found.factor == pytest.approx([1 - max(0, 2 * selective[str(one)] - 1) for one in found.at])
    assert set(map(str, found.at)) == {name for name, value in selective.items() if value > 0.5}
    x = torch.ones(1, 1, len(found.at), 1)
    assert torch.allclose(found.changes(x, list(range(len(found.at)))).flatten(), torch.tensor(found.factor).float())
    with pytest.raises(ValueError, match="auroc"):
        amplitude.suppress(trained, scores_of(["z.0.1"], [1.0]))
    with pytest.raises(ValueError, match="nothing to turn down"):
        amplitude.suppress(trained, scores_of(["neuron.0.1"], [1.0], auroc=np.array([0.4])))


def test_experts_are_suppressed_by_their_weights(trained_mixture):
    found = amplitude.suppress(trained_mixture, TASK, "expert.*.*", statistic="mean")
    contrast = wb.locate.magnitude.contrast(trained_mixture, TASK.split("fit"), "expert.*.*", null=False, draws=2)
    auroc = dict(zip(contrast.components, contrast.columns["auroc"], strict=True))
    assert found.factor == pytest.approx([1 - max(0, 2 * auroc[one] - 1) for one in found.at]) and len(found.at) > 1
    text, (one, *_) = ROWS[0]["clean"], sorted(found.at)
    before, after = (trained_mixture.activations(text, one, *change) for change in ((), (found,)))
    assert torch.allclose(after, found.factor[found.at.index(one)] * before)
    held = amplitude.clamp_to_max(trained_mixture, TASK, [one])
    assert torch.allclose(trained_mixture.activations(text, one, held), held.values)


def test_heads_that_must_not_look_at_the_cause(trained):
    held = TASK.split("test")
    blind = amplitude.attend("z.*.*", "cause")
    assert abs(held.score(trained, blind) - held.score(trained, blind, prompt="corrupted")).max() < 1e-3
    assert amplitude.attend(["z.1.0", "attn_scores.1.1@-1"], 2, 100.0, query=-1) == wb.Attend(
        ["attn_scores.1.0@-1", "attn_scores.1.1@-1"], 2, 100.0)  # fmt: skip
    with pytest.raises(ValueError, match="does not attend"):
        amplitude.attend("mlp_out.1", 2)


def test_a_circuit_alone_and_a_model_without_it(trained):
    circuit = Circuit.of(trained, ["embed -> q.0.1", "z.0.1 -> mlp_out.1", "mlp_out.1 -> logits"])
    alone, without = amplitude.keep(trained, TASK, circuit), amplitude.cut(trained, TASK, circuit)
    inside, outside = ({str(c) for one in recipe for c in one.at} for recipe in (without, alone))
    assert inside == {"z.0.1", "mlp_out.1"} and not inside & outside and len(outside) == 3 * 4 + 3 - 2
    assert not torch.equal(trained.logits(ROWS[0]["clean"], alone), trained.logits(ROWS[0]["clean"], without))
    with pytest.raises(ValueError, match="between two components"):
        amplitude.cut(trained, TASK, "z.0.1 -> mlp_out.1")
    with pytest.raises(ValueError, match="no head and no FFN"):
        amplitude.cut(trained, TASK, Circuit.of(trained, ["embed -> logits"]))


def test_random_components_are_alike_and_others(trained):
    given = ["z.1.0@-1", "z.1.1", "neuron.2.5", "mlp_out.0"]
    drawn = amplitude.random_like(given, trained, seed=1)
    assert drawn == amplitude.random_like(given, trained, seed=1) != amplitude.random_like(given, trained, seed=2)
    assert [(one.kind, one.position) for one in drawn] == [("z", -1), ("z", None), ("neuron", None), ("mlp_out", None)]
    assert [one.layer for one in drawn[:3]] == [1, 1, 2] and not set(map(str, drawn)) & set(given)
    with pytest.raises(ValueError, match="not as many other"):
        amplitude.random_like("mlp_out.*", trained)
    with pytest.raises(ValueError, match="not as many other"):
        amplitude.random_like("ln_final", trained)
