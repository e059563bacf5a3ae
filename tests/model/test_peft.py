"""LoRA adapters, read and written; the real peft runs them."""

import json
import warnings
from unittest.mock import Mock

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_edit import close, numbers, state, unchanged
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.model.peft import _listed
from workbench.steer import optimization
from workbench.steer.optimization.learning import LowRank
from workbench.steer.optimization.rows import forward

PROMPT = "w5 w9 w30 w12 w7 w40"
# Conv1D, fused projections, tied embeddings of which one side is trained (gpt2, gemma2) or both (gemma3), scaled ones (gemma)
ADAPTERS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True, "rank_pattern": {r"layers\.1\..*": 2},
              "alpha_pattern": {"v_proj": 7, "model.layers.2.mlp.down_proj": 2}},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "alpha_pattern": {"mlp.c_proj": 1}},
    "gpt_neox": {"target_modules": ["query_key_value", "dense_4h_to_h", "embed_out"], "init_lora_weights": "gaussian"},
    "phi3": {"target_modules": "all-linear"},
    "gemma2": {"target_modules": ["embed_tokens"]},
    "gemma3_text": {"target_modules": ["o_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 5}},
}  # fmt: skip

TIED = ("gpt2", "gemma2", "gemma3_text")


def fresh(architecture: str):
    return wb.load(build(architecture), tokenizer=tokenizer())


def quietly(make, *args, **kwargs):
    with warnings.catch_warnings():  # peft on embeddings that are tied
        warnings.simplefilter("ignore")
        return make(*args, **kwargs).eval()


def trained_by_peft(hf, **settings):
    """An adapter after some steps of plain peft, factors no longer at their beginning."""
    torch.manual_seed(1)
    made = quietly(peft.get_peft_model, hf, peft.LoraConfig(r=3, lora_alpha=5, **settings))
    adam = torch.optim.Adam([one for one in made.parameters() if one.requires_grad], 0.1)
    ids = torch.randint(4, 64, (4, 8))
    for _ in range(3):
        made(ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    return made


def saved(made, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return folder


def test_a_model_with_adapters_in_it_is_not_opened():
    hf = quietly(peft.get_peft_model, build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for module in (hf, hf.base_model.model):  # wrapped, and the model inside, which has them too
        with pytest.raises(ValueError, match=r"adapters of peft.*merge_and_unload.*wb\.Recipe\.from_peft"):
            wb.load(module, tokenizer=tokenizer())
    merged = wb.load(hf.merge_and_unload(), tokenizer=tokenizer())  # B = 0, nothing learnt
    assert torch.equal(merged.logits(PROMPT), fresh("llama").logits(PROMPT))


@torch.no_grad()
def logits(hf, model) -> torch.Tensor:
    return hf(model.ids(PROMPT)[None]).logits[0]


def ours(model, recipe) -> torch.Tensor:
    return model.logits(PROMPT, recipe, positions="all")[0]


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_an_adapter_of_peft_is_a_recipe_and_back(architecture, tmp_path):
    """The same logits: peft's model, our recipe, the recipe saved and loaded, and peft with what the recipe wrote."""
    hf = trained_by_peft(build(architecture), **ADAPTERS[architecture])
    saved(hf, tmp_path / "theirs")
    model = fresh(architecture)
    before, parameters, expected = state(model), list(model.hf.parameters()), logits(hf, model)
    assert not close(model.logits(PROMPT, positions="all")[0], expected, 0.1)  # an effect to speak of
    recipe = wb.Recipe.from_peft(model, tmp_path / "theirs")
    assert close(ours(model, recipe), expected)
    assert recipe.name == "theirs" and recipe.fingerprint == model.fingerprint
    assert recipe.notes["peft"]["r"] == 3
    recipe.save(tmp_path / "recipe")
    assert wb.Recipe.load(tmp_path / "recipe") == recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if architecture in TIED else "error", UserWarning)
        recipe.to_peft(model, tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, build(architecture), tmp_path / "ours")
    assert close(logits(again, model), expected)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == (5 if architecture == "gemma3_text" else 3)  # of the largest
    assert unchanged(model, before, parameters)
    plain = again.unload().state_dict()  # peft left the model's own weights alone, too
    assert all(torch.equal(plain[name], one) for name, one in before.items())


def test_our_lora_and_whole_differences_become_an_adapter(trained, tmp_path):
    """Trained factors at half strength, a whole difference of rank 1 at twice its, and one matrix that two Deltas change."""
    rows = wb.Task([row | {"answer": "w9"} for row in copying()], "new")
    places = ["mlp_out.2", "attn_out.2"]
    lora = optimization.lora(trained, rows, places, rank=2, lr=2e-2, keep=(), steps=20, progress=False)
    value, key = numbers(32), numbers(48, seed=1)
    edit = wb.Delta(weights={f"model.layers.{i}.mlp.down_proj.weight": 0.03 * torch.outer(value, key) for i in (0, 2)})
    recipe = wb.Recipe([0.5 * lora, 2 * edit, 0 * wb.Delta(weights={"model.norm.weight": numbers(32)})])
    before, parameters = state(trained), list(trained.hf.parameters())
    folder = recipe.to_peft(trained, tmp_path / "adapter")
    assert sorted(one.name for one in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3  # 2 and 1 at one matrix
    hf = build("llama")
    hf.load_state_dict(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft takes the layout as its own
        theirs = peft.PeftModel.from_pretrained(hf, folder).eval()
    assert close(logits(theirs, trained), ours(trained, recipe))
    assert not close(ours(trained, recipe), trained.logits(PROMPT, positions="all")[0], 1e-2)
    assert close(logits(theirs.merge_and_unload(), trained), ours(trained, recipe))
    assert unchanged(trained, before, parameters)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_a_tied_weight_changes_on_both_sides(architecture, tmp_path):
    """One name of it in the recipe is both: an adapter needs a pair of factors for each, and no merging."""
    model = fresh(architecture)
    name = next(name for name, one in model.hf.named_parameters() if one is model.hf.get_input_embeddings().weight)
    delta = wb.Delta(weights={f"{name}.left": numbers(64, 2), f"{name}.right": numbers(2, 32)})
    with pytest.warns(UserWarning, match=rf"{name}.*tied.*Do not merge.*bake"):
        wb.Recipe([delta]).to_peft(model, tmp_path / "x")
    theirs = quietly(peft.PeftModel.from_pretrained, build(architecture), tmp_path / "x")
    assert close(logits(theirs, model), ours(model, delta))
    assert close(ours(model, wb.Recipe.from_peft(model, tmp_path / "x")), ours(model, delta))
    assert not close(logits(theirs.merge_and_unload(), model), ours(model, delta), 0.1)  # both pairs in one tensor


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_our_training_is_that_of_peft(architecture):
    """From the same A and B = 0: losses, gradients, factors after two steps of Adam, and logits are the same."""
    turned = architecture == "gpt2"  # Conv1D keeps [in, out], so do our factors of it
    targets = ["c_attn", "c_proj"] if turned else ["q_proj", "down_proj"]
    model = fresh(architecture)
    hf = quietly(peft.get_peft_model, build(architecture),
                 peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=turned))  # fmt: skip
    names = [name for name, one in model.hf.named_parameters() if one.dim() == 2 and name.split(".")[-2] in targets]
    change, theirs = LowRank(model, names, 3, 5.0, seed=0), []
    for name, (left, right) in change.factors.items():
        module = hf.base_model.model.get_submodule(name.removesuffix(".weight"))
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a.data.copy_(left.detach().T if turned else right.detach())
        theirs += [a, b] if turned else [b, a]
    assert len(theirs) == len(change.leaves) == len([one for one in hf.parameters() if one.requires_grad]) >= 12
    prompts, ids = model._prompts([PROMPT]), model.ids(PROMPT)[None]
    steppers = [torch.optim.Adam(one, 0.05) for one in (change.leaves, theirs)]
    for step in range(2):
        outs = forward(model, prompts, change.weights()), hf(ids).logits
        losses = [torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:]) for out in outs]
        assert close(*losses)
        for loss in losses:
            loss.backward()
        moving = sum(bool(one.grad.any()) for one in theirs)
        assert moving == len(theirs) if step else moving == len(names)  # B = 0 holds A still at first
        for own, other in zip(change.leaves, theirs, strict=True):
            assert close(own.grad, other.grad.T if turned else other.grad, 1e-4)
        for one in steppers:
            one.step()
            one.zero_grad()
    for own, other in zip(change.leaves, theirs, strict=True):
        assert close(own, other.T if turned else other, 1e-4)
    assert close(ours(model, change.delta()), logits(hf, model), 1e-4)


def test_what_is_no_plain_lora_is_refused(tmp_path):
    model = fresh("llama")
    before, parameters = state(model), list(model.hf.parameters())
    targets = {"target_modules": ["q_proj", "down_proj"]}
    for i, (settings, said) in enumerate((
        ({**targets, "use_dora": True}, r"use_dora=True(.|\n)*lora_magnitude_vector(.|\n)*merge_and_unload"),
        ({**targets, "bias": "lora_only"}, "bias='lora_only'"),
        ({**targets, "lora_bias": True}, r"lora_bias=True(.|\n)*lora_B.bias"),
        ({**targets, "modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({**targets, "init_lora_weights": "pissa"}, "init_lora_weights='pissa': .*other weights than the model's"),
        ({**targets, "trainable_token_indices": [5]}, "trainable_token_indices"),
    )):  # fmt: skip
        folder = saved(
            quietly(peft.get_peft_model, build("llama"), peft.LoraConfig(r=2, **settings)), tmp_path / str(i)
        )
        with pytest.raises(ValueError, match=said):
            wb.Recipe.from_peft(model, folder)
    other = quietly(
        peft.get_peft_model, build("llama"), peft.IA3Config(feedforward_modules=[], target_modules=["k_proj"])
    )
    with pytest.raises(ValueError, match=r"type 'IA3'.*Read are adapters of type LORA"):
        wb.Recipe.from_peft(model, saved(other, tmp_path / "ia3"))
    good = saved(quietly(peft.get_peft_model, build("llama"), peft.LoraConfig(r=2, **targets)), tmp_path / "good")
    with pytest.raises(
        ValueError, match="and 3 more: this model has no such module; the adapter is another model's"
    ) as error:
        wb.Recipe.from_peft(fresh("gpt2"), good)
    assert len(str(error.value).splitlines()) == 3  # what, one reason for all six, what is read
    with pytest.raises(TypeError, match=r"from_peft\(model, folder\): first comes a model of wb\.load; got .*good"):
        wb.Recipe.from_peft(good, model)
    with pytest.raises(TypeError, match=r"first comes a model of wb\.load; got GPT2LMHeadModel"):
        wb.Recipe.from_peft(build("gpt2"), good)
    with pytest.raises(ValueError, match=r"its weight is \[64, 32\], but the factors make \[32, 32\]"):
        wb.Recipe.from_peft(fresh("qwen3"), good)  # the same names, wider heads
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json.*snapshot_download"):
        wb.Recipe.from_peft(model, "someone/an-adapter")
    tensors = load_file(good / "adapter_model.safetensors")
    key = next(name for name in tensors if "lora_A" in name)
    for changed, said in (({key: tensors[key] * float("nan")}, "NaN"), ({key: tensors[key][:1].clone()}, r"lora_A \[1, 48\]"),
                          ({key: None}, "are needed"), (dict.fromkeys(tensors), "holds no lora_A")):  # fmt: skip
        save_file({k: v for k, v in (tensors | changed).items() if v is not None}, good / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            wb.Recipe.from_peft(model, good)
    (good / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        wb.Recipe.from_peft(model, good)
    save_file(tensors | {one: tensors[one][:0] if "lora_A" in one else tensors[one][:, :0] for one in tensors},
              good / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"lora_A \[0, 32\]"):  # of rank 0
        wb.Recipe.from_peft(model, good)
    save_file(tensors, good / "adapter_model.safetensors")
    plain = json.loads((good / "adapter_config.json").read_text())
    for changed in ({"lora_alpha": None}, {"lora_alpha": [8]}, {"alpha_pattern": {"(": 3}}, {"alpha_pattern": 3},
                    {"alpha_pattern": {"q_proj": "much"}}):  # fmt: skip
        (good / "adapter_config.json").write_text(json.dumps(plain | changed))
        with pytest.raises(ValueError, match=r"lora_alpha and alpha_pattern(.|\n)*merge_and_unload"):
            wb.Recipe.from_peft(model, good)
    for changed, more in (({"r": 8}, ""), ({"rank_pattern": {"q_proj": 8}}, "q_proj")):  # peft, too, would not load it
        (good / "adapter_config.json").write_text(json.dumps(plain | changed))
        with pytest.raises(ValueError, match=rf"{more}.*its factors have rank 2, but adapter_config.json says 8"):
            wb.Recipe.from_peft(model, good)
    (good / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        wb.Recipe.from_peft(model, good)
    assert unchanged(model, before, parameters)


def test_what_no_adapter_can_hold_is_refused(llama, tmp_path, monkeypatch):
    name = "model.layers.1.mlp.down_proj.weight"
    low = wb.Delta(weights={f"{name}.left": numbers(32, 3), f"{name}.right": numbers(3, 48, seed=1)})
    for made, said in (
        (wb.Recipe([wb.Zero("z.1.1"), low, wb.Add("resid_post.1", numbers(32))]),
         r"Zero(.|\n)*Add(.|\n)*activations(.|\n)*bake"),
        (wb.Recipe([wb.Delta(weights={"model.norm.weight": numbers(32)})]), "model.norm.weight: LoRA changes matrices"),
        (wb.Recipe([wb.Delta(weights={name: numbers(32, 48)})]), "rank 19 .the most that saves anything. loses 0.*rank=32"),
        (wb.Recipe([0 * low]), "changes no weight"),
        (wb.Recipe([wb.Delta(weights={name: torch.zeros(32, 48)})]), "changes no weight"),
        (wb.Recipe([wb.Delta(weights={"model.layers.1.mlp.up.weight": numbers(48, 32)})]), "Did you mean"),
        (wb.Recipe([low], "", "0123"), "made for model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            made.to_peft(llama, tmp_path / "x")
    every = [one for one, weight in llama.hf.named_parameters() if weight.dim() == 2 and "layers" in one]
    whole = wb.Recipe([wb.Delta(weights={one: numbers(*llama.hf.get_parameter(one).shape) for one in every})])
    with pytest.raises(ValueError, match=rf"and {len(every) - 3} more: rank 1 loses up to .*give rank=32") as error:
        whole.to_peft(llama, tmp_path / "x", rank=1)
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(TypeError, match=r"to_peft\(model, folder\): first comes a model"):
        whole.to_peft(tmp_path / "x", llama)
    assert _listed([(f"w{i}", f"reason {i}") for i in range(9)])[4:] == ["- ... and 5 more reasons."]
    for rank in (0, -1, 2.5, "2", True):
        with pytest.raises(ValueError, match=f"rank={rank!r}: give a whole number from 1"):
            wb.Recipe([low]).to_peft(llama, tmp_path / "x", rank=rank)
    for tolerance in (float("nan"), 1.0, 2.0, -1, "1e-3", None):
        with pytest.raises(ValueError, match=f"tolerance={tolerance!r}: give a share from 0 to below 1"):
            wb.Recipe([low]).to_peft(llama, tmp_path / "x", tolerance=tolerance)
    opt = fresh("opt")
    table = "model.decoder.embed_positions.weight"  # an Embedding that is called in a way of its own
    left = numbers(len(opt.hf.get_parameter(table)), 1)
    learned = wb.Delta(weights={f"{table}.left": left, f"{table}.right": numbers(1, 32)})
    with pytest.raises(ValueError, match=f"{table}: LoRA changes"):
        wb.Recipe([learned]).to_peft(opt, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    # what a lower rank loses is the norm of the singular values left out, and the adapter is then the nearest one
    sizes = torch.linalg.svdvals(low.difference(name).double())
    share = float(sizes[2] / sizes[:3].norm())
    with pytest.raises(ValueError, match=rf"rank 2 loses {share:.2g} of the change.*give rank=3"):
        wb.Recipe([low]).to_peft(llama, tmp_path / "x", rank=2)
    folder = wb.Recipe([low]).to_peft(llama, tmp_path / "x", rank=2, tolerance=1.01 * share)
    near = next(iter(wb.Recipe.from_peft(llama, folder))).difference(name)
    assert float((near - low.difference(name)).norm() / sizes[:3].norm()) == pytest.approx(share, rel=1e-4)
    kept = (folder / "adapter_model.safetensors").read_bytes()
    for error in (KeyboardInterrupt(), OSError("disk full")):  # an error leaves the old adapter whole
        with monkeypatch.context() as patch:
            patch.setattr(wb.storage.os, "replace", Mock(side_effect=error))
            with pytest.raises(type(error)):
                wb.Recipe([low]).to_peft(llama, folder)
        assert (folder / "adapter_model.safetensors").read_bytes() == kept
    assert sorted(one.name for one in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
