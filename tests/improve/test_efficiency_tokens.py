"""Token pruning: all tokens are the model, some tokens are the model that looks at no others, and operations are saved."""

import pytest
import torch
from tiny import build, tokenizer
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb

prune = wb.improve.efficiency.prune_tokens


def test_keeping_all_tokens_is_the_model(tiny, words):
    prompts = words(7, 9, 5)
    said, kept = prune(tiny, prompts, 1.0, after=0)
    assert kept.tolist() == [len(tiny.ids(text)) for text in prompts]
    assert (said - tiny.logits(prompts)).abs().max() < 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules())


def test_what_is_left_is_the_model_that_looks_at_nothing_else(tiny, words):
    if "attn_scores" in tiny.names.refused:
        pytest.skip("no masks to compare with")
    (prompt,) = words(9)
    n = len(tiny.ids(prompt))
    for keep, by, seed in ((0.5, "recent", 0), (0.3, "recent", 0), (0.5, "random", 0), (0.5, "random", 1)):
        said, (count,) = prune(tiny, prompt, keep, after=0, by=by, seed=seed)
        order = torch.rand(n, generator=torch.Generator().manual_seed(seed)) if by == "random" else torch.arange(n) / n
        order[-1] = torch.inf
        gone = tuple(i for i in range(n) if i not in order.topk(int(count)).indices.tolist())
        masked = wb.Attend(["attn_scores.1.*", "attn_scores.2.*"], gone)
        assert (said - tiny.logits([prompt], masked)).abs().max() < 1e-4


def test_what_needs_no_weights_runs_with_fused_attention(llama, words):
    hf = build("llama")
    hf.set_attn_implementation("sdpa")
    fused = wb.load(hf, tokenizer=tokenizer())
    for by in ("random", "recent"):
        said, want = (prune(model, words(12), 0.5, after=0, by=by)[0] for model in (fused, llama))
        assert (said - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"'recent', or hf\.set_attn_implementation"):
        prune(fused, words(12), 0.5, after=0)


def test_local_attention_does_not_choose_beyond_its_window(course, words):
    model = wb.load(build("gemma3_text"), tokenizer=tokenizer())  # layer 1 alone sees more than 4 tokens
    with pytest.raises(ValueError, match="Write after=1 or"):
        prune(model, words(9), after=0)
    assert prune(model, words(9), after=1)[1] == round(0.5 * len(model.ids(words(9)[0])))
    assert prune(model, words(3), 0.5, after=0)[1] == 2  # all within the window
    with pytest.raises(ValueError, match="Layer 0 is local: the last token sees 2 tokens"):
        prune(course, wb.Task.load("ioi").column("clean")[:1], after=0)
    with pytest.raises(ValueError, match="Write by='recent'"):
        prune(wb.load(build("mistral"), tokenizer=tokenizer()), words(9), after=0)


def test_attention_chooses_and_the_last_token_stays(llama, words):
    (prompt,) = words(8)
    n, keep = len(llama.ids(prompt)), 0.4
    pattern = llama.activations([prompt], "pattern.1.*")
    seen = (
        torch.stack([x.reshape(n, n)[-1] for x in pattern.values()]).mean(0)
        if isinstance(pattern, dict)
        else pattern.reshape(-1, n, n)[:, -1].mean(0)
    )
    seen[-1] = torch.inf
    count = round(keep * n)
    gone = tuple(i for i in range(n) if i not in seen.topk(count).indices.tolist())
    said, kept = prune(llama, prompt, keep, after=1)
    assert kept.tolist() == [count]
    assert (said - llama.logits([prompt], wb.Attend("attn_scores.2.*", gone))).abs().max() < 1e-4


def test_operations_are_truly_saved_and_chance_is_seeded(llama, words):
    prompts, spent = words(40), {}
    for keep in (1.0, 0.25):
        with FlopCounterMode(display=False) as counter:
            prune(llama, prompts, keep, after=0)
        spent[keep] = counter.get_total_flops()
    assert spent[0.25] < 0.75 * spent[1.0]
    one, two = (prune(llama, prompts, 0.25, by="random", after=0, seed=seed)[0] for seed in (1, 1))
    assert torch.equal(one, two)


@pytest.mark.parametrize("wrong, said", [({"keep": 0}, "above 0"), ({"keep": 1.5}, "at most 1"), ({"after": 2}, "0 to 1"), ({"by": "luck"}, "'recent'")])  # fmt: skip
def test_refusals(llama, words, wrong, said):
    with pytest.raises(ValueError, match=said):
        prune(llama, words(5), **({"after": 0} | wrong))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.hf.modules())
