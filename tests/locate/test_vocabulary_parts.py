"""Vocabulary projection part by part: what is read, against what, and who is held out; by hand."""

import numpy as np
import pytest
import torch
from test_vocabulary import pairs, regained, uncapped
from tiny import build, tokenizer

import workbench as wb
from workbench import measure
from workbench.locate.vocabulary import (
    attribution,
    backward_lens,
    circuits,
    copying_scores,
    logit_attribution,
    logit_lens,
    neuron_vocabulary,
    ov_circuit,
    patchscope,
    qk_circuit,
    tuned,
    tuned_lens,
)
from workbench.locate.vocabulary.backward import outer_products
from workbench.locate.vocabulary.patchscope import _target
from workbench.locate.vocabulary.readout import Readout, others, rank_of
from workbench.model.plan import Prompts

# the readout


def test_the_matrix_is_what_the_readout_makes_of_a_stream_up_to_its_scale(tiny):
    readout, x = Readout(tiny), torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        logits = uncapped(tiny, readout(x)) - uncapped(tiny, readout(torch.zeros(1, 32)))
    mine = (x @ readout.matrix()).double()
    assert mine.mean(1).abs().max() < 1e-4 * mine.abs().max(), "what raises all alike is taken out"
    assert torch.cosine_similarity(mine, logits - logits.mean(1, keepdim=True)).min() > 0.999


def test_ranks_and_partners():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0])
    assert [rank_of(values, values[[i]]).item() for i in range(4)] == [1.5, 4, 1.5, 3], "equals share their places"
    assert others(torch.tensor([5, 5, 8])).tolist() == [8, 8, 5] and others(torch.tensor([5, 5])).tolist() == [-1, -1]


def one_by_one(monkeypatch):
    """Every prompt in a batch of its own."""
    whole = Prompts.chunks
    monkeypatch.setattr(Prompts, "chunks", lambda self, *_: whole(self, 1))


# the logit lens


def test_what_a_lens_says_by_hand(llama, words, monkeypatch):
    texts, answers = words(6, 4, 6), ["w30", "w31", "w30"]
    lens, readout = logit_lens(llama, texts, answers=answers), Readout(llama)
    for i, (text, partner) in enumerate(zip(texts, ("w31", "w30", "w31"))):
        final = llama.logits([text], positions="all")[0].log_softmax(-1)
        with torch.no_grad():
            said = readout(llama.activations([text], "resid_post.1")[0]).log_softmax(-1)
        n = len(said)
        kl = (final.exp() * (final - said)).sum(-1)
        assert np.allclose(lens.kl[2, i, -n:], kl, atol=1e-5) and kl.max() > 0.01
        assert np.allclose(lens.entropy[2, i, -n:], torch.special.entr(said.exp()).sum(-1), atol=1e-5)
        for ranks, word in ((lens.rank, answers[i]), (lens.other_rank, partner)):
            own = said[:, [int(llama.ids(word)[-1])]]
            assert ranks[2, i, -n:].tolist() == (1 + (said > own).sum(1)).tolist()
        assert lens.said("resid_post.1", i, 1)[0][1] == pytest.approx(float(said[1].exp().max()), abs=1e-6)
    one_by_one(monkeypatch)
    again = logit_lens(llama, texts, answers=answers)
    for name in ("prob", "kl", "rank", "top_prob"):
        assert np.allclose(getattr(again, name), getattr(lens, name), atol=1e-5, equal_nan=True)


def test_the_answer_is_what_the_changed_model_says(llama, words):
    prompts, off = words(6, 6, 6, 6), [wb.Zero("mlp_out.*"), wb.Zero("attn_out.2")]
    lens, plain = logit_lens(llama, prompts, *off), logit_lens(llama, prompts)
    assert (lens.rank[-1, :, -1] == 1).all() and lens.answers != plain.answers
    table = plain.by_layer()
    assert np.array_equal(table.other_first, (plain.other_rank[:, :, -1] == 1).mean(1))
    assert table["first"].iloc[-1] == 1 > table.other_first.iloc[-1]


# direct logit attribution


def test_stand_ins_are_other_tokens_of_about_the_same_probability(llama, monkeypatch):
    monkeypatch.setattr(attribution, "NEAREST", 5)
    task, chance = pairs(6).on(llama), torch.exp(torch.arange(64.0) / 4).double()
    drawn = attribution._stand_ins(llama, chance, task, 50, np.random.default_rng(0))
    given = {*task.answer.tolist(), *task.foil.tolist(), *llama.tokenizer.all_special_ids}
    free = np.array([i for i in range(64) if i not in given])
    for side, own in enumerate((task.answer, task.foil)):
        for prompt, token in enumerate(own.tolist()):
            near = set(free[np.argsort(np.abs(free - token), kind="stable")[:6]].tolist())  # one more, for ties
            assert set(drawn[side, :, prompt].tolist()) <= near
    assert (drawn[0] != drawn[1]).all()


def test_the_null_of_tokens_is_the_score_of_other_words(llama, monkeypatch):
    task, rng = pairs(5), np.random.default_rng(1)
    drawn = torch.from_numpy(np.stack([rng.integers(10, 30, (7, 5)), rng.integers(30, 60, (7, 5))]))
    monkeypatch.setattr(attribution, "_stand_ins", lambda *_: drawn)
    scores, under = logit_attribution(llama, task, draws=7), []
    for draw in range(7):
        rows = [row | {"answer": llama.token(a).strip(), "foil": llama.token(f).strip()}
                for row, a, f in zip(task, *drawn[:, draw].tolist())]  # fmt: skip
        under.append(np.abs(logit_attribution(llama, wb.Task(rows), null=False).values))
    assert np.allclose(scores.columns["null_tokens"], np.quantile(under, 0.95, axis=0), atol=1e-4)


def test_both_sides_and_the_chance_of_tokens_by_hand(llama, words):
    task = pairs(5)
    ids = task.on(llama)
    gap = {side: measure.logit_diff(llama.logits(getattr(ids, side)), ids.answer, ids.foil).mean().item()
           for side in ("clean", "corrupted")}  # fmt: skip
    for prompt, sides in (("clean", ["clean"]), ("corrupted", ["corrupted"]), ("difference", ["clean", "corrupted"])):
        scores = logit_attribution(llama, task, "mlp_out.*", prompt=prompt, null=False)
        for side in gap:
            wanted = gap[side] if side in sides else float("nan")
            assert getattr(scores, side) == pytest.approx(wanted, abs=1e-4, nan_ok=True)
    texts = words(9, 4)
    _, chance = attribution._read(llama, llama._prompts(texts), [("embed", None)])
    by_hand = torch.cat([one.softmax(-1) for one in llama.logits(texts, positions="all")]).mean(0)
    assert torch.allclose(chance.float(), by_hand, atol=1e-6), "padding has no part in it"


# heads


def test_tokens_stand_alone_after_bos_and_nulls_deal_them_anew(llama, monkeypatch):
    space = circuits.Space(llama, [1], "alone", 0)
    for i in (10, 40):
        ids = torch.tensor([llama.tokenizer.bos_token_id, i])
        alone = llama.activations([ids], "resid_pre.1")[0, -1]
        assert torch.allclose(space.streams[1][list(space.ids).index(i)], alone, atol=1e-5)
    scores, head = copying_scores(llama, "z.1.2", draws=4), wb.Component.parse("z.1.2")
    for circuit, reach in (("OV", scores.null_p95[0]), ("QK", scores.columns["null_matching"][0])):
        space, under = circuits.Space(llama, [1], "alone", 0), []
        left, right = space.factors(circuit, head)
        space.null(circuit, head, 4)
        for permutation in space.permutations:  # as a table of tokens by tokens
            eigenvalues = np.linalg.eigvals((left[permutation] @ right).double().numpy())
            under.append(abs(eigenvalues.real.sum() / np.abs(eigenvalues).sum()))
        assert reach == pytest.approx(np.quantile(under, 0.95), abs=1e-3)
    for circuit in (ov_circuit, qk_circuit):
        whole = circuit(llama, "z.1.2", tokens=["w20", "w30"], draws=2, embedding="W_E")
        with monkeypatch.context() as patch:
            patch.setattr(circuits, "SAMPLE", 20)  # the null and the score from some tokens, the words from all
            some = circuit(llama, "z.1.2", tokens=["w20", "w30"], draws=2, embedding="W_E")
        assert [[word for word, _ in line] for line in some.most] == [[word for word, _ in line] for line in whole.most]
        assert whole.chance == (len(space.ids) + 1) / 2 == some.chance


# neurons and gradients


def test_neurons_in_words_by_hand():
    for name, norm in (("llama", "post_attention_layernorm"), ("gemma2", "post_feedforward_layernorm")):
        model = regained(name, norm)
        found, space = neuron_vocabulary(model, "neuron.1.*", k=3), circuits.Space(model, [1], "alone", 0, "resid_mid")
        block, ids = model.hf.model.layers[1], torch.tensor([int(i) for i in space.ids])
        rows = [torch.tensor([model.tokenizer.bos_token_id, i]) for i in ids]
        with torch.no_grad():
            before = block.post_attention_layernorm if name == "llama" else block.pre_feedforward_layernorm
            x = before(model.activations(rows, "resid_mid.1@-1"))
            written = (
                model.weight("W_out", 1)
                if name == "llama"
                else block.post_feedforward_layernorm(model.weight("W_out", 1))
            )
        opens, promotes = (x @ model.weight("W_gate", 1)).T, written @ Readout(model).matrix()
        acts = torch.stack(list(model.activations(rows, "neuron.1.*@-1").values()))
        for j in (0, 7, 20):
            for side, table in (("opens", opens[j]), ("promotes", promotes[j]), ("suppresses", -promotes[j])):
                table = (table - table.mean()) / table.std()
                top = table[: len(ids)].topk(3) if side != "opens" else table.topk(3)
                of = ids if side == "opens" else torch.arange(64)
                assert [word for word, _ in found.words[side][j]] == [model.token(of[i]) for i in top.indices]
                assert [value for _, value in found.words[side][j]] == pytest.approx(top.values.tolist(), rel=1e-2)
            most = acts[j].abs().topk(3).indices
            assert [value for _, value in found.words["fires"][j]] == pytest.approx(acts[j, most].tolist(), rel=1e-2)


def test_sizes_and_ranks_of_gradients_by_hand(llama, words, monkeypatch):
    texts, answers = words(6, 4, 6), [30, 31, 30]
    lens, matrix = backward_lens(llama, texts, answers=answers), Readout(llama).matrix()
    for i, (text, partner) in enumerate(zip(texts, (31, 30, 31))):
        products = outer_products(llama, llama._prompts([text]), torch.tensor([answers[i]]), "W_out")
        for layer, (before, after) in enumerate(products):
            n = before.shape[1]
            size = torch.einsum("pi,po->pio", before[0], after[0]).flatten(1).norm(dim=1)
            assert np.allclose(lens.size[layer, i, -n:], size, rtol=1e-3, atol=1e-6)
            logits = (after[0, -1] @ matrix)[None]
            for ranks, word in ((lens.rank, answers[i]), (lens.other_rank, partner)):
                assert ranks[layer, i, -1] == rank_of(logits, logits[:, [word]]).item()
    assert lens.frame.groupby("prompt").share.sum().to_numpy() == pytest.approx(1)
    even = backward_lens(llama, words(5, 5), answers=[30, 31])
    assert sum(even.by_layer(-position).share.sum() for position in range(1, 6)) == pytest.approx(1)
    assert np.isnan(backward_lens(llama, texts[0], answers=30).other_rank).all(), "one prompt has no partner"
    one_by_one(monkeypatch)
    again = backward_lens(llama, texts, answers=answers)
    assert np.allclose(again.size, lens.size, rtol=1e-3, atol=1e-6, equal_nan=True)


# patchscope


def test_a_patchscope_by_hand(llama, words):
    texts = words(6, 4)
    at, answers = ["resid_pre.0@1", "resid_post.1@-1"], ["w30", "w31"]
    found = patchscope(llama, texts, at, target="w5 {} w6", into="resid_pre.0", answers=answers)
    assert found.tokens == [[text.split()[at] for text in texts] for at in (1, -1)]
    for i, (text, other) in enumerate(zip(texts, ("w31", "w30"))):
        state = llama.activations([text], "resid_post.1@-1")[0]
        logits = llama.logits(["w5 w5 w6"], wb.Replace("resid_pre.0@1", state))
        for ranks, word in (
            (found.rank, answers[i]),
            (found.own_rank, text.split()[-1]),
            (found.other_rank, other),
        ):
            assert ranks[1, i] == rank_of(logits, logits[:, [int(llama.ids(word)[-1])]]).item()
    left, right, text = _target(llama, None, np.random.default_rng(0))
    assert left[0] == llama.tokenizer.bos_token_id and left[-1] == right[-1] and len(right) == 5
    assert len({*left[1:].tolist(), *right.tolist()}) == 5 and text.split()[0] == text.split()[-1]


def test_words_are_set_as_the_model_embeds_them(words):
    model = wb.load(build("gemma3_text"), tokenizer=tokenizer())  # it scales its embeddings
    one = patchscope(model, words(6), "resid_post.2@-1", target="w5 {} w6", into="embed", through=["w7"])
    assert np.allclose(one.top_prob[0], model.logits(["w5 w7 w6"]).softmax(-1).topk(5).values, atol=1e-6)


def test_what_the_target_repeats(words):
    """A model that says the word it was given last, but for one word that it never says."""
    model = wb.load(build("llama"), tokenizer=tokenizer())
    with torch.no_grad():
        for layer in model.hf.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.hf.lm_head.weight.copy_(model.hf.model.embed_tokens.weight)
        model.hf.lm_head.weight[model.ids("w30")[-1]] *= -1
    found = patchscope(model, words(5, 5), "resid_pre.0@-1", target="w5 {}", answers="w30")
    assert (found.repeats, found.repeats_own) == (0, 1) and (found.own_rank == 1).all()


# the tuned lens


def test_held_out_texts_are_seen_by_nobody(llama, monkeypatch):
    texts = [f"w{i} w{j} w10 w11 w12" for i in range(12, 20) for j in range(20, 28)]
    rows = [{"text": text, "split": "test" if i % 4 == 0 else "fit"} for i, text in enumerate(texts)]
    for given in (texts, wb.Task(rows)):
        parts = tuned._split(llama, given, 10**6, np.random.default_rng(0))
        train, trial, held = ({tuple(ids.tolist()) for ids in part} for part in parts)
        assert not train & trial and not train & held and not trial & held and len(train | trial | held) == 64
    assert held == {tuple(llama.ids(row["text"]).tolist()) for row in rows if row["split"] == "test"}
    asked, real = [], tuned._streams
    monkeypatch.setattr(tuned, "_streams", lambda model, readout, texts, found: asked.append(texts) or real(model, readout, texts, found))  # fmt: skip
    lens = tuned_lens(llama, wb.Task(rows), steps=60, lr=0.02, progress=False)
    for one, part in zip(asked, tuned._split(llama, wb.Task(rows), 12_000, np.random.default_rng(0)), strict=True):
        assert all(map(torch.equal, one, part))
    # its figures are those of the lens on the texts held out, and the interval is over these texts
    prompts = Prompts(asked[2])
    plain, through = (logit_lens(llama, prompts, answers=11, tuned=one).kl[:-1] for one in (None, lens))
    assert np.allclose(lens.logit_kl, plain.mean((1, 2)), rtol=1e-4)
    assert np.allclose(lens.tuned_kl, through.mean((1, 2)), rtol=1e-3, atol=1e-6) and (lens.A != 0).any()
    assert ((lens.ci_lo <= lens.tuned_kl - lens.logit_kl) & (lens.tuned_kl - lens.logit_kl <= lens.ci_hi)).all()
    _, low, high = measure.mean_interval((through - plain).mean(2).T, draws=500)
    assert np.median((lens.ci_hi - lens.ci_lo) / (high - low)) == pytest.approx(1, abs=0.25)


def test_a_translator_can_take_a_constant_away_and_the_best_is_kept(llama, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(600, 32, generator=generator)
    x = (last + 20 * torch.randn(32, generator=generator))[None]
    readout, trial = Readout(llama), (x[:, 500:], last[500:])
    tried, real = [], tuned._kl
    monkeypatch.setattr(tuned, "_kl", lambda *given: tried.append(real(*given)) or tried[-1])
    A, b, _ = tuned._train(readout, x[:, :500], last[:500], trial, 200, 0.01, 0, False)
    with torch.no_grad():
        before, best = tried[0].mean(), min(one.mean() for one in tried)
        after = real(readout, x[0, 500:] + x[0, 500:] @ A[0].T + b[0], last[500:]).mean()
    assert float(after) == pytest.approx(float(best), rel=1e-3) and after < 0.3 * before
