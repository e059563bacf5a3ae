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
    with pytest.raises(ValueError, match="Window acts on attn_scores"):
        wb.Window("pattern.1.2")


def test_streaming_refuses_what_it_cannot_do(llama, course):
    with pytest.raises(ValueError, match="is no head"):
        fast.StreamingCache(llama, "neuron.1.2")
    with pytest.raises(ValueError, match="Layer 0 is local"):
        fast.StreamingCache(course, "z.0.1")
    for arch, said in (("bloom", "need transformers' attention function.*in a way of its own"), ("gpt_oss", "has learnt sinks"),
                       ("deepseek_v3", "one latent for all heads")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            fast.StreamingCache(wb.load(build(arch), tokenizer=tokenizer()), "z.1.*")
    for use in (fast.StreamingCache, lambda *given: fast.retrieval_heads(*given[:1], ["w5 w6"], given[1])):
        with pytest.raises(ValueError, match=r"all query heads of a key-value head, here z\.1\.0 and z\.1\.1"):
            use(llama, ["z.0.*", "z.1.0"])


@pytest.mark.parametrize("settings", [{"window": 0}, {"window": True}, {"sink": -1}, {"sink": 1.5}])
def test_sink_and_window_are_whole_numbers_everywhere(llama, settings):
    for use in (lambda: wb.Window("attn_scores.1.*", **settings), lambda: fast.StreamingCache(llama, "z.1.*", **settings),
                lambda: fast.stream(llama, "w5 w6", "z.1.*", **settings),
                lambda: fast.retrieval_heads(llama, ["w5 w6"], steps=1, **settings)):  # fmt: skip
        with pytest.raises(ValueError, match="take sink, a whole number from 0 on"):
            use()


def test_attention_with_sinks_offers_no_scores():
    model = wb.load(build("gpt_oss"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"attn_scores: attention has learnt sinks"):
        model.logits("w5 w6 w7", wb.Window("attn_scores.1.*"))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
def test_the_mask_generates_what_the_cache_generates(arch, words):
    """And both what a mask says that is made anew for the whole text at every step, in a padded batch, with and without a
    cache under the mask."""
    model, prompts = wb.load(build(arch), tokenizer=tokenizer()), words(9, 14, 4)
    heads, settings = global_heads(model), {"max_new_tokens": 6, "eos_token_id": None}
    mask = masked(heads, 1, 3)
    part = model._prompts(prompts)
    ids = part.ids
    for _ in range(6):
        ids = [torch.cat([old, new[None]]) for old, new in zip(ids, model.logits(ids, mask).argmax(-1))]
    want = [one[len(old) :].tolist() for one, old in zip(ids, part.ids)]
    batch, cache = model.inputs(part), fast.StreamingCache(model, heads, 1, 3, part.pads)
    batch.pop("position_ids", None)
    with fast.streaming(model), torch.no_grad():
        said = model.hf.generate(**batch, **{model.cache_key: cache}, do_sample=False, pad_token_id=0, **settings)
    assert said[:, part.width :].tolist() == want
    for use_cache in (True, False):
        made = model.generate_ids(prompts, mask, use_cache=use_cache, **settings)
        assert [one.tolist() for one in made] == [one[: one.index(2)] if 2 in one else one for one in want]
    assert [one.tolist() for one in model.generate_ids(prompts, **settings)] != [one.tolist() for one in made]


def test_beams_and_fresh_starts_of_a_streaming_cache(llama, words):
    part = llama._prompts(words(14, 9))
    batch = llama.inputs(part)
    batch.pop("position_ids", None)

    def said(window=None, **settings):
        own = {} if window is None else {llama.cache_key: fast.StreamingCache(llama, "z.*.*", 1, window, part.pads)}
        with fast.streaming(llama), torch.no_grad():
            return llama.hf.generate(**batch, **own, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                                     **settings).tolist()  # fmt: skip

    beams = said(num_beams=4)
    assert said(100, num_beams=4) == beams != said()
    assert said(3, num_beams=4) != beams
    whole, cache = llama.inputs(part), fast.StreamingCache(llama, "z.*.*", 1, 3, part.pads)
    found = []
    for _ in range(2):
        cache.reset()
        assert cache.get_seq_length() == fast.cache_bytes(cache) == 0
        with fast.streaming(llama), torch.no_grad():
            found.append(llama.hf(**whole, **{llama.cache_key: cache}, use_cache=True).logits[:, -1])
        assert torch.equal(found[-1], found[0]) and cache.get_seq_length() == part.width
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    step = {"input_ids": torch.tensor([[7], [7]]), "attention_mask": torch.ones(2, part.width + 1, dtype=torch.long)}
    step["attention_mask"][:, : part.pads[1]] = 0
    step["position_ids"] = torch.full((2, 1), len(part.ids[1]))
    with fast.streaming(llama), torch.no_grad():
        logits = llama.hf(**step, **{llama.cache_key: cache}, use_cache=True).logits[:, -1]
    want = llama.logits([torch.cat([part.ids[1], torch.tensor([7])])], masked(["z.*.*"], 1, 3))
    assert (logits - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.layers[0].crop(-1)


def test_a_streaming_cache_says_where_it_works_and_for_whom(llama, words):
    ids = llama.ids(words(8)[0])[None]
    with pytest.raises(RuntimeError, match=r"put the call inside `with streaming\(model\)`"):
        llama.hf(input_ids=ids, **{llama.cache_key: fast.StreamingCache(llama, "z.*.*")}, use_cache=True)
    with pytest.raises(ValueError, match="made for 2 rows"), fast.streaming(llama):
        cache = fast.StreamingCache(llama, "z.*.*", rows=2)
        llama.hf(input_ids=ids.repeat(3, 1), **{llama.cache_key: cache}, use_cache=True)


def test_streaming_takes_a_task(llama):
    from tiny import copying

    task = wb.Task(copying(4), "copying")
    assert torch.equal(fast.stream(llama, task, "z.*.*"), fast.stream(llama, task.column("clean"), "z.*.*"))


def test_gates_in_half_precision_count_what_they_run_and_leave_nothing_behind(words):
    from transformers import AttentionInterface

    model = wb.load(build("llama").to(torch.bfloat16), tokenizer=tokenizer())
    with torch.no_grad():
        gates = fast.retrieval_heads(model, words(8, 8), steps=3, rows=24, penalty=1.0)
    assert gates.cost == 4 * 3 * 2 / 2
    assert (gates.values < 1).all()
    assert "workbench_gates" not in AttentionInterface()
    assert model.hf.config._attn_implementation == "eager"


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
    want = tiny.logits(words(5, 30), *[wb.Zero(at) for at in (blocks, neurons) if at])
    assert (want - tiny.logits(words(5, 30))).abs().max() > 1e-3
    small = fast.shrink(tiny, layers, neurons)
    assert (small.logits(words(5, 30)) - want).abs().max() < 1e-5
    small.hf.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    back = wb.load(tmp_path, tokenizer=tiny.tokenizer)  # some families open a folder with a tokenizer of their own
    assert (back.logits(words(5, 30)) - want).abs().max() < 1e-5
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
    three = fast.costs(llama, rows, new_tokens=3)  # the second of three tokens is the mean one
    assert three.token_operations == pytest.approx(3 * (layer + 2 * 32 * (length + 2)) + 32 * 64, rel=1e-3)
    assert (three.prompt_operations, three.tokens) == (found.prompt_operations, length + 3)
    assert found.cache_bytes == 3 * 2 * 16 * 4 * (length + 1)
    assert found.weight_bytes == sum(p.numel() for p in llama.hf.parameters()) * 4
    less = fast.costs(llama, rows, "z.*.*", sink=1, window=2, new_tokens=1)
    assert less.cache_bytes == 3 * 2 * 16 * 4 * 2
    assert less.token_operations < found.token_operations
    assert less.saved(found)["cache_bytes"] == pytest.approx(1 - 2 / (length + 1))
