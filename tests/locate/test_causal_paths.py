"""Tracing with noise, knockout of attention edges, path patching, patching between models."""

import copy

import numpy as np
import pytest
import torch
from test_causal_null import other_causes
from tiny import build, copying, tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench import measure
from workbench.locate.causal import between, knockout, patch, path_patch, trace
from workbench.locate.causal.edges import _elsewhere
from workbench.locate.causal.places import window_of
from workbench.locate.causal.tracing import _spread
from workbench.task import DATA


def task(*args):
    return wb.Task(copying(*args), "copying")


@pytest.fixture(scope="module")
def inhibition():
    """A circuit written by hand: z.0.0 finds the name that was there twice, z.1.1 inhibits it, z.2.2 copies another."""
    folder = DATA / "planted" / "inhibition"
    return wb.load(folder), wb.Task.load(folder / "task.jsonl").split("test")[:8]


# tracing


def test_restoring_everything_that_was_noised_gives_the_clean_run(trained):
    scores = trace(trained, task(24), ["resid_pre.0@cause", "resid_post.2@-1", "resid_pre.0@1"], draws=6)
    assert scores["resid_pre.0@cause"] == pytest.approx(1, abs=1e-5)
    assert scores["resid_post.2@-1"] == pytest.approx(1, abs=1e-5)
    assert scores["resid_pre.0@1"] == 0 and scores.clean > 0.9 > 0.8 > scores.corrupted
    assert (
        0.02 < scores.null_p95[scores.components.index(wb.Component.parse("resid_pre.0@cause"))] < 0.9
    )  # other noise disturbs
    assert set(scores.above_null()) >= {wb.Component.parse("resid_pre.0@cause"), wb.Component.parse("resid_post.2@-1")}


def test_noise_is_what_it_says(trained, monkeypatch):
    """The same as adding the noise by hand; seeded by prompt and draw, however prompts are batched."""
    monkeypatch.setattr("workbench.locate.causal.tracing.refuse_without_gap", lambda *args: None)
    rows, size = task(3), 3 * trained.weight("W_E")[[4, 4, 4]].std()
    whole = trace(trained, rows, "resid_post.0@3", draws=2, null=False, metric="logit_diff", seed=5)
    by_hand = []
    for draw in range(2):
        for i, row in enumerate(rows):
            rng = torch.Generator().manual_seed(5 * 1_000_003 + draw * 10_007 + i)
            noise = wb.Add("embed@2", size * torch.randn(1, 32, generator=rng)[0])
            by_hand.append(wb.Task([row]).score(trained, noise)[0])
    assert whole.corrupted == pytest.approx(np.mean(by_hand), abs=1e-4)
    monkeypatch.setattr("workbench.locate.causal.tracing.batches", lambda pairs, copies: [[2], [0], [1]])
    apart = trace(trained, rows, "resid_post.0@3", draws=2, null=False, metric="logit_diff", seed=5)
    assert np.allclose(whole.per_prompt, apart.per_prompt, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "llama"])
def test_noise_is_measured_where_it_is_added(name):
    """Some models multiply their embeddings on the way; noise comes behind that."""
    model = wb.load(build(name), tokenizer=tokenizer())
    pairs = task(4).on(model)
    embedded = model.activations(pairs.clean, "embed@2")
    assert _spread(model, pairs, [[2]] * 4) == pytest.approx(float(embedded.std()), rel=1e-5)


def test_the_null_restores_the_next_draw_of_noise(trained, monkeypatch):
    """The whole state of the next draw is that draw's run: over a round of draws, the changes of each prompt cancel."""
    seen, real = {}, measure.null_threshold
    monkeypatch.setattr(
        measure, "null_threshold", lambda effects, **more: seen.update(under=effects, **more) or real(effects)
    )
    trace(trained, task(), ["resid_pre.0@cause", "resid_post.2@-1"], draws=4, metric="logit_diff")
    assert np.allclose(seen["under"].sum(0), 0, atol=1e-3) and (np.abs(seen["under"]).max(0) > 0.1).all()
    assert seen["together"] == 4  # a score is a mean over the draws


def test_no_noise_changes_nothing(trained):
    with pytest.raises(ValueError, match="noise=0 on the subject hides too little"):
        trace(trained, task(4), noise=0)


def test_a_window_restores_several_layers(trained):
    wide = trace(trained, task(), "mlp_out.*@cause", window=3, draws=6)
    assert wide.columns["first_layer"] == [0, 0, 1] and wide.columns["last_layer"] == [1, 2, 2]
    alone = trace(trained, task(), "mlp_out.*@cause", window=1, draws=6)
    assert not alone.columns and not np.allclose(alone.values, wide.values)
    assert np.isfinite(wide.null_p95).all() and wide.cost > alone.cost
    usual = trace(trained, task(), ["mlp_out.*@cause", "attn_out.*@cause", "z.*.0@cause"], draws=6, null=False)
    for one, first, last in zip(usual.components, usual.columns["first_layer"], usual.columns["last_layer"]):
        around = 0 if one.kind == "z" else 1  # of attention and FFN outputs three layers at least, of heads one
        assert (first, last) == (max(0, one.layer - around), min(2, one.layer + around))
    assert [len(window_of(24, wide, 48)) for wide in (1, 5, 10)] == [1, 5, 10]  # the paper's is 10 of 48


def test_traces_that_cannot_be(trained):
    for settings, said in [({"at": "q.0.1"}, "cannot be traced"), ({"subject": "verb"}, "no span 'verb'; its spans: cause"),
                           ({"draws": 0}, "draws=0"), ({"noise": -1}, "noise=-1")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            trace(trained, task(3), **settings)


# knockout


def test_one_layer_cut_is_the_scores_replaced(llama, word_pairs):
    rows = word_pairs[:2]
    scores = knockout(llama, rows, 3, -1, window=1, heads="each", null=False)
    for layer, head in ((0, 1), (2, 3)):
        for i, ids in enumerate(rows.on(llama).clean):
            old = llama.activations([ids], f"attn_scores.{layer}.{head}")[0][-1]
            old[3] = torch.finfo(torch.float32).min
            cut = llama.logits([ids], wb.Replace(f"attn_scores.{layer}.{head}@-1", old))[0]
            lost = rows.score(llama)[i] - (cut[10] - cut[20]).item()
            at = scores.components.index(wb.Component.parse(f"attn_scores.{layer}.{head}@-1"))
            assert scores.per_prompt[at, i] == pytest.approx(lost, abs=1e-5)


def test_cutting_every_edge_cuts_the_flow(trained):
    """From the cause to all later positions in all layers: the model cannot know which cause it was."""
    rows = task(8)
    later = [3, 4, 5, 6]
    everywhere = knockout(trained, rows, "cause", later, window=7)
    flipped = wb.Task([row | {"clean": row["corrupted"], "corrupted": row["clean"], "spans": {}} for row in rows])
    assert np.allclose(everywhere.values, everywhere.values[0], rtol=1e-4)  # each window holds every layer
    other = knockout(trained, flipped, 2, later, window=7)
    assert np.allclose(
        everywhere.clean - everywhere.per_prompt.mean(1), other.clean - other.per_prompt.mean(1), atol=1e-3
    )
    assert everywhere.values[0] > 10 * knockout(trained, rows, 0, later, window=7).values[0]
    assert everywhere.above_null() and everywhere.columns["share"][0] > 0.2
    assert np.allclose(everywhere.columns["share"] * (everywhere.clean - everywhere.corrupted), everywhere.values)
    usual = knockout(trained, rows, "cause", later, null=False)  # of three layers a fifth is one
    assert usual.columns["first_layer"] == usual.columns["last_layer"] == [0, 1, 2]


def test_the_null_of_a_cut_takes_as_many_others_that_the_target_sees():
    rng, seen = np.random.default_rng(0), {6: [0, 1, 2, 3, 4, 5, 6], 5: [0, 1, 2, 3, 4, 5]}
    draws = [_elsewhere([5, 6], [2, 3], seen, rng) for _ in range(20)]
    for some in draws:
        keys = {k for _, k in some}
        assert len(keys) == 2 and keys <= {0, 1, 4} and some == {(q, k) for q in (5, 6) for k in keys}
    assert len({frozenset(_elsewhere([6], [2], seen, rng)) for _ in range(40)}) == 5
    assert _elsewhere([6], [1, 2, 3], seen, rng) is None  # of three others none would stay


def test_padding_does_not_matter_to_cuts(llama, word_pairs):
    rows = [dict(row) for row in word_pairs[:2]]
    rows[0] |= {side: f"w11 w12 {rows[0][side]}" for side in ("clean", "corrupted")}
    both = knockout(llama, wb.Task(rows), -4, -1, null=False).per_prompt
    alone = [knockout(llama, wb.Task([row]), -4, -1, null=False).per_prompt for row in rows]
    assert np.allclose(both, np.concatenate(alone, 1), atol=1e-5)


def test_cuts_that_cannot_be(trained, course):
    for settings, said in [((5, 2), "sees itself and earlier ones only"), (([0, 1, 2], [1, 2]), "leave it some position"),
                           (("cause", "verb"), "no span 'verb'")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            knockout(trained, task(3), *settings)
    with pytest.raises(ValueError, match="heads='some'"):
        knockout(trained, task(3), 0, heads="some")
    bloom = wb.load(build("bloom"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="attention in a way of its own"):
        knockout(bloom, task(3), 0)


# paths


def test_paths_are_the_edges_of_a_written_circuit(inhibition):
    model, rows = inhibition
    for receiver, sender in [("logits", "z.2.2"), ("q.2.2", "z.1.1"), (["k.1.1", "v.1.1"], "z.0.0"), ("v.2.2", None)]:
        scores = path_patch(model, rows, ["z", "resid_pre.0"], receiver, null=False)
        values = dict(zip(map(str, scores.components), scores.values, strict=True))
        if sender:
            assert values.pop(sender) > 0.9
        assert max(map(abs, values.values())) < 0.05, receiver


def test_all_paths_together_are_the_total_effect(trained, inhibition):
    for model, rows in ((trained, task(6)), inhibition):
        for direction in ("noising", "denoising"):
            everything = path_patch(model, rows, ["z", "resid_pre.0"], together=True, direction=direction, null=False)
            assert everything.values == pytest.approx([1], abs=1e-4)


def test_without_anything_frozen_it_is_patching(trained):
    for direction in ("noising", "denoising"):
        free = path_patch(trained, other_causes(6), ["z", "mlp_out.1", "neuron.0.3"], frozen=(), direction=direction)
        whole = patch(trained, other_causes(6), ["z.*.*", "mlp_out.1", "neuron.0.3"], direction=direction)
        assert free.components == whole.components and np.allclose(free.per_prompt, whole.per_prompt, atol=1e-4)
        assert np.allclose(free.null_p95, whole.null_p95, rtol=1e-3)
    last = path_patch(trained, task(6), "z.2.*", null=False)  # after the last layer all paths are direct
    assert np.allclose(
        last.per_prompt, patch(trained, task(6), "z.2.*", direction="noising", null=False).per_prompt, atol=1e-4
    )


@pytest.mark.parametrize("receiver", ["q.2.1", "v.2.0", "z.2.3", "mlp_out.2", "neuron.2.5"])
def test_equals_two_runs_by_hand(llama, word_pairs, receiver):
    """Sender from the other prompt, other heads replaced by their own; read the receiver; put it in; nothing else frozen."""
    pairs, sender = word_pairs[:2].on(llama), wb.Component.parse("z.0.2")
    scores = path_patch(llama, word_pairs[:2], [sender], receiver, null=False)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted)):
        heads = llama.names.expand([wb.Component.parse("z.*.*")])
        own, other = (llama.activations([ids], heads) for ids in (clean, corrupted))
        frozen = [wb.Replace(one.at(p), (other if one == sender else own)[one][0][p]) for one in heads for p in range(9)
                  if not (one.layer == 2 and receiver.startswith("z"))]  # fmt: skip
        arrives = llama.activations([clean], receiver, *frozen)[0]
        at = wb.Component.parse(receiver)
        logits = llama.logits([clean], *[wb.Replace(at.at(p), arrives[p]) for p in range(9)])[0]
        lost = word_pairs[:2].score(llama)[i] - (logits[10] - logits[20]).item()
        assert scores.per_prompt[0, i] == pytest.approx(lost, abs=1e-5 * max(1, abs(lost)))


def test_senders_after_the_receivers_have_no_path(trained):
    scores = path_patch(trained, task(4), "z", "q.1.0")
    assert all(abs(value) < 1e-6 for one, value in zip(scores.components, scores.values) if one.layer >= 1)
    assert np.isfinite(scores.null_p95).all() and "Received by q.1.0" in scores.why


def test_paths_that_cannot_be(trained):
    for settings, said in [(("resid_pre.1",), "cannot send"), (("z.0.0", "resid_post.1"), "cannot receive"),
                           (("z.0.0", ["q.1.0", "logits"]), "receives by itself"),
                           (("z.0.0", "q.1.0@-1"), "at all positions")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            path_patch(trained, task(3), *settings)
    with pytest.raises(ValueError, match="cannot be frozen"):
        path_patch(trained, task(3), "neuron.0.1", frozen=("z", "mlp_out"))
    with pytest.raises(ValueError, match="frozen='q'"):
        path_patch(trained, task(3), "z.0.1", frozen=("q",))


# between models


@pytest.fixture(scope="module")
def tuned(trained):
    """The trained model, of which the FFN of layer 1 alone was tuned to answer the other way round."""
    hf = copy.deepcopy(trained.hf)
    weight = hf.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    optimizer, rng = torch.optim.Adam([weight], 1e-2), torch.Generator().manual_seed(0)
    for _ in range(60):
        ids, kind = torch.randint(10, 64, (32, 7), generator=rng), torch.randint(0, 2, (32,), generator=rng)
        ids[:, 2] = 4 + kind
        loss = torch.nn.functional.cross_entropy(hf(ids).logits[:, -1], 7 - kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return wb.load(hf, tokenizer=tokenizer())


def test_what_was_tuned_is_what_tells_the_models_apart(trained, tuned):
    at = ["resid_post.*", "mlp_out.*", "attn_out.*", "z.0.1"]
    scores = between(trained, tuned, task(6), at)
    for one in ("resid_post.1", "resid_post.2", "mlp_out.1"):  # before it nothing differs, from there on all is carried
        assert scores[one] == pytest.approx(1, abs=1e-4)
    for one in ("resid_post.0", "mlp_out.0", "attn_out.0", "attn_out.1", "z.0.1"):
        assert abs(scores[one]) < 1e-4
    assert wb.Component.parse("mlp_out.1") in scores.above_null() and scores.method == "causal.between"
    back = between(tuned, trained, task(6), at, prompt="corrupted", null=False)
    sides = [task(6).score(one, prompt="corrupted").mean() for one in (trained, tuned)]
    assert (back.clean, back.corrupted) == (pytest.approx(sides[0]), pytest.approx(sides[1]))


def test_models_that_do_not_compare(trained, llama):
    with pytest.raises(ValueError, match="hardly differ in logit_diff"):
        between(trained, trained, task(4), "z")
    other = wb.load(build("qwen3"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="differ in d_head: 8 and 16"):
        between(trained, other, task(4), "z")
    with pytest.raises(ValueError, match="different families: llama and mistral"):
        between(trained, wb.load(build("mistral"), tokenizer=tokenizer()), task(4), "z")
    turned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(
        tokenizer().backend_tokenizer.to_str().replace('"w4"', '"x"').replace('"w5"', '"w4"').replace('"x"', '"w5"')))  # fmt: skip
    with pytest.raises(ValueError, match="different vocabularies"):
        between(trained, wb.load(build("llama"), tokenizer=turned), task(4), "z")
    with pytest.raises(ValueError, match="prompt='both'"):
        between(trained, llama, task(4), "z", prompt="both")


def test_between_checkpoints():
    final, early = wb.load("grokking"), wb.load("grokking", revision="step80")
    rows = wb.Task.load("modular_addition").split("fit")[:12]
    scores = between(early, final, rows, ["resid_post.*@-1", "mlp_out.*@-1"], null=2)
    assert scores.clean > scores.corrupted and np.isfinite(scores.values).all() and np.isfinite(scores.null_p95).all()


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_is_at_least_one_layer(trained, window):
    for call in (lambda: knockout(trained, task(3), 2, window=window), lambda: trace(trained, task(3), window=window)):
        with pytest.raises(ValueError, match=f"window={window} layers are none"):
            call()


def test_a_cut_leaves_something_to_see_where_attention_slides(word_pairs):
    """The last of nine words sees four of them: all four cannot be cut, and the null cuts one of those four too."""
    model = wb.load(build("mistral"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="from everything it sees, at least in one layer"):
        knockout(model, word_pairs, [8, 7, 6, 5], -1, null=False)
    cut = knockout(model, word_pairs, [7, 6, 5], -1)
    assert np.abs(cut.values).max() > 0.01 and np.isnan(cut.null_p95).all() and "too short" in cut.why
    outside = knockout(model, word_pairs, [0, 1], -1)
    assert np.abs(outside.per_prompt).max() < 1e-6 and (outside.null_p95 > 1e-3).any()


def test_the_null_of_a_cut_is_drawn_where_some_layer_looks(word_pairs):
    """Two layers that see two tokens and one that sees all: only a draw from what any of them sees has enough others."""
    cut = knockout(wb.load(build("ministral"), tokenizer=tokenizer()), word_pairs, [7, 6, 5], -1, window=1)
    assert np.isfinite(cut.null_p95).all() and cut.null_p95[-1] > 1e-3 and not cut.why


def test_a_metric_without_numbers_is_refused(trained):
    with pytest.raises(ValueError, match="no finite number for 4 of 4 prompts"):
        knockout(trained, task(4), 2, metric=lambda logits, answer, foil: logits[:, 0] * torch.nan)


@pytest.mark.parametrize("call", [
    lambda m, t: path_patch(m, t, "z.0.*", null=False),
    lambda m, t: knockout(m, t, 2, null=False),
    lambda m, t: between(m, wb.load(build("llama", 1), tokenizer=tokenizer()), t, "z.0.*", null=False),
])  # fmt: skip
def test_rows_of_one_entity_are_one_observation(trained, call):
    once, again = (call(trained, wb.Task(rows)) for rows in (copying(6), copying(6) * 4))
    assert (
        np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-4) and (once.ci_lo < once.ci_hi).any()
    )


def test_noise_is_drawn_for_rows_and_intervals_for_entities(trained):
    rows = [dict(row, entity=i % 4) for i, row in enumerate(copying(4) * 6)]
    wide, narrow = (trace(trained, wb.Task(some), "mlp_out.*@cause", draws=2, null=False)
                    for some in (rows, [dict(row, entity=None) for row in rows]))  # fmt: skip
    assert np.allclose(wide.values, narrow.values)
    assert not np.allclose([wide.ci_lo, wide.ci_hi], [narrow.ci_lo, narrow.ci_hi], atol=1e-3)
