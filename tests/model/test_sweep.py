"""The fast sweep is exactly the slow one."""

import numpy as np
import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.locate.causal import patch
from workbench.model.names import INSIDE
from workbench.model.sweep import Cell, capture, sweep
from workbench.sae import SAE

AT = [
    "resid_pre.0@3", "resid_pre.2@4", "resid_mid.0@3", "resid_post.1@5", "resid_post.2@-1", "attn_out.0@3", "attn_out.1",
    "mlp_out.0", "mlp_out.1@3", "z.0.1", "z.1.2@5", "z.2.0", "neuron.0.7", "neuron.2.9@-1",
    *(f"{kind}.{place}" for kind in INSIDE for place in ("0.1", "1.1@5")), "k.2.0", "attn_scores.2.0@-1",
    "expert.0.1", "expert.1.2@5", "expert.2.0@-1", "router.0", "router.1@4",
]  # fmt: skip
NOISED = ["resid_pre.0@3", "resid_mid.0@3", "resid_post.1@5", "attn_out.0@3", "mlp_out.1@3", "z.0.1", "neuron.0.7",
          *(f"{kind}.0.1" for kind in INSIDE), "k.1.1@5", "expert.0.1", "router.1@4"]  # fmt: skip
NAMES = {"denoising": ("corrupted", "clean"), "noising": ("clean", "corrupted")}


def offered(model, at=AT):
    return [one for one in at if one.split(".")[0] not in model.names.refused]


def naive(model, task, component, direction):
    """One plain pass per component and prompt: the metric with the component taken from the other side."""
    pairs, found = task.on(model), []
    base, source = (getattr(pairs, side) for side in NAMES[direction])
    for i, (mine, theirs) in enumerate(zip(base, source)):
        values = model.activations([theirs], component.at(None))[0]
        places = range(len(mine)) if component.position is None else [component.position]
        change = [wb.Replace(component.at(p), values[p]) for p in places]
        logits = model.logits([mine], *change)[0]
        found.append((logits[pairs.answer[i]] - logits[pairs.foil[i]]).item())
    return np.array(found)


def compare(model, task, at, direction):
    """Equal to a hundred-thousandth of the largest effect, and for every kind the effects are far larger than that."""
    sign, baseline = 1 if direction == "denoising" else -1, task.score(model, prompt=NAMES[direction][0])
    scores = patch(model, task, at, direction=direction, null=False)
    slow = np.stack([sign * (naive(model, task, one, direction) - baseline) for one in scores.components])
    allowed = 1e-5 * np.abs(slow).max()
    for kind in {one.kind for one in scores.components}:
        rows = [i for i, one in enumerate(scores.components) if one.kind == kind]
        assert direction == "noising" or np.abs(slow[rows]).max() > 100 * allowed, f"{kind}: too small to test anything"
        assert np.abs(slow - scores.per_prompt)[rows].max() <= allowed, kind


@pytest.fixture(autouse=True)
def _any_gap(monkeypatch):
    """Random models need not prefer the answer; the refusal of such tasks is tested elsewhere."""
    monkeypatch.setattr("workbench.locate.causal.patching.refuse_without_gap", lambda *args: None)


@pytest.mark.parametrize("direction", NAMES)
def test_equals_the_naive_loop(tiny, word_pairs, direction):
    compare(tiny, word_pairs[1:2], offered(tiny, AT if direction == "denoising" else NOISED), direction)


def test_every_position_equals_the_naive_loop(llama, word_pairs):
    compare(llama, word_pairs[1:2], ["resid_pre", "mlp_out"], "denoising")


def test_equals_the_naive_loop_on_the_bundled_model(course):
    task = wb.Task.load("ioi").split("test")[:1]
    at = [
        "resid_pre.6@-1",
        "resid_mid.5@-1",
        "attn_out.5",
        "mlp_out.0",
        "z.0.0",
        "z.5.3",
        "q.5.3",
        "k.0.0",
        "v.5.3@-2",
        "pattern.5.3",
    ]
    compare(course, task, at, "noising")


def test_prompts_of_different_length_share_calls(tiny, word_pairs):
    """Lined up at their ends, with the padding masked: the same numbers as one by one."""
    rows = [dict(row) for row in word_pairs[1:]]
    for row, more in zip(rows[:2], ("w11 w12 w13", "w33")):
        row |= {side: f"{more} {row[side]}" for side in ("clean", "corrupted")}
    at, mixed = [one.partition("@")[0] + "@-4" if "@" in one else one for one in offered(tiny)], wb.Task(rows, "mixed")
    together = patch(tiny, mixed, at, null=False).per_prompt
    alone = np.concatenate([patch(tiny, mixed[i : i + 1], at, null=False).per_prompt for i in range(3)], 1)
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max() > 1e-7


def test_leaves_the_machine(tiny, word_pairs):
    """nnsight's dry run of a remote trace: serialized, with local modules hidden."""
    at = offered(tiny, ["resid_pre.0@3", "z.1.2@5", "k.0.1"])
    here = patch(tiny, word_pairs, at, null=False)
    tiny.remote = "local"
    try:
        assert np.allclose(patch(tiny, word_pairs, at, null=False).per_prompt, here.per_prompt, atol=1e-5)
    finally:
        tiny.remote = None


def test_components_of_a_set_change_together(tiny, word_pairs):
    """The whole stream at once gives the other run; a set equals the plain pass with all its parts replaced."""
    sets = [["mlp_out.0", "z.1.2"], ["resid_post.1", "mlp_out.0"], ["attn_out.0", "attn_out.1", "resid_mid.0"],
            ["k.0.1", "z.2.1", "pattern.1.1", "neuron.1.3"]]  # fmt: skip
    sets = [[wb.Component.parse(one) for one in offered(tiny, some)] for some in sets]
    sets = [some for some in sets if len(some) > 1]
    pairs, read = word_pairs[:2].on(tiny), lambda logits, rows: logits[:, 10] - logits[:, 20]
    base, source = (
        capture(tiny, side, [one for some in sets for one in some]) for side in (pairs.corrupted, pairs.clean)
    )
    everywhere = [list(range(9))] * 2
    found, _ = sweep(tiny, base, source, [0, 1], [Cell({one: everywhere for one in some}) for some in sets], read)
    for some, fast in zip(sets, found):
        for i in range(2):
            values = {one: tiny.activations([pairs.clean[i]], one)[0] for one in some}
            change = [wb.Replace(one.at(p), values[one][p]) for one in some for p in range(9)]
            slow = read(tiny.logits([pairs.corrupted[i]], *change), None)
            assert torch.allclose(slow, fast[i], atol=1e-5 * max(1, slow.abs().item())), some


def test_the_cost_is_the_share_of_layers_and_tokens_that_are_run_again(llama, word_pairs):
    """In passes over all prompts: from layer 1 of 3 and token 5 of 9 on, for both prompts; for one of them half of that."""
    pairs = word_pairs[::2].on(llama)
    one = wb.Component.parse("resid_post.0")
    base, source = (capture(llama, side, [one]) for side in (pairs.corrupted, pairs.clean))
    for positions, cost in (([[5], [5]], 2 / 3 * 4 / 9), ([[5], []], 1 / 3 * 4 / 9), ([[5, 7], [5]], 2 / 3 * 4 / 9)):
        _, spent = sweep(llama, base, source, [0, 1], [Cell({one: positions})] * 2, lambda logits, rows: logits[:, 10])
        assert spent == pytest.approx(2 * cost)


@pytest.mark.parametrize("place, reads", [("resid_post.1", None), ("resid_mid.1", None), ("mlp_out.1", "resid_mid.1")])
def test_features_equal_the_naive_loop(word_pairs, place, reads):
    """The difference a feature makes is added to the stream, the error term stays; dead features change nothing."""
    torch.manual_seed(0)
    model = wb.load(build("llama"), tokenizer=tokenizer())
    matrices = {
        "W_enc": torch.randn(32, 20),
        "b_enc": torch.zeros(20),
        "W_dec": torch.randn(20, 32),
        "b_dec": torch.randn(32),
    }
    reads = wb.Component.parse(reads) if reads else None
    model.attach(SAE(**matrices, at=place, reads=reads, normalize="layer_norm", name="s"))
    compare(
        model, word_pairs[1:2], ["feature.s.3", "feature.s.7@3", "feature.s.4@5", "feature.s.11", place], "denoising"
    )
    model.detach()
    with pytest.raises(ValueError, match=r"no SAE 's' is attached"):
        patch(model, word_pairs, "feature.s.3")


def test_batching_does_not_matter(llama, word_pairs, monkeypatch):
    at = offered(llama)
    whole = patch(llama, word_pairs, at, null=False)
    for cost, tokens in ((0, 20), (10**9, 10**9)):
        monkeypatch.setattr("workbench.model.sweep.cells.CALL_COST", cost)
        monkeypatch.setattr("workbench.model.sweep.cells.TOKENS_PER_CALL", tokens)
        again = patch(llama, word_pairs, at, null=False)
        assert np.allclose(again.per_prompt, whole.per_prompt, atol=1e-5)


def test_nan_activations_are_named(word_pairs):
    hf = build("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite .* at resid_pre\.2, prompt 0"):
        patch(wb.load(hf, tokenizer=tokenizer()), word_pairs, "resid_pre")


@pytest.mark.parametrize("where", ["between calls", "inside a forward pass"])
def test_an_interrupt_leaves_the_model_as_it_was(word_pairs, words, where, monkeypatch):
    model = wb.load(build("llama"), tokenizer=tokenizer())
    before, weights = model.logits(words(6)), {k: v.clone() for k, v in model.hf.state_dict().items()}
    calls = []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    if where == "between calls":
        monkeypatch.setattr("workbench.model.sweep.cells.tqdm.update", stop)
    else:
        handle = model.hf.model.layers[2].mlp.register_forward_hook(lambda *a: stop())
    with pytest.raises(KeyboardInterrupt):
        patch(model, word_pairs, "resid_pre")
    if where != "between calls":
        handle.remove()
    assert torch.equal(model.logits(words(6)), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.hf.state_dict().items())
