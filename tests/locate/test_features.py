"""Training, measuring and finding features: planted dictionaries are recovered, nulls hold, controls stay behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench import measure
from workbench.locate import features
from workbench.locate.features.contexts import promoted
from workbench.locate.features.effects import _alike
from workbench.locate.features.evaluation import _arms
from workbench.locate.features.tokens import activations, texts
from workbench.locate.features.training import dead_loss
from workbench.sae import SAE

D, N = 32, 64


@pytest.fixture(scope="module")
def planted():
    """Activations made of 64 known directions in 32 dimensions, three at a time, with an offset; the directions."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(N, D, generator=rng), dim=1)
    active = torch.rand(30_000, N, generator=rng) < 3 / N
    f = active * (0.5 + torch.rand(active.shape, generator=rng))
    return 5 * (f @ directions + 0.3), directions


def match(directions, rows) -> float:
    """Mean cosine between true and found directions, each matched to one (mean correlation coefficient)."""
    from scipy.optimize import linear_sum_assignment

    cosine = (directions @ torch.nn.functional.normalize(rows, dim=1).T).numpy()
    return cosine[linear_sum_assignment(-cosine)].mean()


@pytest.mark.parametrize("architecture, least", [("batchtopk", 0.8), ("topk", 0.9), ("jumprelu", 0.8)])
def test_planted_directions_are_recovered(planted, architecture, least):
    x, directions = planted
    sae = features.fit(x, d_sae=N, k=3, architecture=architecture, steps=800, batch=512, lr=1e-2)
    assert match(directions, sae.W_dec) > least
    assert match(directions, torch.randn(N, D, generator=torch.Generator().manual_seed(1))) < 0.5
    f = sae.encode(x[:3000])
    assert 2 < (f > 0).float().sum(1).mean() < 4.5
    left = (x[:3000] - sae.decode(f)).pow(2).sum() / (x[:3000] - x[:3000].mean(0)).pow(2).sum()
    assert left < 0.2
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N), atol=1e-5) and sae.architecture == architecture
    given = {"d_sae": N, "k": 3, "architecture": architecture, "steps": 30, "batch": 512}
    ways = ((1, 0), (1, 0), (1, 1), (2, 0))
    again, twice, other, double = (features.fit(c * x, seed=seed, **given) for c, seed in ways)
    assert torch.allclose(double.encode(2 * x[:99]), 2 * again.encode(x[:99]), rtol=1e-4, atol=1e-4)  # of any scale
    assert torch.equal(again.W_enc, twice.W_enc) and not torch.equal(again.W_enc, other.W_enc)


def test_dead_features_come_back(planted):
    x, _ = planted
    pre = torch.randn(100, 20, requires_grad=True)
    rows = torch.nn.functional.normalize(torch.randn(20, D), dim=1)
    dead = torch.arange(20) < 6
    dead_loss(x[:100], pre, rows, dead).backward()
    assert (pre.grad[:, :6].abs().sum() > 0) and (pre.grad[:, 6:] == 0).all()
    assert dead_loss(x[:100], pre, rows, torch.zeros(20, dtype=torch.bool)) == 0


def test_training_says_what_it_cannot_do(trained, planted):
    x, _ = planted
    wrong = {"architecture": "gated"}, {"k": 64}, {"batch": 10**6}
    for settings, said in zip(wrong, ("batchtopk, topk, jumprelu", "k=64", "fewer")):
        with pytest.raises(ValueError, match=said):
            features.fit(x, d_sae=N, **settings)
    with pytest.raises(ValueError, match="one tensor at all positions"):
        features.train(trained, noise(), "z.*.*")
    with pytest.raises(ValueError, match="can be read by this model"):
        features.train(trained, ["zebra", "unicorn"])


# in a model: the tiny one that answers w6 after a w4 at position 2, w7 after w5 (tiny.trained)


def noise(n=60, seed=5, cause=True):
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        words = [f"w{k}" for k in rng.integers(10, 64, 7)]
        words[2] = ("w4", "w5")[i % 2] if cause else words[2]
        found.append(" ".join(words))
    return found


def copying():
    from tiny import copying as rows

    return wb.Task(rows(20), "copying")


def axes(model, at="resid_post.2", name="axes") -> SAE:
    """A dictionary with a known answer: both ways along orthogonal directions, the first of which is what the model
    uses to tell w6 from w7."""
    own = model.weight("W_U")[:, 6] - model.weight("W_U")[:, 7]
    own = own * model.hf.model.norm.weight.detach()
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.cat([own[:, None], torch.randn(32, 31, generator=rng)], 1)).Q.T
    basis[0] *= torch.sign(basis[0] @ own)
    rows = torch.cat([basis, -basis])
    return SAE(rows.T.clone(), torch.zeros(64), rows, torch.zeros(32), at=at, name=name)


@pytest.fixture
def model(trained):
    yield trained
    trained.detach()


@pytest.mark.parametrize("by", ["difference", "auroc", "attribution", "output"])
def test_the_feature_that_does_it_is_found(model, by, tmp_path):
    sae = model.attach(axes(model))
    scores = features.find(model, copying(), sae, by)
    assert scores.method == f"features.{by}" and scores.n in (20, 40) and scores.kind == "feature"
    assert str(scores.top(1)[0]) in ("feature.axes.0@-1", "feature.axes.32@-1")
    best = scores["feature.axes.0@-1"]
    assert best > 0 and best > scores.null_p95[scores._index("feature.axes.0@-1")]
    assert scores.ci_lo[scores._index("feature.axes.0@-1")] > 0 and scores.cost > 1
    again = features.find(model, copying(), "axes", by)
    assert np.array_equal(scores.values, again.values) and np.array_equal(scores.null_p95, again.null_p95)
    pairs, k = copying().on(model), scores._index("feature.axes.0@-1")
    clean, corrupted = (model.activations(side, "feature.axes.0@-1") for side in (pairs.clean, pairs.corrupted))
    assert scores.columns["mean"][k] == pytest.approx(float(clean.mean()), rel=1e-4)
    assert scores.columns["mean_other"][k] == pytest.approx(float(corrupted.mean()), rel=1e-4, abs=1e-6)
    if by != "output":
        assert scores.columns["active"][k] == (clean > 0).float().mean()
        assert scores.columns["active_other"][k] == (corrupted > 0).float().mean()
    if by == "auroc":
        assert best == pytest.approx(1) and np.abs(scores.values).max() <= 1
    if by == "output":
        assert (scores.columns["null_max"] >= scores.null_p95 - 1e-9).all() and scores.clean > scores.corrupted
        assert scores.columns["clamped_to"][k] == pytest.approx(float(max(clean.max(), corrupted.max())), rel=1e-4)
        other = scores._index("feature.axes.32@-1")  # it is the corrupted side's
        given = model.activations(pairs.corrupted, "feature.axes.32@-1").max()
        assert scores.columns["clamped_to"][other] == pytest.approx(float(given), rel=1e-4)
        two = features.find(model, copying(), sae, by, candidates=2).components
        assert {one.index for one in two} == {0, 32}, "those that differ most, either way"
    back = type(scores).load(scores.save(tmp_path / "scores"))
    assert back.components == scores.components and np.array_equal(back.columns["null_max"], scores.columns["null_max"])


@pytest.mark.parametrize("make", [lambda model: axes(model), lambda model: normed(model, "resid_post.2", "axes")])
def test_attribution_is_exact_where_the_rest_is_linear(model, make):
    sae = model.attach(make(model))

    def metric(logits, answer, foil):  # the change of one logit is nearly linear in a small step
        return logits[:, 6] - logits[:, 7]

    scores = features.find(model, copying(), sae, "attribution", metric=metric)
    pairs = copying().on(model)
    j = scores.top(1)[0].index
    at = sae.feature(j).at(-1)
    f = {side: model.activations(getattr(pairs, side), at) for side in ("clean", "corrupted")}
    base = model.logits(pairs.clean)
    small = 1e-2
    for i in range(3):
        new = f["clean"][i] + small * (f["corrupted"][i] - f["clean"][i])
        moved = model.logits(pairs.clean, wb.Clamp(at, float(new)))
        exact = (metric(base, None, None) - metric(moved, None, None))[i] / small
        assert float(exact) == pytest.approx(scores.per_prompt[scores._index(at), i], rel=0.05, abs=0.02)


@pytest.mark.parametrize("by", ["difference", "auroc", "attribution"])
def test_nulls_hold_where_there_is_nothing(model, by):
    sae = model.attach(axes(model, "resid_post.0"))
    rng, rows = np.random.default_rng(3), []
    for one, two in zip(noise(30, 6, cause=False), noise(30, 7, cause=False)):
        rows.append({"clean": one, "corrupted": two, "answer": "w20", "foil": f"w{rng.integers(30, 60)}"})
    scores = features.find(model, wb.Task(rows), sae, by)
    beyond = np.mean(np.abs(scores.values) > scores.null_p95)
    assert beyond < 0.2 and np.mean(np.abs(scores.values) > scores.columns["null_max"]) < 0.05


def test_labelled_texts_and_whole_prompts(model):
    sae = model.attach(axes(model))
    rows = [{"text": text, "label": "four" if " w4 " in text else "five"} for text in noise(40)]
    for position in (-1, None):
        scores = features.find(model, wb.Task(rows), sae, "auroc", position=position)
        assert scores.n == 40 and scores.columns["active"].max() <= 1
        assert (str(scores.components[0]).endswith("@-1")) == (position == -1)
    x = [model.activations([row["text"]], "resid_post.2")[0] for row in rows]
    largest = torch.stack([sae.encode(one)[1:].amax(0) for one in x])
    scores = features.find(model, wb.Task(rows), sae, position=None)
    for i, one in enumerate(scores.components[:8]):  # over all tokens but the first; the first row's side comes first
        wanted = torch.cat([largest[::2], largest[1::2]])[:, one.index]
        assert np.allclose(scores.per_prompt[i], wanted, rtol=1e-4, atol=1e-5)
    at_end = features.find(model, wb.Task(rows), sae, "auroc")
    assert at_end["feature.axes.0@-1"] == pytest.approx(1) and features.find(
        model, wb.Task(rows), sae, "auroc", positive="five")["feature.axes.0@-1"] == pytest.approx(-1)  # fmt: skip
    assert str(features.find(model, copying(), sae, position="cause").components[0]).endswith("@cause")
    spans = [row | {"spans": {"both": " ".join(row["clean"].split()[2:4])}} for row in copying()]
    both, *each = (features.find(model, wb.Task(spans), sae, position=at) for at in ("both", 2, 3))
    for i, one in enumerate(both.components):  # of a span its mean
        parts = [some.columns["mean"][some._index(one.at(p))] if one.at(p) in some.components else 0
                 for p, some in zip((2, 3), each)]  # fmt: skip
        assert both.columns["mean"][i] == pytest.approx(np.mean(parts), rel=1e-4)


def test_find_says_what_is_missing(model):
    sae = axes(model)
    with pytest.raises(ValueError, match=r"not attached.*Type: sae = model\.attach\(sae\)"):
        features.find(model, copying(), sae)
    model.attach(sae)
    texts = wb.Task([{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(noise(8))])
    for task, settings, said in [(copying(), {"by": "size"}, "'difference', 'auroc'"), (texts, {"by": "output"}, "needs pairs"),
                                 (texts, {"positive": "c"}, "positive='c'"), (texts, {"position": "end"}, "no spans"),
                                 (copying(), {"by": "attribution", "position": None}, "one position")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            features.find(model, task, sae, **settings)
    silent = replace(sae, b_enc=torch.full((64,), -1e6), name="silent")
    with pytest.raises(ValueError, match="No feature of 'silent' fires"):
        features.find(model, copying(), model.attach(silent))


def test_an_effect_stands_beside_its_controls(model, monkeypatch):
    model.attach(axes(model))
    pushed, levels = [], []

    monkeypatch.setattr(features.effects, "Add", lambda *given: pushed.append(wb.Add(*given)) or pushed[-1])
    monkeypatch.setattr(features.effects, "_alike", lambda level, *of: levels.append(level) or _alike(level, *of))
    found = features.effect(model, copying(), ["feature.axes.0@-1"], factor=-1)
    table, pairs = found.frame, copying().on(model)
    base, after = (model.logits(pairs.clean, *change) for change in ((), (wb.Scale("feature.axes.0@-1", -1),)))
    assert table.kl["features"] == pytest.approx(float(measure.kl(base, after).mean()), rel=1e-4)
    gaps = [measure.logit_diff(model.logits(pairs.clean, *change), pairs.answer, pairs.foil).mean().item()
            for change in ((), *([one] for one in pushed))]  # fmt: skip
    changes = np.array(gaps[1:]) - gaps[0]
    assert table.change["difference of means"] == pytest.approx(changes[0], abs=1e-4) and changes[0] < -1, "against it"
    assert table.change["random direction"] == pytest.approx(max(changes[1:], key=abs), abs=1e-4) and len(changes) == 6
    mean = torch.stack(list(model.activations(pairs.clean, "feature.axes.*@-1").values())).mean(1)
    assert all(torch.allclose(level, mean, atol=1e-4) for level in levels) and len(levels) == 5
    monkeypatch.undo()
    assert list(table.index) == ["features", "other features", "difference of means", "random direction"]
    assert table.loc["features", "change"] < -1 and table.loc["features", "ci_hi"] < 0
    assert abs(table.loc["random direction", "change"]) < abs(table.loc["features", "change"])
    none = features.effect(model, copying(), ["feature.axes.0@-1"], factor=1).frame
    assert none.loc["features", "change"] == 0 and none.loc["features", "kl"] == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="features of one SAE at one position"):
        features.effect(model, copying(), ["feature.axes.0@-1", "feature.axes.1@2"])
    with pytest.raises(ValueError, match="at one position"):
        features.effect(model, copying(), "feature.axes.0")
    assert "logit_diff" in repr(found) and found.plot().axes


def test_measures_of_a_perfect_and_of_an_empty_dictionary(model):
    texts = noise(24, 9)
    perfect = features.evaluate(model, axes(model, "resid_post.1"), texts)
    row = perfect.frame.loc["sae"]
    assert row["explained_variance"] == pytest.approx(1, abs=1e-5) and row["cosine"] == pytest.approx(1, abs=1e-5)
    assert abs(row["loss_change"]) < 1e-4 and row["kl"] < 1e-5 and row["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert row["l0"] == pytest.approx(32, abs=0.1) and row["dead"] == (perfect.density == 0).mean()
    assert perfect.frame.loc["pca", "explained_variance"] == pytest.approx(1, abs=1e-4)
    empty = replace(axes(model, "resid_post.1"), b_enc=torch.full((64,), -1e6))
    row = features.evaluate(model, empty, texts).frame
    assert row.loc["sae", "dead"] == 1 and row.loc["sae", "l0"] == 0
    assert row.loc["sae", "kl"] == pytest.approx(row.loc["zero", "kl"], rel=1e-5)
    assert row.loc["mean", "explained_variance"] == pytest.approx(0, abs=1e-5)
    assert row.loc["mean", "recovered_from_mean"] == row.loc["zero", "loss_recovered"] == 0
    assert model.saes == {} and perfect.plot().axes and "dead" in repr(perfect)


def test_replacing_is_what_an_intervention_does(model):
    sae = axes(model, "resid_post.1")
    sae = replace(sae, architecture="topk", k=5)
    texts = [*noise(3, 11), "w10 w11 w4 w12 w13 w14 w15 w16 w17 w18 w19"]  # long texts count as much as they are long
    base, new = model.logits(texts, positions="all"), []
    for text in texts:
        x = model.activations([text], "resid_post.1")
        made = sae.decode(sae.encode(x), x)[0]
        change = [wb.Replace(f"resid_post.1@{i}", made[i]) for i in range(1, len(made))]
        new.append(model.logits([text], *change, positions="all")[0])
    ids = [model.ids(text) for text in texts]

    def loss(logits):
        return float(torch.nn.functional.cross_entropy(torch.cat([one[1:-1] for one in logits]), after))

    after, found = torch.cat([own[2:] for own in ids]), features.evaluate(model, sae, texts)
    row = found.frame.loc["sae"]
    assert row["loss_change"] == pytest.approx(loss(new) - loss(base), abs=1e-4)
    assert found.loss == pytest.approx(loss(base), abs=1e-4)
    each = [[float(torch.nn.functional.cross_entropy(one[1:-1], own[2:], reduction="sum")) for one, own in zip(some, ids)]
            for some in (base, new)]  # fmt: skip
    _, low, high = measure.ratio_of_means(np.subtract(*each[::-1])[None], np.array([len(own) - 2 for own in ids]))
    assert [row["ci_lo"], row["ci_hi"]] == pytest.approx([low[0], high[0]], abs=1e-4)
    kl = torch.cat([measure.kl(a[1:], b[1:]) for a, b in zip(base, new)]).mean()
    assert row["kl"] == pytest.approx(float(kl), abs=1e-5)


def test_controls_are_matched(planted):
    x, directions = planted
    sae = SAE(directions.T * 1.2, torch.full((N,), -3.0), 2 * directions, x.mean(0), at="resid_post.0", name="a")
    arms, density, l0 = _arms(sae, x[:4000], x[:4000], 0)
    made = {name: make(x[:4000], x[:4000]) for name, make in arms.items()}
    total = (x[:4000] - x[:4000].mean(0)).pow(2).sum()
    left = {name: float((x[:4000] - one).pow(2).sum() / total) for name, one in made.items()}
    assert left["mean"] == pytest.approx(1) and left["random"] < 1 and left["pca"] < 1
    mean, rank = x[:4000].mean(0), max(1, round(l0))
    size = torch.linalg.eigvalsh(torch.cov(x[:4000].T))  # what is left by the best subspace of that many dimensions
    assert left["pca"] == pytest.approx(float(size[:-rank].sum() / size.sum()), abs=1e-3)
    rest, part = x[:4000] - made["random"], made["random"] - mean
    assert abs(float((rest * part).sum() / part.pow(2).sum())) < 1e-3, "no other factor leaves less"
    moved, _, _ = _arms(sae, x[:4000], x[:4000] + 5, 0)  # where the origin lies does not matter
    for name in ("random", "pca", "mean"):
        assert torch.allclose(moved[name](x[:9], x[:9] + 5), made[name][:9] + 5, atol=1e-2)
    assert torch.linalg.matrix_rank(made["pca"] - x[:4000].mean(0)) == max(1, round(l0)) and len(density) == N


def test_contexts_show_where_and_what(model, tmp_path):
    sae = axes(model)
    found = features.contexts(model, sae, 0, noise(40), k=5)
    assert len(found.rows) == 5 and found.max == found.rows[0]["max"] and found.n_tokens == 40 * 6
    row = found.rows[0]
    ids = model.ids(noise(40)[row["text"]])
    f = sae.encode(model.activations([ids], "resid_post.2"))[0, :, 0]
    assert row["max"] == pytest.approx(f[1:].max().item(), rel=1e-4)
    assert row["tokens"][row["peak"]] == model.token(ids[f.argmax()])
    assert found.promoted[0][0] == "w6" and found.suppressed[0][0] == "w7"
    assert features.contexts(model, sae, [32], noise(4))[0].promoted[0][0] == "w7"
    assert len(found.frame) == 5 and "**" in found.frame.context[0] and found.plot().axes and "'w6'" in repr(found)
    replace(found, max=found.max - 1e-4).plot()  # a rounded activation may lie above the maximum
    back = features.Contexts.load(found.save(tmp_path / "feature.json"))
    assert back.rows == found.rows and back.promoted == found.promoted and back.component == found.component
    mixed = ["w10 w4", *noise(5), "w11 w12 w5 w13"]  # the first token and the padding do not count
    f = [sae.encode(model.activations([text], "resid_post.2"))[0] for text in mixed]
    j = int(((torch.cat(f) > 0).float().mean(0) - 0.5).abs().argmin())  # one that fires at some
    seen, f = features.contexts(model, sae, j, mixed, k=3), [one[1:, j] for one in f]
    assert seen.density == pytest.approx(float((torch.cat(f) > 0).float().mean())) and 0 < seen.density < 1
    strongest = sorted((float(one.max()) for one in f), reverse=True)[:3]
    assert [row["max"] for row in seen.rows] == pytest.approx(strongest, rel=1e-4) and strongest[2] > 0
    for row in seen.rows:
        assert np.allclose(row["activations"], [0, *f[row["text"]]], atol=1e-3)
    silent = replace(sae, b_enc=torch.full((64,), -1e6))
    nothing = features.contexts(model, silent, 3, noise(4))
    assert nothing.rows == [] and nothing.frame.empty and "nothing" in repr(nothing)
    with pytest.raises(ValueError, match="features 0 to 63"):
        features.contexts(model, sae, 64, noise(4))


def test_texts_of_pairs_end_with_their_own_answer(model):
    row = copying().rows[0]
    assert texts(wb.Task([row])) == [f"{row['clean']} {row['answer']}", f"{row['corrupted']} {row['foil']}"]
    x, whole = activations(model, noise(9), "resid_post.1", 20), activations(model, noise(9), "resid_post.1")
    assert len(x) == 20 and len(whole) == 9 * 6 and torch.equal(x, whole[:20])


def test_training_on_a_model_is_repeatable_and_leaves_it_alone(model):
    weights = {k: v.clone() for k, v in model.hf.state_dict().items()}
    texts = noise(150, 2)
    one, two = (features.train(model, texts, d_sae=48, k=4, steps=20, batch=128) for _ in range(2))
    assert torch.equal(one.W_dec, two.W_dec) and str(one.at) == "resid_post.0" and one.fingerprint == model.fingerprint
    assert all(torch.equal(v, weights[k]) for k, v in model.hf.state_dict().items())
    model.attach(one)
    heads = model.attach(features.train(model, texts, "z.1.*", d_sae=48, k=4, steps=5, batch=128, name="heads"))
    assert heads.d_in == 32 and model.activations(texts[:1], "feature.heads.3").shape == (1, 7)
    found = features.find(model, copying(), one, "auroc", position="cause")
    assert found.plot().axes


@pytest.mark.skipif(not SAE.names(), reason="no SAE is bundled: python data/train_sae.py")
def test_the_bundled_dictionary(course):
    sae = SAE.load(SAE.names()[0])
    texts = wb.Task.load("background").split("test").column("text")[:40]
    row = features.evaluate(course, sae, texts).frame
    assert row.loc["sae", "explained_variance"] > row.loc["random", "explained_variance"] + 0.1
    assert row.loc["sae", "kl"] < 0.5 * row.loc["random", "kl"] and row.loc["sae", "l0"] < 64


# what the review of controls, spans and places asked for


def normed(model, at, name):
    rows = torch.randn(32, 24, generator=torch.Generator().manual_seed(1))
    return SAE(rows, torch.zeros(24), measure.unit(rows.T), torch.zeros(32), at=at, normalize="layer_norm", name=name)


def test_the_tokens_of_a_span_add_up(model):
    """Attribution over two tokens is the sum of those of each; a product of means is not."""
    sae = model.attach(axes(model, "resid_post.0"))
    rows = [row | {"spans": {"both": " ".join(row["clean"].split()[2:4])}} for row in copying()]
    one, two, both = (features.find(model, wb.Task(rows), sae, "attribution", position=at) for at in (2, 3, "both"))
    for i, at in enumerate(both.components):
        parts = [
            some.per_prompt[some._index(at.at(p))] for p, some in ((2, one), (3, two)) if at.at(p) in some.components
        ]
        assert np.allclose(both.per_prompt[i], sum(parts), atol=1e-4 * max(1, np.abs(both.per_prompt[i]).max())), at
    assert len(both.components) > 10 and np.abs(both.per_prompt).max() > 0.05


def test_controls_push_as_far_as_the_features(model, monkeypatch):
    """Where each token is normalized, a feature moves the stream by its token's scale more."""
    task, pushed = copying(), []

    for module in (features.effects, features.finding):
        monkeypatch.setattr(module, "Add", lambda *given: pushed.append(wb.Add(*given)) or pushed[-1])
    pairs, sae = task.on(model), model.attach(normed(model, "resid_post.0", "normed"))
    scores = features.find(model, task, sae, position=2)
    at = [scores.components[int(scores.columns["mean"].argmax())]]

    def moved(ids, change):
        place = "resid_post.0@2"
        return (model.activations(ids, place, change) - model.activations(ids, place)).norm(dim=-1).mean()

    features.effect(model, task, at, factor=0.5, draws=2)
    size = moved(pairs.clean, wb.Scale(at, 0.5))
    assert np.allclose([one.vector.norm() for one in pushed], size, rtol=1e-4) and len(pushed) == 3
    pushed.clear()
    found = features.find(model, task, sae, "output", position=2, candidates=3)
    by_hand = [float(moved(pairs.corrupted, wb.Clamp(one, float(to)))) for one, to in
               zip(found.components, found.columns["clamped_to"])]  # fmt: skip
    assert np.allclose([one.vector.norm() for one in pushed], np.median(by_hand), rtol=1e-4)
    along = [int((sae.W_dec @ one.vector).argmax()) for one in pushed]  # others than the candidates, each once
    assert not {one.index for one in found.components} & set(along) and len(set(along)) == len(along) > 5
    runs = [model.logits(pairs.corrupted, *change) for change in ((), *([one] for one in pushed))]
    gaps = torch.stack([measure.logit_diff(one, pairs.answer, pairs.foil) for one in runs]).double().numpy()
    null = np.abs((gaps[1:] - gaps[0]) @ measure.bootstrap_weights(20, 200, 0).T)  # over prompts
    assert found.null_p95 == pytest.approx(np.quantile(null, 0.95), rel=1e-3)


def test_another_dictionary_under_the_name_is_refused(model):
    model.attach(normed(model, "resid_post.0", "one"))
    other = replace(normed(model, "resid_post.0", "one"), W_dec=torch.eye(24, 32))
    for by in ("difference", "output"):
        with pytest.raises(ValueError, match="Another SAE is attached as 'one'"):
            features.find(model, copying(), other, by)
    assert len(features.find(model, copying(), normed(model, "resid_post.0", "one")).components)


def test_what_is_promoted_depends_on_the_place(model):
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    def at(place, rows=rows, model=model):
        width = rows.shape[1]
        sae = SAE(torch.zeros(width, 5), torch.zeros(5), rows, torch.zeros(width), at=place)
        return promoted(model, sae, list(range(5)))

    w_o = torch.cat([model.weight("W_O", 1, head) for head in range(4)])
    assert torch.allclose(at("z.1.*"), at("resid_post.1", rows @ w_o), atol=1e-4)
    assert torch.allclose(at("z.1.2", rows[:, :8]), at("resid_post.1", rows[:, :8] @ w_o[16:24]), atol=1e-4)
    gemma = wb.load(build("gemma2"), tokenizer=tokenizer())  # a norm stands behind its attention block
    norm, w_o = gemma.hf.model.layers[1].post_attention_layernorm, gemma.weight("W_O", 1, 2)
    with torch.no_grad():
        norm.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
        written, own = norm(rows[:, : len(w_o)] @ w_o), rows[:, : len(w_o)]
    through = torch.cosine_similarity(at("z.1.2", own, gemma), at("resid_post.1", written, gemma))
    assert through.min() > 0.999
    before, after = (model.logits("w10 w11 w12", *change)[0] for change in ((), (wb.Add("ln_final@-1", rows[0]),)))
    assert torch.allclose(at("ln_final")[0], after - before - (after - before).mean(), atol=1e-4)
    with pytest.raises(ValueError, match="promote no words directly"):
        at("neuron.1.*")


@pytest.mark.parametrize("by", ["difference", "auroc", "attribution", "output"])
def test_rows_of_one_entity_are_one_observation(model, by):
    sae = model.attach(axes(model, "resid_post.0"))
    rows = list(copying()[:6])
    once, again = (features.find(model, wb.Task(some), sae, by, position=2, candidates=4) for some in (rows, rows * 4))
    assert np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-3)
    assert (once.ci_lo < once.ci_hi).any()
    top = once.top(1)
    one, four = (features.effect(model, wb.Task(some), top, draws=1).frame.loc["features"] for some in (rows, rows * 4))
    assert one.ci_lo == pytest.approx(four.ci_lo, abs=1e-4) and one.ci_hi == pytest.approx(four.ci_hi, abs=1e-4)


def test_labelled_texts_of_one_entity_are_one_observation(model):
    sae = model.attach(axes(model))
    rows = [{"text": text, "label": "four" if " w4 " in text else "five", "entity": str(i)}
            for i, text in enumerate(noise(12))]  # fmt: skip
    once, again = (features.find(model, wb.Task(some), sae) for some in (rows, rows * 4))
    assert np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-4)
    assert (once.ci_lo < once.ci_hi).any()
