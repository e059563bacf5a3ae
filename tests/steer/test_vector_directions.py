"""Other directions: components, probes, features, heads; on data whose truth is known."""

import pytest
import torch
from test_sae import make
from test_vector import labelled
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.steer import vector
from workbench.steer.vector.directions import pca_direction, probe_weights

ROWS = [row | {"split": split} for row, split in zip(copying(36), ["fit", "fit", "select", "test"] * 9, strict=True)]
TASK = wb.Task(ROWS, "copying")
RNG = torch.Generator().manual_seed(0)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_the_component_along_which_pairs_differ():
    """Pairs share large noise, which a component of all rows would follow; what differs within pairs is one direction."""
    direction = torch.nn.functional.normalize(torch.randn(16, generator=RNG), dim=0)
    shared, size = 50 * torch.randn(40, 16, generator=RNG), 1 + torch.rand(40, 1, generator=RNG)
    yes = shared + size * direction + 0.05 * torch.randn(40, 16, generator=RNG)
    no = shared - size * direction + 0.05 * torch.randn(40, 16, generator=RNG)
    assert cosine(pca_direction(yes, no), direction) > 0.99
    assert cosine(pca_direction(no, yes), -direction) > 0.99
    yes[:10] += 9 * size[:10] * direction  # far apart, these pairs
    no[:10] -= 9 * size[:10] * direction
    no[:10], yes[:10] = (
        yes[:10].clone(),
        no[:10].clone(),
    )  # the other way round in a quarter of the pairs: the majority rules
    assert cosine(pca_direction(yes, no), direction) > 0.99


def test_a_probes_direction_is_in_units_of_the_activations():
    """Two numbers that tell as much, one a hundred times as large: the larger one weighs a hundredth."""
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.cat([noise, noise.flip(1)])
    yes, no = ((side + noise) * torch.tensor([1.0, 100.0]) for side in (1, -1))
    weights = probe_weights(yes, no, 0.1)
    assert float(weights[0] / weights[1]) == pytest.approx(100, rel=1e-3) and weights[0] > 0


def test_strength_one_moves_one_mean_to_the_other_along_the_direction(trained):
    at = "resid_post.1@-1"
    yes, no = (
        trained.activations([r[side] for r in ROWS if r["split"] == "fit"], at) for side in ("clean", "corrupted")
    )
    texts = wb.Task(
        [{"text": row[side], "label": side, "split": row["split"]} for row in ROWS for side in ("clean", "corrupted")]
    )
    pushes = [fit(trained, task, at) for fit in (vector.pca, vector.probe_direction) for task in (TASK, texts)]
    for push in pushes:
        along = [x @ (push.vector / push.vector.norm()) for x in (yes, no)]
        assert float(push.vector.norm()) == pytest.approx(float(along[0].mean() - along[1].mean()), rel=1e-3)
        assert along[0].min() > along[1].max() and push.phase == "prompt"
    mean = vector.difference_of_means(trained, TASK, at).vector
    assert min(cosine(push.vector, mean) for push in pushes[:2]) > 0.9
    assert cosine(vector.pca(trained, texts, at, positive="corrupted").vector, -mean) > 0.9
    tight, loose = (vector.probe_direction(trained, TASK, at, c=c).vector for c in (1e-4, 10.0))
    assert cosine(tight, loose) < 0.999
    assert not torch.equal(*(vector.pca(trained, texts, at, seed=seed).vector for seed in (0, 1)))  # other pairs
    other = vector.probe_direction(trained, TASK, at, to="resid_post.2", unit="norm")
    assert (other.phase, other.unit, str(other.at[0])) == ("both", "norm", "resid_post.2")


def test_pushing_flips_the_answer_and_a_random_direction_does_not(trained):
    held = TASK.split("test")
    for fit in (vector.difference_of_means, vector.pca):
        push = fit(trained, TASK, "resid_post.2@-1")
        noise = torch.randn(32, generator=torch.Generator().manual_seed(5))
        noise = wb.Add(push.at, noise / noise.norm() * push.vector.norm())
        assert (held.score(trained, 1.5 * push, prompt="corrupted") > 0).mean() == 1
        assert (held.score(trained, 1.5 * noise, prompt="corrupted") > 0).mean() == 0
        assert (held.score(trained, -1.5 * push) < 0).mean() == 1


def test_a_features_decoder_row(llama):
    try:
        sae = llama.attach(make("resid_post.1"), "d")
        push = vector.feature_direction(llama, "feature.d.3", size=2.0)
        assert torch.allclose(push.vector, 2 * sae.W_dec[3]) and str(push.at[0]) == "resid_post.1"
        assert str(vector.feature_direction(llama, "feature.d.3@-1").at[0]) == "resid_post.1@-1"
        with pytest.raises(ValueError, match="no single feature"):
            vector.feature_direction(llama, "feature.d.*")
        with pytest.raises(ValueError, match="no SAE 'e'"):
            vector.feature_direction(llama, "feature.e.3")
    finally:
        llama.detach("d")


def test_function_vectors_are_what_the_best_heads_write(trained):
    fit = [row for row in ROWS if row["split"] == "fit"]
    effects = vector.indirect_effects(trained, TASK)
    assert len(effects) == 12
    best = max(effects, key=effects.get)
    mean = trained.activations([row["clean"] for row in fit], f"{best}@-1").mean(0)
    held = wb.Task(fit)
    changed = held.score(trained, wb.Replace(f"{best}@-1", mean), metric="prob", prompt="corrupted").mean()
    assert effects[best] == pytest.approx(
        changed - held.score(trained, metric="prob", prompt="corrupted").mean(), abs=1e-5
    )
    one = vector.function_vector(trained, TASK, heads=[best])
    assert torch.allclose(one.vector, mean @ trained.weight("W_O", best.layer, best.index), atol=1e-5)
    top = sorted(effects, key=effects.get, reverse=True)[:2]
    two = vector.function_vector(trained, TASK, k=2, to="resid_post.2@-1")
    parts = [vector.function_vector(trained, TASK, heads=[head]).vector for head in top]
    assert torch.allclose(two.vector, sum(parts), atol=1e-5)
    granite = wb.load(build("granite"), tokenizer=tokenizer())  # multiplies what is added to the stream
    whole = vector.function_vector(granite, TASK, heads="z.1.*").vector
    assert torch.allclose(whole, granite.activations([r["clean"] for r in fit], "attn_out.1@-1").mean(0), atol=1e-4)
    with pytest.raises(ValueError, match="heads such as"):
        vector.function_vector(trained, TASK, heads=["mlp_out.1"])
    gemma = wb.load(build("gemma2"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="goes through a norm"):
        vector.function_vector(gemma, TASK)


def turned(row):
    return row | {"clean": row["corrupted"], "corrupted": row["clean"], "spans": {}}


def test_heads_are_chosen_by_rows_that_no_probe_was_fitted_on(trained):
    """Where what is held out says the opposite, no probe is right there: split "select", else every third row of "fit"."""
    held = [turned(row) if row["split"] == "select" else row for row in ROWS]
    third = [(turned(row) if i % 3 == 0 else row) | {"split": None} for i, row in enumerate(ROWS)]
    for rows in (held, third):
        recipe = vector.inference_time_intervention(trained, wb.Task(rows), k=12)
        assert max(recipe.notes["accuracy"].values()) < 0.2
    fit = wb.Task([row for row in ROWS if row["split"] == "fit"])
    assert vector.indirect_effects(trained, wb.Task(held)) == pytest.approx(vector.indirect_effects(trained, fit))
    assert len(vector.inference_time_intervention(trained, TASK)) == 2  # of twelve heads one, in two phases


@pytest.mark.parametrize("by", ["means", "probe"])
def test_inference_time_intervention_pushes_the_heads_that_tell(trained, by):
    recipe = vector.inference_time_intervention(trained, TASK, k=2, alpha=5.0, by=by)
    assert len(recipe) == 4 and {one.phase for one in recipe} == {"prompt", "generation"}
    assert len(recipe.notes["accuracy"]) == 2 and min(recipe.notes["accuracy"].values()) == 1
    fit = [row for row in ROWS if row["split"] == "fit"]
    for one in recipe:
        if one.phase == "prompt":
            z = trained.activations([row[side] for side in ("clean", "corrupted") for row in fit], one.at[0])
            theta = one.vector / one.vector.norm()
            assert float(one.vector.norm()) == pytest.approx(float((z @ theta).std()), rel=1e-4)
            assert (z[: len(fit)] @ theta).mean() > (z[len(fit) :] @ theta).mean()
    held = TASK.split("test")
    gain = held.score(trained, recipe, prompt="corrupted") - held.score(trained, prompt="corrupted")
    assert (gain > 0).all()
    with pytest.raises(ValueError, match="12 heads"):
        vector.inference_time_intervention(trained, TASK, k=13)
    with pytest.raises(ValueError, match="'means' or 'probe'"):
        vector.inference_time_intervention(trained, TASK, by="pca")


def test_refusals(llama, word_pairs):
    for fit in (vector.pca, vector.probe_direction, vector.set_to_mean):
        with pytest.raises(ValueError, match=r"do not differ at resid_post\.1@0"):
            fit(llama, word_pairs, "resid_post.1@0")
        with pytest.raises(ValueError, match="family"):
            fit(llama, labelled(), "resid_post.*@-1")
        with pytest.raises(ValueError, match="two labels"):
            fit(llama, wb.Task([{"text": "w5"}]), "resid_post.1@-1")
