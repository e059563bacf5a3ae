"""On a GPU every call gives what it gives on the processor; skipped where there is none.

`WORKBENCH_TEST_DEVICE=cpu pytest tests/test_cuda.py` runs the calls themselves anywhere.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.locate import causal, circuit, features, gradient, magnitude, probing, vocabulary
from workbench.steer import amplitude, optimization, vector

DEVICE = os.environ.get("WORKBENCH_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")

IOI, CITY, MOOD, SIGNS = (wb.Task.load(name) for name in ("ioi", "person_city", "mood", "cheerful"))
FEW, FACTS = IOI.split("test")[:6], CITY.split("test")[:4]
SILENT = ("seconds", "cost", "seed")
PROMPTS = ["where is paris ?", "user : where is paris ? assistant :"]
EDIT = {"prompt": "paris is in", "subject": "paris", "target_new": "kenya"}
QUIET = {"progress": False}
SHORT = {"steps": 4, "progress": False, "budget": 10.0}


def small(task, n=24):
    """n rows of each split."""
    return wb.Task([row for split in ("fit", "select", "test", "ood") for row in task.split(split).rows[:n]], task.name)


def attached(model):
    if "course" in model.names.saes:
        model.detach("course")
    return model.attach(wb.SAE.load(wb.task.DATA / "sae" / "course"))


def numbers(found) -> np.ndarray:
    """Every number that a result holds, in order; times are left out."""
    if isinstance(found, torch.Tensor):
        return found.detach().float().cpu().numpy().ravel()
    if hasattr(found, "select_dtypes"):
        return np.ravel(found.select_dtypes("number").drop(columns=["seconds", "ms"], errors="ignore").to_numpy(float))
    if dataclasses.is_dataclass(found):
        found = {
            field.name: getattr(found, field.name) for field in dataclasses.fields(found) if field.name not in SILENT
        }
    elif hasattr(found, "interventions"):
        found = list(found.interventions)
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found, key=str)]
    if isinstance(found, (list, tuple)):
        return np.concatenate([np.zeros(0), *(numbers(one) for one in found)])
    return (
        np.ravel(found).astype(float)
        if isinstance(found, (float, np.ndarray)) and np.asarray(found).dtype.kind in "fiub"
        else np.zeros(0)
    )


CALLS = {
    "logits": lambda m: m.logits(["where is paris ?", "paris is in"]),
    "patch z": lambda m: causal.patch(m, FEW, "z.*.*", **QUIET),
    "patch stream": lambda m: causal.patch(m, FEW, "resid_pre", positions="each", **QUIET),
    "patch pattern": lambda m: causal.patch(m, FEW[:2], "pattern.5.*", **QUIET),
    "ablate": lambda m: causal.ablate(m, FEW, "z.*.*", **QUIET),
    "ablate by resampling": lambda m: causal.ablate(m, FEW, "mlp_out.*", "resample", **QUIET),
    "trace": lambda m: causal.trace(m, FACTS, subject="subject", draws=2, **QUIET),
    "knockout": lambda m: causal.knockout(m, FACTS, "subject", **QUIET),
    "path_patch": lambda m: causal.path_patch(m, FEW, "z.5.*", "logits", **QUIET),
    "joint_ablation": lambda m: causal.joint_ablation(m, FEW, ["z.5.4", "z.0.2"], random=2, **QUIET),
    "between": lambda m: causal.between(m, wb.load("course", revision="step1500", device=m.hf.device), FEW, "z.*.*", **QUIET),
    "attribution_patch": lambda m: gradient.attribution_patch(m, FEW, "z.*.*", qk_fix=False),
    "attribution_patch q": lambda m: gradient.attribution_patch(m, FEW, "q.*.*", qk_fix=True, grad_drop=True),
    "relevance_patch": lambda m: gradient.relevance_patch(m, FEW, "z.*.*"),
    "saliency": lambda m: gradient.saliency(m, FEW),
    "integrated_gradients": lambda m: gradient.integrated_gradients(m, FEW[:2], steps=16, **QUIET),
    "knowledge_neurons": lambda m: gradient.knowledge_neurons(m, FACTS, steps=3, **QUIET),
    "weight_importance": lambda m: gradient.weight_importance(m, FEW),
    "contrast": lambda m: magnitude.contrast(m, small(MOOD), "neuron.5.*", draws=20),
    "wanda": lambda m: magnitude.wanda(m, FEW, "neuron.5.*", draws=20),
    "eap in bfloat16": lambda m: circuit.eap(wb.load("course", dtype=torch.bfloat16, device=m.hf.device), FEW, null=False),
    "weight_norms": lambda m: magnitude.weight_norms(m),
    "weight_norms of neurons": lambda m: magnitude.weight_norms(m, "neuron.5.*"),
    "language_neurons": lambda m: magnitude.language_neurons(m, small(wb.Task.load("language_id")), draws=20),
    "sinks": lambda m: magnitude.sinks(m, "background"),
    "massive_activations": lambda m: magnitude.massive_activations(m, "background"),
    "block_influence": lambda m: magnitude.block_influence(m, FEW, draws=20),
    "pattern_scores": lambda m: magnitude.pattern_scores(m, prompts=4),
    "logit_attribution": lambda m: vocabulary.logit_attribution(m, FEW, draws=20),
    "copying_scores": lambda m: vocabulary.copying_scores(m, "z.5.*", draws=5),
    "ov_circuit": lambda m: vocabulary.ov_circuit(m, "z.5.4", draws=5),
    "qk_circuit": lambda m: vocabulary.qk_circuit(m, "z.5.4", draws=5),
    "logit_lens": lambda m: vocabulary.logit_lens(m, ["paris is in"]),
    "tuned_lens": lambda m: vocabulary.logit_lens(m, ["paris is in"], tuned=vocabulary.tuned_lens(m, steps=3, tokens=500, **QUIET)),
    "backward_lens": lambda m: vocabulary.backward_lens(m, FEW[:2]),
    "patchscope": lambda m: vocabulary.patchscope(m, ["paris is in"]),
    "neuron_vocabulary": lambda m: vocabulary.neuron_vocabulary(m, ["neuron.5.3"]),
    "probe": lambda m: probing.probe(m, small(MOOD), "resid_post.5@-1", draws=2),
    "erase": lambda m: probing.erase(m, small(MOOD), "resid_post.5@-1", draws=2),
    "das": lambda m: probing.das(m, small(MOOD), "resid_post.5@-1", steps=3, draws=2),
    "eap": lambda m: circuit.eap(m, FEW),
    "eap_ig": lambda m: circuit.eap_ig(m, FEW, steps=2),
    "flow": lambda m: circuit.flow(m, FEW[:2]),
    "curve": lambda m: circuit.curve(m, FEW, circuit.eap(m, FEW, null=False), sizes=(0.01, 0.1, 1.0)),
    "exact": lambda m: circuit.exact(m, FEW[:2], ["z.5.4 -> logits", "mlp_out.6 -> logits"], **QUIET),
    "masks": lambda m: circuit.masks(m, FEW[:2], steps=2, **QUIET),
    "faithfulness": lambda m: circuit.faithfulness(m, FEW, circuit.eap(m, FEW, null=False).top(0.1), random=1),
    "nodes": lambda m: circuit.nodes(m, FEW[:3], attached(m).name, steps=2),
    "features.train": lambda m: features.evaluate(m, features.train(m, "background", "resid_post.4", d_sae=64, k=8, steps=5), "background"),
    "features.find": lambda m: features.find(m, small(MOOD), attached(m)),
    "difference_of_means": lambda m: vector.difference_of_means(m, SIGNS, "resid_post.5@-1"),
    "pca": lambda m: vector.pca(m, SIGNS, "resid_post.5@-1"),
    "probe_direction": lambda m: vector.probe_direction(m, small(SIGNS), "resid_post.5@-1"),
    "set_to_mean": lambda m: vector.set_to_mean(m, SIGNS, "resid_post.5@-1"),
    "leace": lambda m: vector.leace(m, SIGNS, "resid_post.5@-1"),
    "function_vector": lambda m: vector.function_vector(m, small(wb.Task.load("in_context"), 8), k=3),
    "iti": lambda m: vector.inference_time_intervention(m, small(SIGNS), k=3),
    "directional_ablation": lambda m: vector.directional_ablation(m, SIGNS, "resid_post.5@-1"),
    "feature_direction": lambda m: vector.feature_direction(m, f"feature.{attached(m).name}.3"),
    "choose": lambda m: vector.choose(m, small(wb.Task.load("refusal"), 8), ["resid_post.5@-1"], "set", kl=9.0, drop=9.0),
    "fit_gate": lambda m: vector.fit_gate(m, small(MOOD), "resid_post.5@-1"),
    "dola": lambda m: vector.dola(m, ["paris is in"]),
    "suppress": lambda m: amplitude.suppress(m, small(MOOD), "neuron.5.*"),
    "clamp_to_max": lambda m: amplitude.clamp_to_max(m, small(MOOD), ["neuron.5.3"]),
    "resample": lambda m: amplitude.resample(m, small(MOOD), ["z.4.2"]),
    "mean": lambda m: amplitude.mean(m, small(MOOD), ["z.4.2"]),
    "rome": lambda m: optimization.rome(m, EDIT, "mlp_out.3@subject", tokens=2000, reach=9.0, **QUIET),
    "memit": lambda m: optimization.memit(m, EDIT, ["mlp_out.2@subject", "mlp_out.3@subject"], tokens=2000, reach=9.0, **QUIET),
    "alphaedit": lambda m: optimization.alphaedit(m, EDIT, "mlp_out.3@subject", tokens=2000, reach=9.0, **QUIET),
    "relearn": lambda m: optimization.relearn(m, optimization.finetune(m, small(CITY), ["z.5.0"], **SHORT), small(CITY), steps=2, every=1, **QUIET),
    "bias_only": lambda m: optimization.bias_only(m, small(MOOD), **SHORT),
    "finetune": lambda m: optimization.finetune(m, small(MOOD), ["z.5.0"], **SHORT),
    "lora": lambda m: optimization.lora(m, small(MOOD), **SHORT),
    "loreft": lambda m: optimization.loreft(m, small(MOOD), "resid_post.5@-1", **SHORT),
    "steering_vector": lambda m: optimization.steering_vector(m, small(MOOD), "resid_post.5@-1", **SHORT),
    "npo": lambda m: optimization.npo(m, small(CITY), small(IOI), **SHORT),
    "rmu": lambda m: optimization.rmu(m, small(CITY), small(IOI), "resid_post.3", **SHORT),
    "evaluate": lambda m: wb.improve.evaluate(m, vector.set_to_mean(m, SIGNS, "resid_post.5@-1"), small(wb.Task.load("cheer"), 12), [small(CITY, 12)], draws=2),
    "dose_response": lambda m: wb.improve.dose_response(m, vector.difference_of_means(m, SIGNS, "resid_post.5@-1"), small(wb.Task.load("cheer"), 8), strengths=(0.0, 1.0)),
    "stream": lambda m: wb.improve.efficiency.stream(m, PROMPTS, "z.4.*"),
    "exit_early": lambda m: list(wb.improve.efficiency.exit_early(m, PROMPTS)),
    "shrink": lambda m: wb.improve.efficiency.shrink(m, layers=[5]).logits(PROMPTS),
    "quantize": lambda m: m.logits(PROMPTS, wb.improve.efficiency.quantize(m, 4)[0]),
    "edges": lambda m: m.logits(["paris is in"], wb.Zero("z.*.*"), wb.Scale("neuron.3.*", 0.5)),
}  # fmt: skip
LOOSE = {
    "eap in bfloat16",
    "memit",
    "alphaedit",
    "relearn",
    "bias_only",
    "masks",
    "features.train",
    "finetune",
    "lora",
    "loreft",
    "steering_vector",
    "npo",
    "rmu",
    "rome",
    "das",
    "tuned_lens",
}  # sums in another order, step upon step


@pytest.fixture(scope="module")
def both():
    return wb.load("course"), wb.load("course", device=DEVICE)


@pytest.mark.parametrize("name", CALLS)
def test_as_on_the_processor(name, both):
    here, there = (numbers(CALLS[name](model)) for model in both)
    assert len(here), "nothing to compare"
    assert here.shape == there.shape and np.array_equal(np.isnan(here), np.isnan(there))
    size = np.nanmax(np.abs(here[np.isfinite(here)]))
    here, there = (np.where(np.isinf(x), 0, x) for x in (here, there))
    off = np.nanmax(np.abs(here - there)) / size
    assert size > 0 and off < (0.1 if name in LOOSE else 2e-3), f"{name}: differs by {off:.1e} of the largest"


def test_generation_and_edits(both):
    here, there = both
    push = vector.difference_of_means(there, SIGNS, "resid_post.5@-1")
    prompt = "user : where is paris ? assistant :"
    assert here.generate(prompt, max_new_tokens=12) == there.generate(prompt, max_new_tokens=12)
    assert here.generate(prompt, push, max_new_tokens=12) == there.generate(prompt, push, max_new_tokens=12)
    before = {key: value.clone() for key, value in there.hf.state_dict().items()}
    with there.edited(wb.Zero("z.4.*")):
        inside = there.logits([prompt])
    assert torch.allclose(inside, there.logits([prompt], wb.Zero("z.4.*")), atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in there.hf.state_dict().items())


def test_a_recipe_made_there_bakes_and_loads_here(both, tmp_path):
    _, there = both
    recipe = wb.Recipe([wb.Zero("z.4.*"), vector.difference_of_means(there, SIGNS, "resid_post.5@-1")])
    recipe.save(tmp_path / "recipe")
    prompt = ["user : where is paris ? assistant :"]
    assert torch.allclose(wb.load("course").logits(prompt, wb.Recipe.load(tmp_path / "recipe")),
                          there.logits(prompt, recipe).cpu(), atol=1e-3)  # fmt: skip
    wb.Recipe([wb.Zero("z.4.*")]).bake(there, tmp_path / "baked")
    assert torch.allclose(
        wb.load(tmp_path / "baked").logits(prompt), there.logits(prompt, wb.Zero("z.4.*")).cpu(), atol=1e-3
    )
