"""Token pruning: all tokens are the model, some tokens are the model that looks at no others, and operations are saved."""

import pytest
import torch
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
    for keep, by in ((0.5, "recent"), (0.3, "recent")):
        said, kept = prune(tiny, prompt, keep, after=0, by=by)
        gone = tuple(range(n - int(kept[0])))
        masked = wb.Attend(["attn_scores.1.*", "attn_scores.2.*"], gone)
        assert (said - tiny.logits([prompt], masked)).abs().max() < 1e-4


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
