"""Gates of retrieval heads: open is the model, closed is the window, and between them is the mean that the gate says."""

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.improve import efficiency as fast
from workbench.improve.efficiency import gates


def window(*heads):
    return wb.Window([f"attn_scores.{head}" for head in heads], sink=1, window=3)


def test_gates_mix_full_and_windowed_attention(words):
    """Two query heads share each key-value head, prompts of three lengths are padded; without `free` a gate counts as open."""
    llama = wb.load(
        build("llama"), tokenizer=tokenizer()
    )  # its own: transformers leaves hooks where it gives hidden states
    part, seen = llama._prompts(words(9, 6, 12)), []
    hook = llama.hf.model.layers[2].self_attn.o_proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0][:, -1])
    )
    try:
        for values, closed in (({0: [1, 1], 2: [1, 1]}, []), ({0: [0, 1], 2: [1, 0]}, ["0.0", "0.1", "2.2", "2.3"]),
                               ({1: [0, 0]}, ["1.0", "1.1", "1.2", "1.3"])):  # fmt: skip
            own = {layer: torch.tensor(value, dtype=torch.float) for layer, value in values.items()}
            with torch.no_grad(), gates._gated(llama, own, {layer: torch.ones(2) for layer in own}, part, 1, 3):
                last = gates._last(llama, part)
            assert torch.allclose(
                last, llama.activations(part, "ln_final@-1", *([window(*closed)] if closed else [])), atol=1e-5
            )
        with (
            torch.no_grad(),
            gates._gated(llama, {2: torch.tensor([0.25, 0.0])}, {2: torch.tensor([1.0, 0.0])}, part, 1, 3),
        ):
            gates._last(llama, part)
    finally:
        hook.remove()
    mixed, full, short = seen[-1].unflatten(-1, (4, 8)), *(
        torch.stack(list(llama.activations(part, "z.2.*@-1", *change).values()), 1) for change in ((), (window("2.*"),)))  # fmt: skip
    assert torch.allclose(mixed[:, :2], (0.25 * full + 0.75 * short)[:, :2], atol=1e-5)
    assert torch.allclose(mixed[:, 2:], full[:, 2:], atol=1e-5) and not torch.allclose(full, short, atol=1e-3)


def test_local_layers_have_no_gates(words):
    model = wb.load(build("gemma3_text"), tokenizer=tokenizer())  # layer 1 alone sees all tokens
    found = fast.retrieval_heads(model, words(8, 8), steps=1)
    assert {one.layer for one in found.components} == {1} and len(found.components) == model.names.n_heads
    with pytest.raises(ValueError, match="Every layer of these heads is local"):
        fast.retrieval_heads(wb.load(build("mistral"), tokenizer=tokenizer()), words(8), steps=1)
