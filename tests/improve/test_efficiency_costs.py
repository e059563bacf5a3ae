"""Costs: however a model computes attention and experts, the same products are counted, and nothing of it is changed."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.improve import efficiency as fast

COUNTED = ("prompt_operations", "token_operations")
module = sys.modules[fast.Costs.__module__]  # its name is that of a function, too


def loaded(architecture, attention="eager"):
    hf = build(architecture)
    hf.set_attn_implementation(attention)
    return wb.load(hf, tokenizer=tokenizer())


def test_fused_attention_counts_as_the_plain_one(llama, words):
    fused, prompts = loaded("llama", "sdpa"), words(30, 12)
    found, plain = fast.costs(fused, prompts), fast.costs(llama, prompts)
    assert [getattr(found, name) for name in COUNTED] == [getattr(plain, name) for name in COUNTED]
    assert fused.hf.config._attn_implementation == "sdpa"
    streaming = fast.costs(fused, prompts, "z.*.*").saved(found)
    assert streaming["prompt_operations"] == 0 < streaming["token_operations"] < 0.25


@pytest.mark.parametrize("architecture, width, seen", [("mixtral", 48, 4), ("qwen3_moe", 24, 21)])
def test_experts_count_for_the_tokens_sent_to_them(architecture, width, seen, words):
    """By hand: 32 wide, 3 layers, 4 heads of 8 with 2 for keys, 2 of 4 experts for each token, 64 words; Mixtral is local."""
    model, (prompt,) = loaded(architecture), words(20)
    found, length, how = fast.costs(model, prompt, new_tokens=1), len(model.ids(prompt)), model.hf.config
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 4 + 2 * 3 * 32 * width
    assert length == 20
    assert found.prompt_operations == pytest.approx(3 * (layer * length + 2 * 32 * length * length) + 32 * 64, rel=1e-3)
    assert found.token_operations == pytest.approx(3 * (layer + 2 * 32 * seen) + 32 * 64, rel=1e-3)
    assert how._experts_implementation == "grouped_mm"
    with pytest.raises(IndexError):
        fast.costs(model, [torch.tensor([99])])
    assert (how._experts_implementation, how._attn_implementation) == ("grouped_mm", "eager")


def test_prompts_may_be_a_task(llama):
    task = wb.Task(copying(4), "copying")
    for call in (
        fast.costs,
        lambda *given: fast.exit_early(*given, 0.9),
        lambda *given: fast.prune_tokens(*given, after=0),
    ):
        found, want = (call(llama, given) for given in (task, task.column("clean")))
        if isinstance(found, fast.Costs):
            assert (found.prompt_operations, found.n) == (want.prompt_operations, 4)
        else:
            assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


def test_costs_are_means_over_prompts_run_alone(llama, words):
    prompts = words(5, 12)
    both, *alone = (fast.costs(llama, given, new_tokens=2) for given in (prompts, *prompts))
    for name in (*COUNTED, "cache_bytes", "tokens"):
        assert getattr(both, name) == pytest.approx(sum(getattr(one, name) for one in alone) / 2)


def test_a_timer_waits_for_what_runs_elsewhere(llama, words, monkeypatch):
    """Accelerators compute while Python runs on: they have to be done when a time is taken."""
    waited, events, clock = [], [], iter((0, 5, 10, 13))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    places = ["cuda:1", "cpu", "cuda:1", "meta"]
    elsewhere = [SimpleNamespace(device=torch.device(place)) for place in places]
    module._finish(SimpleNamespace(hf=SimpleNamespace(parameters=lambda: elsewhere)))
    assert waited == [torch.device("cuda:1")]
    monkeypatch.setattr(module, "_finish", lambda model: events.append("wait"))
    monkeypatch.setattr(module.time, "perf_counter", lambda: events.append("time") or next(clock))
    found = fast.costs(llama, words(5, 7), new_tokens=1, repeats=2)
    assert found.seconds == 3 / 2  # of the better repeat, for each of two prompts
    assert events.count("time") == 4
    assert all(events[i - 1] == "wait" for i, one in enumerate(events) if one == "time")
