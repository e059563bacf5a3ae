"""SAEs: what encoding and decoding mean, folders as SAELens writes them, features as components of a running model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build, tokenizer

import workbench as wb
from workbench.component import Component
from workbench.sae import SAE

WIDE = 40
ARCHITECTURES = {"standard": {}, "topk": {"k": 4}, "jumprelu": {"threshold": torch.rand(WIDE)},
                 "batchtopk": {"threshold": torch.full((WIDE,), 0.3), "k": 4}}  # fmt: skip


def make(at="resid_post.1", d=32, architecture="standard", seed=0, **settings):
    rng = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(WIDE, d, generator=rng)
    W_enc = W_dec.T + 0.3 * torch.randn(d, WIDE, generator=rng)
    settings = {**ARCHITECTURES[architecture], **settings}
    return SAE(W_enc, torch.randn(WIDE, generator=rng), W_dec, torch.randn(d, generator=rng), at=at,
               architecture=architecture, **settings)  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def sae(request):
    return make(architecture=request.param)


@pytest.fixture
def x():
    return 2 * torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(9))


def test_encoding_is_what_the_architecture_says(sae, x):
    f = sae.encode(x)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    on = f > 0
    assert torch.equal(f[on], pre[on]) and (f >= 0).all() and on.any() and not on.all()
    if sae.architecture == "standard":
        assert torch.equal(on, pre > 0)
    elif sae.architecture == "topk":
        assert (on.sum(-1) <= 4).all() and (f.amax(-1) == pre.amax(-1)).all()
        assert (pre.masked_fill(on, -1e9).amax(-1) <= torch.where(on, pre, 1e9).amin(-1)).all()
    else:
        assert torch.equal(on, pre > sae.threshold)
    assert torch.allclose(sae.encode(x, [7, 3]), f[..., [7, 3]], atol=1e-5)  # fewer columns are summed in another order
    assert torch.allclose(sae.decode(f), f @ sae.W_dec + sae.b_dec)
    whole = replace(sae, apply_b_dec_to_input=False)  # nothing is subtracted before encoding
    assert torch.allclose(whole.encode(x - sae.b_dec), f, atol=1e-4)
    assert (replace(sae, b_enc=torch.full((WIDE,), -1e6)).encode(x) == 0).all()


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("reads", [None, Component("mlp_in", 1)])
def test_a_change_of_features_is_a_change_of_the_reconstruction(x, normalize, reads):
    sae = make(normalize=normalize)
    if reads:
        sae = replace(sae, reads=reads, apply_b_dec_to_input=False, W_skip=torch.randn(32, 32))
    f = sae.encode(x)
    new = f.clone()
    new[..., [3, 8]] = torch.rand(3, 5, 2)
    moved = sae.change(new[..., [3, 8]] - f[..., [3, 8]], x, [3, 8])
    assert torch.allclose(moved, sae.decode(new, x) - sae.decode(f, x), atol=1e-4)
    free = f.clone().requires_grad_(True)
    weight = torch.randn(3, 5, 32)
    (sae.decode(free, x) * weight).sum().backward()
    assert torch.allclose(sae.slope(weight, x), free.grad, atol=1e-3)
    if normalize != "none":
        assert torch.allclose(sae.encode(x), sae.encode(3 * x), atol=1e-3)
        with pytest.raises(ValueError, match="relative to what was encoded"):
            sae.decode(f)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_dictionary_of_both_ways_along_each_axis_gives_back_what_it_is_given(x, normalize):
    rows = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = SAE(rows.T, torch.zeros(64), rows, torch.zeros(32), at="resid_post.1", normalize=normalize)
    assert torch.allclose(sae.decode(sae.encode(x), x), x, atol=1e-3)


def test_a_skip_transcoder_adds_its_linear_part(x, tmp_path):
    rng = torch.Generator().manual_seed(0)
    W_dec, b_dec, W_skip = (torch.randn(*shape, generator=rng) for shape in ((WIDE, 20), (20,), (20, 32)))
    settings = {"reads": Component("mlp_in", 1), "apply_b_dec_to_input": False}
    sae = replace(make("mlp_out.1"), W_dec=W_dec, b_dec=b_dec, W_skip=W_skip, **settings)
    for one in (sae, SAE.load(sae.save(tmp_path / "skip"))):
        wanted = torch.einsum("abi,oi->abo", x, W_skip) + sae.encode(x) @ W_dec + b_dec
        assert torch.allclose(one.decode(one.encode(x), x), wanted, atol=1e-3)


def test_folders_round_trip(sae, x, tmp_path):
    other = replace(sae, normalize="layer_norm", apply_b_dec_to_input=False)
    back = SAE.load(other.save(tmp_path / "other"))
    assert torch.equal(back.decode(back.encode(x), x), other.decode(other.encode(x), x))
    sae = replace(sae, name="mine", fingerprint="abc", notes={"seed": 3})
    back = SAE.load(sae.save(tmp_path / "sae"))
    assert torch.equal(back.encode(x), sae.encode(x)) and torch.equal(
        back.decode(back.encode(x)), sae.decode(sae.encode(x))
    )
    assert repr(back) == repr(sae) and (back.name, back.fingerprint, back.notes, back.k) == (
        "mine",
        "abc",
        {"seed": 3},
        sae.k,
    )
    half = SAE.load(sae.save(tmp_path / "half", torch.float16))
    assert torch.allclose(half.W_dec, sae.W_dec, atol=2e-3) and half.W_dec.dtype == torch.float32
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert cfg["architecture"] == {"batchtopk": "jumprelu"}.get(sae.architecture, sae.architecture)
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post" and (cfg["d_in"], cfg["d_sae"]) == (32, WIDE)
    stored = load_file(tmp_path / "sae/sae_weights.safetensors")
    assert stored["W_enc"].shape == (32, WIDE) and stored["W_dec"].shape == (WIDE, 32)


def released(folder, sae, cfg, **extra):
    """A folder as others write them."""
    folder.mkdir()
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    save_file({**{n: getattr(sae, n).contiguous() for n in names}, **extra}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 32, "d_sae": WIDE, **cfg}))
    return folder


def test_folders_of_older_versions(x, tmp_path):
    sae = make()
    flat = {"hook_point": "blocks.1.hook_resid_pre", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    old = SAE.load(released(tmp_path / "a", sae, flat))
    assert (old.architecture, old.k, str(old.at), old.apply_b_dec_to_input) == ("topk", 4, "resid_pre.1", True)
    assert torch.equal(old.encode(x), make(architecture="topk").encode(x))
    asked = {"hook_name": "blocks.1.hook_mlp_out", "normalize_activations": "expected_average_only_in"}
    folder = released(tmp_path / "b", sae, asked)
    with pytest.raises(ValueError, match="scale=sqrt"):
        SAE.load(folder)
    scaled = SAE.load(folder, scale=0.5)
    assert torch.allclose(scaled.encode(x), sae.encode(0.5 * x), atol=1e-4)
    assert torch.allclose(0.5 * scaled.decode(scaled.encode(x)), sae.decode(sae.encode(0.5 * x)), atol=1e-4)
    rescaled = {
        "architecture": "topk",
        "k": 4,
        "rescale_acts_by_decoder_norm": True,
        "hook_name": "blocks.1.hook_resid_post",
    }
    norm = sae.W_dec.norm(dim=1)
    folded = SAE.load(released(tmp_path / "c", sae, rescaled))
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norm
    top = pre.topk(4).indices
    assert torch.allclose(folded.encode(x).gather(-1, top), pre.gather(-1, top).relu(), rtol=1e-3, atol=1e-3)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(WIDE), atol=1e-5)
    jump = released(tmp_path / "d", sae, {"architecture": "jumprelu", "metadata": {"hook_name": "model.layers.2"}},
                    threshold=torch.rand(WIDE))  # fmt: skip
    assert (SAE.load(jump).architecture, str(SAE.load(jump).at)) == ("jumprelu", "resid_post.2")


def test_what_folders_fold_in(x, tmp_path):
    """Thresholds, lengths of decoder rows and factors of features, wherever a training run left them."""
    sae, hook = make(architecture="jumprelu"), {"hook_name": "blocks.1.hook_resid_post"}
    rebuilt, norm, n = sae.decode(sae.encode(x)), sae.W_dec.norm(dim=1), iter(range(9))

    def load(cfg, **extra):
        return SAE.load(released(tmp_path / str(next(n)), sae, cfg, **extra))

    rescale = {"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True, "meta": hook}
    for cfg, extra in (
        ({"meta": hook}, {"log_threshold": sae.threshold.log()}),
        (rescale, {"threshold": sae.threshold}),
    ):
        one = load(cfg, **extra)
        assert str(one.at) == "resid_post.1" and torch.allclose(one.decode(one.encode(x)), rebuilt, atol=1e-3)
    # the threshold of a BatchTopK run is one of activations as they were compared, times the length of their rows
    trained = load(hook | {"rescale_acts_by_decoder_norm": True}, topk_threshold=torch.tensor(2.0))
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norm
    assert trained.architecture == "batchtopk" and torch.allclose(trained.encode(x), pre * (pre > 2), atol=1e-3)
    factor, plain = torch.rand(WIDE) + 0.5, make()
    tuned = load(hook, scaling_factor=factor)
    assert torch.allclose(tuned.decode(plain.encode(x)), plain.decode(plain.encode(x) * factor), atol=1e-3)
    bare = load(hook | {"apply_b_dec_to_input": False})
    assert torch.allclose(bare.encode(x - sae.b_dec), plain.encode(x), atol=1e-4)


def test_hook_names_are_places(tmp_path):
    names = {"model.layers.2": "resid_post.2", "blocks.2.hook_mlp_in": "resid_mid.2", "blocks.2.hook_resid_mid": "resid_mid.2",
             "blocks.2.hook_attn_out": "attn_out.2", "blocks.2.attn.hook_z": "z.2.*"}  # fmt: skip
    for i, (hook, place) in enumerate(names.items()):
        assert str(SAE.load(released(tmp_path / str(i), make(), {"hook_name": hook})).at) == place
    head = SAE.load(make("z.1.2", d=8).save(tmp_path / "head"))
    assert (str(head.at), head.d_in) == ("z.1.2", 8)


def test_other_layouts_and_refusals(x, tmp_path):
    sae = make(architecture="jumprelu", apply_b_dec_to_input=False)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    np.savez(tmp_path / "params.npz", **{n: getattr(sae, n).numpy() for n in names})
    assert torch.equal(SAE.load(tmp_path, at="resid_post.1").encode(x), sae.encode(x))
    with pytest.raises(ValueError, match="give at="):
        SAE.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json.*SAELens"):
        SAE.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'gated' cannot be read"):
        SAE.load(released(tmp_path / "g", sae, {"architecture": "gated", "hook_name": "blocks.1.hook_resid_post"}))
    with pytest.raises(ValueError, match="names no component here"):
        SAE.load(released(tmp_path / "h", sae, {"hook_name": "blocks.1.hook_other"}))
    for settings, said in [({"architecture": "relu"}, "standard, topk"), ({"architecture": "topk"}, "needs k"),
                           ({"architecture": "jumprelu"}, "needs its threshold"), ({"name": "a.b"}, "letters"),
                           ({"b_enc": torch.zeros(3)}, "b_enc has shape")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            replace(make(), **settings)


# in a running model


@pytest.fixture
def model(llama):
    yield llama
    llama.detach()


def test_features_move_the_stream_by_their_decoder_row(tiny, words):
    prompt = words(7)
    for at in ("resid_post.1", "mlp_out.1", "resid_mid.1", "attn_out.1", "resid_pre.2"):
        if at.split(".")[0] in tiny.names.refused:
            continue
        sae = tiny.attach(make(at, architecture="topk"))
        base = tiny.logits(prompt)
        x = tiny.activations(prompt, f"{at}@-1")
        new = x + sae.change(2.5 - sae.encode(x)[:, [7]], x, [7])
        clamped = wb.Clamp("feature.sae.7@-1", 2.5)
        wanted = tiny.logits(prompt, wb.Replace(f"{at}@-1", new[0]))
        assert torch.allclose(tiny.logits(prompt, clamped), wanted, atol=1e-4) and not torch.allclose(
            wanted, base, atol=1e-3
        )
        assert tiny.activations(prompt, "feature.sae.7@-1", clamped).item() == 2.5
        tiny.detach()


def test_what_changes_no_feature_changes_nothing(model, words):
    sae = model.attach(make(architecture="topk"))
    prompts = words(6, 9)
    base = model.logits(prompts, positions="all")
    f = [sae.encode(model.activations([one], "resid_post.1")) for one in prompts]
    silent = next(j for j in range(WIDE) if not any((one[..., j] > 0).any() for one in f))
    for change in (wb.Scale("feature.sae.*", 1), wb.Zero(f"feature.sae.{silent}"), Same("feature.sae.*")):
        assert all(torch.equal(a, b) for a, b in zip(base, model.logits(prompts, change, positions="all")))
    assert not torch.equal(base[0], model.logits(prompts, wb.Zero("feature.sae.*"), positions="all")[0])
    # all features off leaves the error term and the decoder's bias
    x = model.activations([prompts[0]], "resid_post.1")
    off = model.activations([prompts[0]], "resid_post.1", wb.Zero("feature.sae.*"))
    assert torch.allclose(off, x - sae.decode(sae.encode(x)) + sae.b_dec, atol=1e-3)


class Same(wb.Scale):
    """Sets every feature to what it is, through the whole path."""

    factor = 1.0

    def __init__(self, at):
        super().__init__(at, 1.0)

    @property
    def does_nothing(self):
        return False


def test_changes_at_one_place_start_from_the_same_stream(model, words):
    one, two = model.attach(make(seed=1), "one"), model.attach(make(seed=2), "two")
    prompt = words(5)
    x = model.activations(prompt, "resid_post.1")
    moves = {n: model.activations(prompt, "resid_post.1", wb.Zero(f"feature.{n}.*")) - x for n in ("one", "two")}
    both = model.activations(prompt, "resid_post.1", wb.Zero("feature.two.*"), wb.Zero("feature.one.*"))
    assert torch.allclose(both - x, moves["one"] + moves["two"], atol=1e-3)
    assert torch.allclose(moves["two"], two.b_dec - two.decode(two.encode(x)), atol=1e-3)
    # after another intervention on the stream, features are those of the changed stream
    halved = model.activations(prompt, "feature.one.3", wb.Scale("resid_post.1", 0.5))
    assert torch.allclose(halved, one.encode(0.5 * x)[..., 3], atol=1e-4)


def test_reading_positions_and_gradients(model, words):
    sae = model.attach(make())
    prompts = words(6, 8)
    x = model.activations(prompts, "resid_post.1@-1")
    j = int(sae.encode(x).sum(0).argmax())
    at = f"feature.sae.{j}@-1"
    assert torch.allclose(model.activations(prompts, at), sae.encode(x)[:, j], atol=1e-4)
    assert len(model.activations(prompts, "feature.sae.*@-1")) == WIDE

    def metric(logits, rows):
        return logits[:, 9]

    _, seen, slopes = model.gradients(prompts, [at], metric)
    step = [model.logits(prompts, wb.Add(at, torch.tensor([e])))[:, 9] for e in (1e-2, -1e-2)]
    assert torch.allclose(slopes[Component.parse(at)], (step[0] - step[1]) / 2e-2, atol=2e-2, rtol=2e-2)
    assert torch.allclose(seen[Component.parse(at)], sae.encode(x)[:, j], atol=1e-4)


def test_generation_is_steered_at_every_token(model, words):
    sae = model.attach(make())
    prompt = words(6)[0]
    clamp = wb.Clamp("feature.sae.5", 40.0)
    steered = model.generate_ids(prompt, clamp, max_new_tokens=4)[0]
    ids = model.ids(prompt)
    for token in steered:  # the same without a cache
        assert int(model.logits([ids], clamp).argmax()) == int(token)
        ids = torch.cat([ids, token[None]])
    assert sae.feature(5) == Component.parse("feature.sae.5")


def keep(seen, name):
    return lambda module, args: seen.update({name: args[0]})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_transcoders_read_what_the_ffn_is_given(architecture, words, tmp_path):
    model = wb.load(build(architecture), tokenizer=tokenizer())
    for hook, before in (("mlp.hook_in", False), ("ln2.hook_normalized", True)):
        cfg = {"architecture": "transcoder", "d_out": 32,
               "metadata": {"sae_lens_version": "6.1.0", "hook_name": f"blocks.1.{hook}", "hook_name_out": "blocks.1.hook_mlp_out"}}  # fmt: skip
        loaded = SAE.load(released(tmp_path / hook, make(), cfg))
        assert (str(loaded.at), str(loaded.source), loaded.before_gain) == ("mlp_out.1", "mlp_in.1", before)
        assert not loaded.apply_b_dec_to_input  # it is of the output, where the folder does not say
        again = SAE.load(loaded.save(tmp_path / f"{hook}2"))
        assert (again.source, again.before_gain, again.at) == (loaded.source, before, loaded.at)
        sae = model.attach(loaded)
        prompt = words(6)
        layer = model.hf.get_submodule(f"{model.names.row.layers}.1")
        norm, first = layer.get_submodule(model.names.row.norm_mlp), layer.get_submodule(model.names.row.mlp_in[0])
        seen: dict = {}
        handles = [
            norm.register_forward_pre_hook(keep(seen, "stream")),
            first.register_forward_pre_hook(keep(seen, "given")),
        ]
        model.logits(prompt)
        [handle.remove() for handle in handles]
        given = seen["given"].reshape(1, 6, -1)
        if before:
            stream = seen["stream"].reshape(1, 6, -1)
            centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else stream
            given = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        f = loaded.encode(given)
        assert torch.allclose(model.activations(prompt, "feature.sae.4"), f[..., 4], atol=2e-3)
        x = model.activations(prompt, "mlp_out.1@-1")
        moved = wb.Replace("mlp_out.1@-1", (x + (1.5 - f[:, -1, [4]]) @ sae.W_dec[[4]])[0])
        assert torch.allclose(
            model.logits(prompt, wb.Clamp("feature.sae.4@-1", 1.5)), model.logits(prompt, moved), atol=2e-3
        )
        model.detach()


def test_one_head_can_have_its_own_dictionary(model, words):
    sae = model.attach(make("z.1.2", d=8))
    x = model.activations(words(5), "z.1.2")
    assert torch.allclose(model.activations(words(5), "feature.sae.3"), sae.encode(x)[..., 3], atol=1e-5)
    off = model.activations(words(5), ["z.1.1", "z.1.2"], wb.Zero("feature.sae.*"))
    assert torch.allclose(off[Component.parse("z.1.2")], x - sae.decode(sae.encode(x)) + sae.b_dec, atol=1e-4)
    assert torch.equal(off[Component.parse("z.1.1")], model.activations(words(5), "z.1.1"))


def test_what_cannot_be_attached_says_why(model, words):
    with pytest.raises(ValueError, match=r"no SAE 'sae' is attached.*model\.attach"):
        model.logits(words(4), wb.Zero("feature.sae.3"))
    model.attach(make())
    for other, said in [(make(), "attached already"), (make("resid_post.7", name="a"), "layers 0 to 2"),
                        (make(d=16, name="a"), "32 wide here, the SAE expects 16"), (make("resid_post.*", name="a"), "one tensor"),
                        (make("pattern.0.1", name="a"), "one tensor"), (make(fingerprint="else", name="a"), "trained on model else")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            model.attach(other)
    assert list(model.saes) == ["sae"]
    with pytest.raises(ValueError, match="features 0 to 39"):
        model.logits(words(4), wb.Zero("feature.sae.40"))
    with pytest.raises(ValueError, match=r"No SAE 'b' is attached\. Attached: sae"):
        model.detach("b")
    model.detach("sae")
    assert model.saes == {}
