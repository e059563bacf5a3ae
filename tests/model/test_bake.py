"""Checkpoints and scripts that do what a recipe does: run in fresh processes, without the workbench."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import byte_bpe
import pytest
import torch
from safetensors.torch import load_file
from test_edit import close, deltas, folding, numbers
from tiny import CONFIGS, build, tokenizer
from transformers import AutoModelForCausalLM

import workbench as wb
from workbench.task import DATA

REAL = Path(__file__).parents[3] / "shared" / "models" / "stories260K"  # where the project lies beside it

FAMILIES = {name: lambda name=name: wb.load(build(name), tokenizer=tokenizer()) for name in CONFIGS}
LOADED = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "workbench" not in sys.modules
found = {}
for folder in sys.argv[2:]:
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([json.load(open(folder + "/../prompt.json"))])
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found[folder + " logits"] = hf(ids).logits[0].float()
    made = hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    found[folder + " text"] = made[0, ids.shape[1]:].contiguous()
save_file(found, sys.argv[1])
"""
RUN = """
import json, runpy, sys
from safetensors.torch import save_file
found = {}
for folder in sys.argv[2:]:
    script = runpy.run_path(folder + "/code.py")
    found[folder] = script["logits"](json.load(open(folder + "/../text.json")))
    print(script["generate"](json.load(open(folder + "/../text.json")), 5))
assert "workbench" not in sys.modules
save_file(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A GPT-2 with byte-level BPE tokens, as one's own model would be."""
    folder = tmp_path_factory.mktemp("byte_bpe")
    byte_bpe._train(folder, 40, 1)
    return wb.load(folder)


def fresh(code: str, *arguments) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=arguments[0].parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def bakes(model):
    """A recipe of much that a stock checkpoint of this model can hold."""
    found = []
    for one in folding(model, 4)[0]:
        try:
            wb.model.bake._config(model, wb.model.fold.Folded(model, one))
            found.append(one)
        except ValueError as error:
            assert "has no place for these biases" in str(error)
    recipe = wb.Recipe([deltas(model), *found], "much").for_model(model)
    try:
        wb.model.fold.Folded(model, recipe)
    except ValueError:  # a push between the projections of the stream
        recipe = wb.Recipe([deltas(model), *found[:2]], "less").for_model(model)
    return recipe


def test_every_family_reloads_equal_in_plain_transformers(tmp_path, words, course, byte_model):
    """Saved, loaded, baked, loaded again by another process: equal logits and the same greedy text."""
    models = {name: make() for name, make in FAMILIES.items()} | {"course": course, "byte_bpe": byte_model}
    prompts = dict.fromkeys(models, words(7)[0]) | {
        "course": "the capital of kenya is",
        "byte_bpe": byte_bpe.TEMPLATES[0],
    }
    folders = []
    for name, model in models.items():
        recipe = bakes(model)
        recipe.save(tmp_path / name / "recipe")
        again = wb.Recipe.load(tmp_path / name / "recipe")
        assert again == recipe and len(recipe) >= 3
        folders.append(again.bake(model, tmp_path / name / "baked"))
        (tmp_path / name / "prompt.json").write_text(json.dumps(model.ids(prompts[name]).tolist()))
    fresh(LOADED, tmp_path / "found", *folders)
    found = load_file(tmp_path / "found")
    for (name, model), folder in zip(models.items(), folders):
        recipe = wb.Recipe.load(tmp_path / name / "recipe")
        expected = model.logits(prompts[name], recipe, positions="all")[0]
        assert close(found[f"{folder} logits"], expected), name
        assert not close(expected, model.logits(prompts[name], positions="all")[0], 1e-2)
        made = model.generate_ids(prompts[name], recipe, max_new_tokens=6)[0].tolist()
        assert found[f"{folder} text"].tolist()[: len(made)] == made, name


@pytest.mark.parametrize("which", ["stories260K", "byte_bpe"])
def test_a_model_that_was_trained_elsewhere(which, tmp_path, byte_model):
    """Saved, used by another process bit for bit, baked there, loaded by plain transformers: equal, up to the rounding of
    float32.

    How much that is, float64 says: there folded and hooked are the same float32 numbers, and in float32 neither is further
    from them than what the untouched model makes of its own weights (1.1e-5 on stories260K, whose logits reach 20).
    """
    if which == "stories260K" and not REAL.is_dir():
        pytest.skip("../shared/models/stories260K does not lie beside this project")
    folder, text = (REAL, "Once upon a time, there was a little girl") if which == "stories260K" else (
        byte_model.hf.name_or_path, "when nora and john went to the store , john gave the book to")  # fmt: skip
    model, exact = wb.load(folder), wb.load(folder, dtype=torch.float64)
    stream = model.activations(text, f"resid_post.{model.names.n_layers // 2}")[0]
    apart = wb.ProjectOut(["embed", "attn_out.*", "mlp_out.*"], stream[-1] - stream[0])
    recipe = wb.Recipe([wb.Zero(["z.1.0", "neuron.1.3"]), wb.Scale("mlp_out.1", 0.5), apart], "all at once").for_model(
        model
    )
    recipe.save(tmp_path / "recipe")
    code = """
import sys, workbench as wb
from safetensors.torch import save_file
out, recipe, name, text, baked = sys.argv[1:]
model, recipe = wb.load(name), wb.Recipe.load(recipe)
save_file({"logits": model.logits([text], recipe, positions="all")[0]}, out)
print(repr(model.generate(text, recipe, max_new_tokens=20)))
print(repr(wb.load(recipe.bake(model, baked)).generate(text, max_new_tokens=20)))
"""
    said = fresh(code, tmp_path / "found", tmp_path / "recipe", folder, text, tmp_path / "baked").splitlines()
    plain, hooked = (model.logits([text], *made, positions="all")[0] for made in ((), recipe))
    assert torch.equal(load_file(tmp_path / "found")["logits"], hooked) and not close(hooked, plain, 1e-2)
    assert said == [repr(model.generate(text, recipe, max_new_tokens=20))] * 2

    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", attn_implementation="eager").eval()
    ids = model.ids(text)[None]
    with torch.no_grad():
        baked = hf(ids).logits[0]
    assert close(baked, hooked, 3e-6)
    tokens = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    made = model.generate_ids(text, recipe, max_new_tokens=20)[0].tolist()
    assert tokens.tolist()[: len(made)] == made != model.generate_ids(text, max_new_tokens=20)[0].tolist()

    true_plain, true = (exact.logits([text], *made, positions="all")[0] for made in ((), recipe))
    with exact.edited(*recipe):
        assert close(exact.logits([text], positions="all")[0], true, torch.finfo(torch.float32).eps)
    rounding = (plain - true_plain).abs().max()
    assert all((one - true).abs().max() <= 3 * rounding for one in (baked, hooked))


def test_a_saved_recipe_is_baked_by_another_process(tmp_path, course):
    """The habit of the bundled model pushed along, a head off, a direction written nowhere, other weights."""
    d, name = course.names.d_model, "model.layers.2.mlp.down_proj"
    factors = {f"{name}.weight.left": numbers(d, 2), f"{name}.weight.right": 0.01 * numbers(2, course.names.d_mlp)}
    recipe = wb.Recipe([wb.Zero("z.4.2"), wb.ProjectOut(["resid_pre.0", "attn_out.*", "mlp_out.*"], numbers(d)),
                        wb.Scale("neuron.3.*", 0.8), 2 * wb.Delta(weights=factors)], "several").for_model(course)  # fmt: skip
    recipe.save(tmp_path / "recipe")
    code = ("import sys, workbench as wb; folder = sys.argv[1]\n"
            "wb.Recipe.load(folder).bake(wb.load('course'), folder + '/../baked')")  # fmt: skip
    fresh(code, tmp_path / "recipe")
    again, prompts = (
        wb.load(tmp_path / "baked"),
        ["the capital of kenya is", "user : i am tired today . where is paris ?"],
    )
    assert close(again.logits(prompts), course.logits(prompts, recipe))
    assert again.generate(prompts, max_new_tokens=12) == course.generate(prompts, recipe, max_new_tokens=12)
    assert again.bos == course.bos and again.tokenizer.chat_template == course.tokenizer.chat_template
    assert again.fingerprint != course.fingerprint


def test_every_family_has_a_script_that_does_the_same(tmp_path, words, byte_model):
    # transformers reads every tokenizer beside a qwen2 as its own kind
    models, folders = {name: FAMILIES[name]() for name in CONFIGS if name != "qwen2"} | {"byte_bpe": byte_model}, []
    prompts = dict.fromkeys(models, words(5)[0]) | {"byte_bpe": byte_bpe.TEMPLATES[0]}
    recipes = {}
    for name, model in models.items():
        d = model.names.d_model
        own = [*folding(model, 2 if name == "llama" else 5)[0], wb.Add("resid_post.1@-2", numbers(d), 2.0, "norm"),
               wb.Scale("resid_post.0@1", 1.5), wb.Zero("attn_out.1", phase="prompt"), wb.Clamp(["z.1.0", "z.1.2"], 0.3),
               wb.Add("resid_post.1", numbers(d, seed=2), phase="generation"), 0.5 * deltas(model)]  # fmt: skip
        *_, matrix = (one for one in deltas(model).names if ".2." in one)  # what the last FFN writes with
        rows, columns = model.hf.get_parameter(matrix).shape
        own.append(
            -2 * wb.Delta(weights={f"{matrix}.left": numbers(rows, 2), f"{matrix}.right": 0.2 * numbers(2, columns)})
        )
        if model.names.experts:
            own += [wb.Add("router.0", numbers(model.names.n_experts)), wb.Clamp(["expert.1.3", "expert.1.0"], 0.3),
                    wb.Zero("expert.1.2@2"), wb.Scale("expert.2.*", 0.5, phase="generation")]  # fmt: skip
        if "resid_mid" not in model.names.refused:
            own.append(wb.Scale("resid_mid.1@-1", 1.5))
        recipes[name] = wb.Recipe(own, 'quotes """ and more')
        plain = None if name == "byte_bpe" else wb.Recipe([]).bake(model, tmp_path / name / "plain")
        text = recipes[name].to_code(model, tmp_path / name / "script", name=plain)
        assert "import workbench" not in text and (tmp_path / name / "script" / "code.py").read_text() == text
        (tmp_path / name / "text.json").write_text(json.dumps(prompts[name]))
        folders.append(tmp_path / name / "script")
    said = fresh(RUN, tmp_path / "found", *folders).splitlines()
    found = load_file(tmp_path / "found")
    for (name, model), folder, text in zip(models.items(), folders, said, strict=True):
        expected = model.logits(prompts[name], recipes[name], positions="all")[0]
        assert close(found[str(folder)], expected), name
        assert text.strip() == model.generate(prompts[name], recipes[name], max_new_tokens=5), name


def test_the_note_says_what_was_folded(tmp_path):
    model = FAMILIES["gemma2"]()
    recipe = wb.Recipe([wb.ProjectOut("resid_pre.0", torch.ones(32)), wb.Mean("z.1.1", torch.ones(16))], "why")
    note = json.loads((recipe.bake(model, tmp_path / "x") / "baked.json").read_text())
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert note["recipe"] == "why" and len(note["folded"]) == 2 and note["fingerprint"] == model.fingerprint
    assert note["untied"] and config["tie_word_embeddings"] is False
    assert note["biases_added"] == ["model.layers.1.self_attn.o_proj.bias"] and config["attention_bias"] is True
    assert "model.embed_tokens.weight" in note["changed"] and "lm_head.weight" not in note["changed"]
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.hf.lm_head.weight)
    assert not any(
        one.any() for name, one in stored.items() if name.endswith("bias") and "layers.1.self_attn.o_" not in name
    )
    again = wb.load(tmp_path / "x")
    assert close(again.logits("w5 w6"), model.logits("w5 w6", recipe))
    recipe.bake(model, tmp_path / "half", torch.bfloat16)
    assert wb.load(tmp_path / "half", dtype="auto").hf.dtype == torch.bfloat16


def test_a_tokenizer_that_transformers_misreads_is_said(tmp_path):
    """Whatever tokenizer stands beside a qwen2, AutoTokenizer takes it for Qwen2's."""
    with pytest.warns(UserWarning, match="AutoTokenizer takes this tokenizer for a Qwen2Tokenizer"):
        wb.Recipe([wb.Zero("z.1.1")]).bake(FAMILIES["qwen2"](), tmp_path / "x")
    assert "TokenizersBackend.from_pretrained" in json.loads((tmp_path / "x" / "baked.json").read_text())["tokenizer"]
    wb.Recipe([wb.Zero("z.1.1")]).bake(FAMILIES["qwen3"](), tmp_path / "y")
    assert json.loads((tmp_path / "y" / "baked.json").read_text())["tokenizer"] == "as it was"


def test_a_bias_needs_an_architecture_that_has_it(tmp_path, words):
    """Ministral has no switch for biases: folded for a while, but no checkpoint."""
    model, push = FAMILIES["ministral"](), wb.Add("resid_post.1", numbers(32))
    with model.edited(push):
        got = model.logits(words(5))
    assert close(got, model.logits(words(5), push))
    with pytest.raises(
        ValueError, match=r"'ministral' has no place(.|\n)*Add at resid_post.1: needs model.layers.1.mlp.down_proj.bias"
    ):
        wb.Recipe([push]).bake(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_all_or_nothing(tmp_path, llama, monkeypatch):
    recipe = wb.Recipe([wb.Zero("z.1.1")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds something else"):
        recipe.bake(llama, tmp_path / "mine")
    with pytest.raises(ValueError, match="acts at one position"):
        wb.Recipe([wb.Zero("z.1.1@-1")]).bake(llama, tmp_path / "x")
    with pytest.raises(ValueError, match="made for model"):
        wb.Recipe([wb.Zero("z.1.1")], "", "0123").bake(llama, tmp_path / "x")
    with llama.edited(recipe), pytest.raises(ValueError, match="Bake outside"):
        recipe.bake(llama, tmp_path / "x")
    recipe.bake(llama, tmp_path / "good")
    kept = (tmp_path / "good" / "model.safetensors").read_bytes()
    for error in (KeyboardInterrupt(), OSError("disk full")):
        with monkeypatch.context() as patch:
            patch.setattr(wb.model.bake, "_write", Mock(side_effect=error))
            with pytest.raises(type(error)):
                wb.Recipe([wb.Zero("z.0.1")]).bake(llama, tmp_path / "good")
    with monkeypatch.context() as patch:  # what was written is not what was meant: found out by loading it
        patch.setattr(wb.model.bake, "_logits_of", lambda *_: torch.ones(2, 64))
        with pytest.raises(ValueError, match="does not give the same logits"):
            wb.Recipe([wb.Zero("z.0.1")]).bake(llama, tmp_path / "good")
    assert (tmp_path / "good" / "model.safetensors").read_bytes() == kept
    wb.Recipe([wb.Zero("z.0.1")]).bake(llama, tmp_path / "good")  # over an earlier one
    assert (tmp_path / "good" / "model.safetensors").read_bytes() != kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "mine"]


def test_no_script_for_what_it_would_get_wrong(tmp_path, llama, course):
    v = torch.ones(32)
    for one, said in ((wb.Zero("v.1.0"), "v is not written out"), (wb.Zero("z.1.0@subject"), "names a span"),
                      (wb.Add("resid_post.1", v).gated(wb.Gate("resid_post.0@-1", v)), r"\.gated\(None\)"),
                      (wb.Zero("z.1.0"), r"wb.Recipe\(\[\]\).bake")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            wb.Recipe([one]).to_code(llama, tmp_path / "x", name="somewhere" if "bake" not in said else None)
    step = wb.load("course", revision=wb.revisions("course")[0])
    with pytest.raises(ValueError, match="no name for its weights"):
        wb.Recipe([wb.Zero("z.1.0")]).to_code(step)
    assert not list(tmp_path.iterdir())
    assert str(DATA / "course") in wb.Recipe([wb.Zero("z.1.0")]).to_code(course)
