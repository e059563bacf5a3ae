"""Efficient inference: a streaming cache equals the mask, a cut checkpoint equals the ablated model, costs are what they must be."""

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.improve import efficiency as fast
from workbench.improve.efficiency.streaming import own_layers


def global_heads(model):
    """Some key-value groups of the layers that are not local; z.l.0 to z.l.(share - 1) is group 0."""
    if "q" in model.names.refused:
        pytest.skip("attention of its own way")
    layers = [i for i, own in enumerate(own_layers(model)) if not own.is_sliding]
    if not layers:
        pytest.skip("every layer is local")
    share = model.names.n_heads // model.names.n_kv_heads
    some = [f"z.{layer}.{head}" for layer in layers for head in range(share)]
    return list(dict.fromkeys(some + [f"z.{layers[-1]}.{head}" for head in range(model.names.n_heads)]))


def masked(heads, sink, window):
    return wb.Window([head.replace("z", "attn_scores") for head in heads], sink=sink, window=window)


@pytest.mark.parametrize("sink, window", [(2, 3), (0, 1), (1, 5)])
def test_streaming_computes_what_the_mask_computes(tiny, words, sink, window):
    heads, prompts = global_heads(tiny), words(9, 14, 4)
    want = tiny.logits(prompts, masked(heads, sink, window))
    assert (fast.stream(tiny, prompts, heads, sink=sink, window=window) - want).abs().max() < 1e-5
    assert (want - tiny.logits(prompts)).abs().max() > 1e-3
    with fast.streaming(tiny):  # token by token, with what was let go truly gone
        ids, cache = tiny.ids(prompts[1])[None], fast.StreamingCache(tiny, heads, sink, window)
        for start, end in ((0, 6), (6, 8), *((i, i + 1) for i in range(8, ids.shape[1]))):
            out = tiny.hf(input_ids=ids[:, start:end], **{tiny.cache_key: cache}, use_cache=True)
    assert (out.logits[0, -1] - want[1]).abs().max() < 1e-5
    full = next(fast.decode(tiny, ids[0]))[1]
    stays = sum(len(getattr(layer, "streaming", [])) for layer in cache.layers)
    one = 2 * 4 * full.layers[-1].keys.shape[-1]
    assert fast.cache_bytes(full) - fast.cache_bytes(cache) == stays * one * (ids.shape[1] - (sink + window - 1))
    for layer in cache.layers:  # no view that keeps a larger tensor alive
        if getattr(layer, "streaming", None):
            assert layer.short_keys.untyped_storage().nbytes() == layer.short_keys.numel() * 4


def test_a_model_is_left_as_it_was(llama, words):
    before, how = llama.logits(words(7)), llama.hf.config._attn_implementation
    with pytest.raises(RuntimeError), fast.streaming(llama):
        raise RuntimeError
    assert llama.hf.config._attn_implementation == how
    assert torch.equal(before, llama.logits(words(7)))
    with fast.streaming(llama):
        assert torch.allclose(before[0], next(fast.decode(llama, llama.ids(words(7)[0])))[0], atol=1e-6)


def test_window_is_saved_and_refuses(llama, words, tmp_path):
    recipe = wb.Recipe([wb.Window("attn_scores.1.*", sink=2, window=3)])
    assert list(wb.Recipe.load(recipe.save(tmp_path / "r"))) == list(recipe)
    seen = llama.activations(words(9), "pattern.1.2", *recipe)[0]
    for query in range(9):
        assert [key for key in range(9) if seen[query, key] > 0] == [
            key for key in range(query + 1) if key < 2 or key > query - 3
        ]
    for at, settings in (("pattern.1.2", {}), ("attn_scores.1.2", {"window": 0}), ("attn_scores.1.2", {"sink": 1.5})):
        with pytest.raises(ValueError, match="Window"):
            wb.Window(at, **settings)


def test_streaming_refuses_what_it_cannot_do(llama, course):
    with pytest.raises(ValueError, match="is no head"):
        fast.StreamingCache(llama, "neuron.1.2")
    with pytest.raises(ValueError, match="Layer 0 is local"):
        fast.StreamingCache(course, "z.0.1")
    with pytest.raises(ValueError, match="own"):
        fast.StreamingCache(wb.load(build("bloom"), tokenizer=tokenizer()), "z.0.*")
    half = fast.StreamingCache(llama, "z.1.0")  # shares its keys with z.1.1, which keeps all
    assert all(type(layer).__name__ == "DynamicLayer" for layer in half.layers)


def test_gates_open_for_the_heads_that_carry_a_far_cause(trained):
    """The taught model reads position 2 from the end of nine tokens; only what brings it there needs to stay."""
    from tiny import copying

    task = wb.Task(copying(32), "copying")
    gates = fast.retrieval_heads(trained, task, sink=0, window=2, penalty=0.05, steps=60, rows=16)
    again = fast.retrieval_heads(trained, task, sink=0, window=2, penalty=0.05, steps=60, rows=16)
    assert (gates.values == again.values).all()
    order = sorted(gates.components, key=lambda one: gates[one])
    groups = [tuple(map(str, order[i : i + 2])) for i in range(0, len(order), 2)]
    assert len({gates[one] for one in gates.components}) <= len(groups)
    closed = [str(one) for one in order if gates[one] < 0.5]
    assert 0 < len(closed) < len(order)
    kept = task.score(trained, masked(closed, 0, 2), metric="accuracy").mean()
    others = [str(one) for one in order[-len(closed) :]]
    assert kept == 1
    assert task.score(trained, masked(others, 0, 2), metric="accuracy").mean() < 0.8


@pytest.mark.parametrize("layers, neurons", [([1], ()), ((), ["neuron.0.3", "neuron.0.7", "neuron.1.2", "neuron.1.4", "neuron.2.0"]),
                                             (["resid_post.0"], ["neuron.1.5", "neuron.2.6", "neuron.0.1"])])  # fmt: skip
def test_a_cut_checkpoint_is_the_ablated_model(tiny, words, tmp_path, layers, neurons):
    if neurons and ("neuron" in tiny.names.refused or tiny.hf.config.model_type == "bloom"):
        with pytest.raises(ValueError, match=r"fuses its experts|no width"):
            fast.shrink(tiny, layers, neurons)
        return
    blocks = [f"{kind}.{0 if neurons else 1}" for kind in ("attn_out", "mlp_out")] if layers else []
    want = tiny.logits(words(5, 8), *[wb.Zero(at) for at in (blocks, neurons) if at])
    assert (want - tiny.logits(words(5, 8))).abs().max() > 1e-3
    small = fast.shrink(tiny, layers, neurons)
    assert (small.logits(words(5, 8)) - want).abs().max() < 1e-5
    small.hf.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    back = wb.load(tmp_path, tokenizer=tiny.tokenizer)  # some families open a folder with a tokenizer of their own
    assert (back.logits(words(5, 8)) - want).abs().max() < 1e-5
    assert back.names.n_layers == tiny.names.n_layers - len(layers)
    assert not neurons or back.names.d_mlp == tiny.names.d_mlp - 1
    assert fast.costs(small, words(5)).weight_bytes < fast.costs(tiny, words(5)).weight_bytes


def test_shrink_refuses_what_leaves_nothing(llama):
    for given, said in ((([0, 1, 2], ()), "one must stay"), (([5],), "among 0 to 2"), (((), "z.0.1"), "no neuron"),
                        (((), "neuron.*.*"), "No neuron would be left")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            fast.shrink(llama, *given)


def test_operations_and_bytes_are_what_the_sizes_say(llama):
    """Counted by hand for the tiny Llama: 32 wide, 3 layers, 4 heads of 8 with 2 for keys, FFN 48, 64 words."""
    rows = ["w10 w11 w12 w13 w14 w15 w16 w17"]
    found, length = fast.costs(llama, rows, new_tokens=1), len(llama.ids(rows[0]))
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    rotary = 4 * length  # the angles: half the width of a head times the position
    attention = 2 * 32 * length * length
    assert found.prompt_operations == pytest.approx(3 * (layer * length + attention) + 32 * 64 + rotary, rel=1e-3)
    assert found.token_operations == pytest.approx(3 * (layer + 2 * 32 * (length + 1)) + 32 * 64, rel=1e-3)
    assert found.cache_bytes == 3 * 2 * 16 * 4 * (length + 1)
    assert found.weight_bytes == sum(p.numel() for p in llama.hf.parameters()) * 4
    less = fast.costs(llama, rows, "z.*.*", sink=1, window=2, new_tokens=1)
    assert less.cache_bytes == 3 * 2 * 16 * 4 * 2
    assert less.token_operations < found.token_operations
    assert less.saved(found)["cache_bytes"] == pytest.approx(1 - 2 / (length + 1))
