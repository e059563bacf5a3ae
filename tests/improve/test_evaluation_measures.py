"""What an evaluation measures, rebuilt with torch and scipy alone; and what counts as one piece of evidence."""

import numpy as np
import pytest
import torch
from tiny import copying

import workbench as wb


@pytest.fixture(scope="module")
def target():
    """w6 after a w4: what the model does anyway."""
    return wb.Task([row | {"split": "test" if i < 12 else "ood"} for i, row in enumerate(copying(24))], "flip")


def test_texts_are_measured_on_what_follows_their_first_third(trained, target, monkeypatch):
    """Each token by the logits before it, with torch alone; texts are resampled whole, also where they come in several passes."""
    from scipy.stats import bootstrap

    F, plan, chunks = torch.nn.functional, wb.model.plan.Prompts, wb.model.plan.Prompts.chunks
    texts = wb.Task([{"text": " ".join([f"w{12 + 2 * i}"] * (6 + i % 3))} for i in range(24)], "texts")
    push = wb.Add("resid_post.1", torch.linspace(-1, 1, 32), phase="generation")
    found = wb.improve.evaluate(trained, push, target, texts, draws=0)
    old, new, kl = [], [], []
    for ids in map(trained.ids, texts.column("text")):
        n = len(ids) // 3
        before, after = (
            trained.logits(plan([ids], [n]), *change, positions="all")[0][n - 1 : -1] for change in ((), (push,))
        )
        for losses, logits in ((old, before), (new, after)):
            losses.append(F.cross_entropy(logits, ids[n:], reduction="none").numpy())
        kl.append(
            F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1).numpy()
        )
    row, moved = found.row("texts", "all"), found.row("texts", "all", "kl")
    changes = [b - a for a, b in zip(old, new)]
    assert [row["metric"], row["n"]] == ["loss", sum(map(len, old))] and abs(row["change"]) > 0.02
    assert [row["before"], row["after"]] == pytest.approx([np.concatenate(x).mean() for x in (old, new)], rel=1e-4)
    assert [moved["after"], moved["p95"], moved["p99"]] == pytest.approx(
        [np.concatenate(kl).mean(), *np.quantile(np.concatenate(kl), [0.95, 0.99])], rel=1e-3
    )
    sums, sizes = np.array([x.sum() for x in changes]), np.array([len(x) for x in changes])
    again = bootstrap((sums, sizes), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, n_resamples=4000, method="percentile",
                      rng=np.random.default_rng(1)).confidence_interval  # fmt: skip
    assert [row["ci_lo"], row["ci_hi"]] == pytest.approx([again.low, again.high], abs=0.15 * (again.high - again.low))
    each = found.examples[(found.examples.task == "texts") & (found.examples.metric == "loss")]
    assert each.after.to_numpy() == pytest.approx([x.mean() for x in new], rel=1e-4)
    monkeypatch.setattr(plan, "chunks", lambda prompts, budget=None: chunks(prompts, 50))
    parted = wb.improve.evaluate(trained, push, target, texts, draws=0).row("texts", "all")
    assert [parted[name] for name in ("after", "ci_lo", "ci_hi")] == pytest.approx(
        [row[name] for name in ("after", "ci_lo", "ci_hi")], abs=1e-5
    )


def test_rows_of_one_entity_count_once(trained, target):
    """Every row a second time tells nothing new: all intervals stay what they were, also those against a control."""
    push, twice = wb.Add("resid_post.1@-1", torch.linspace(-1, 1, 32)), [row for row in target for _ in range(2)]
    one, two = (
        wb.improve.evaluate(trained, push, task, draws=0, prompt="w9 w10") for task in (target, wb.Task(twice, "flip"))
    )
    assert (two.frame.n == 2 * one.frame.n).all() and (one.frame.ci_hi - one.frame.ci_lo).max() > 0.01
    for name in ("frame", "against"):
        a, b = (getattr(report, name)[["ci_lo", "ci_hi"]] for report in (one, two))
        assert np.allclose(a, b, atol=1e-4)


def test_a_control_is_the_best_draw_on_the_first_split(trained, target):
    """In ood the answers are turned round, so that what is best there is worst in test."""
    turned = [row | ({"answer": "w7", "foil": "w6"} if row["split"] == "ood" else {}) for row in target]
    push, reached = wb.Add("resid_post.1@-1", 4 * torch.ones(32)), []
    for splits in ("test", ("test", "ood"), ("ood", "test")):
        found = wb.improve.evaluate(trained, push, wb.Task(turned, "flip"), splits=splits, draws=5)
        reached.append(found.row(split="test", metric="logit_diff", arm="random direction (best of 5)")["after"])
    assert reached[0] == reached[1] > reached[2] + 0.1


def test_prompts_that_are_moved_the_wrong_way_are_counted(trained, target):
    """A push from w7 to w6 moves every other prompt away from its answer; where w6 is ahead it widens the gap."""
    rows = [row | ({"answer": "w7", "foil": "w6"} if i % 2 else {}) for i, row in enumerate(target)]
    push = wb.Add("resid_post.2@-1", trained.weight("W_U")[:, 6] - trained.weight("W_U")[:, 7])
    for change, aim, metric, wanted in (
        (push, "answer", "logit_diff", 0.5),
        (push, "even", "gap", 1.0),
        (-0.1 * push, "even", "gap", 0.0),
    ):
        found = wb.improve.evaluate(trained, change, wb.Task(rows, "mixed"), aim=aim, draws=0)
        assert found.row(metric=metric)["wrong_way"] == wanted
