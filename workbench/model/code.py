"""A recipe written out as a plain nnsight script, so that one sees through the tool."""

from __future__ import annotations

from pathlib import Path

import torch

from workbench.component import RANK, Component
from workbench.model.edit import probe
from workbench.model.fold import changed_by_deltas, untied
from workbench.model.plan import _order, _stop, check_recipe
from workbench.operations import Add, Affine, Clamp, Delta, ProjectOut, Replace, Scale, Zero

KINDS = ("embed", "resid_pre", "z", "attn_out", "resid_mid", "router", "neuron", "expert", "mlp_out", "resid_post",
         "ln_final")  # fmt: skip
HEAD = '''"""The recipe {title!r} in plain nnsight: the same logits, without the workbench that made it.

    python THIS_FILE.py "a prompt"

tensors.safetensors, as Recipe.save writes it, must stand beside this file.
"""

import sys
from pathlib import Path

import nnsight
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

hf = AutoModelForCausalLM.from_pretrained({name!r}, dtype={dtype}, attn_implementation={attention!r}{revision}).eval()
tokenizer = AutoTokenizer.from_pretrained({name!r}{revision})
model = nnsight.TransformersModel(hf, tokenizer=tokenizer, task="text-generation")
tensors = {{name: one.to({dtype}) for name, one in load_file(Path(__file__).with_name("tensors.safetensors")).items()}}
{weights}{basis}

@torch.no_grad()
def logits(prompt, generated=()):
    """Logits [position, d_vocab] of a prompt and of the token ids that were generated after it."""
    ids = [{bos}*tokenizer(prompt, add_special_tokens=False).input_ids]
    n = len(ids)  # tokens of the prompt
    batch = torch.tensor([[*ids, *generated]])
    with model.trace({{"input_ids": batch, "attention_mask": torch.ones_like(batch)}}):
{body}        found = nnsight.save(model.output.logits[0].clone())
    return found.float()


def generate(prompt, max_new_tokens=20):
    """The most likely continuation; the whole text is run again for every token."""
    made = []
    while len(made) < max_new_tokens:
        token = int(logits(prompt, made)[-1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return tokenizer.decode(made, skip_special_tokens=True)


if __name__ == "__main__":
    best = logits(sys.argv[1])[-1].topk(5)
    for value, token in zip(best.values.tolist(), best.indices.tolist()):
        print(f"{{value:8.3f}}  {{tokenizer.convert_ids_to_tokens(token)}}")
    print(generate(sys.argv[1]))
'''
BASIS = '''

def basis(direction):
    """Orthonormal columns that span one direction [width], or several as [k, width]."""
    left, size, _ = torch.linalg.svd(torch.atleast_2d(direction).double().T, full_matrices=False)
    return left[:, size > 1e-6 * size[0]].to(direction)
'''


def to_code(model, recipe, name: str | None = None) -> str:
    """Which plain nnsight code does the same? A whole script; its tensors are those that `recipe.save` writes.

    Args:
        name: what transformers loads the model by; by default where this model came from.
    Raises:
        ValueError: listing the interventions that no such script is written for; for a model whose origin is not known.
    """
    check_recipe(model, recipe)
    known, revision = getattr(model.hf, "name_or_path", ""), model.revision
    if name is None and (not known or model.made_from or (revision and Path(known).is_dir())):
        raise ValueError("The script must load this model, but transformers knows no name for its weights. Save them first, "
                         "wb.Recipe([]).bake(model, 'plain'), and give the folder: recipe.to_code(model, name='plain').")  # fmt: skip
    said = f", revision={revision!r}" if revision and name is None else ""
    return HEAD.format(
        title=recipe.name.replace('"', "'") or "without a name", name=str(name or known), dtype=model.hf.dtype, revision=said,
        attention=model.names.attention, weights=_weights(model, recipe), bos=f"{model.tokenizer.bos_token_id}, " if model.bos else "",
        basis=BASIS if any(isinstance(one, ProjectOut) for one in recipe) else "", body=_body(model, recipe),
    )  # fmt: skip


def _weights(model, recipe) -> str:
    """Lines that add the differences of weights."""
    deltas = [(i, one) for i, one in enumerate(recipe) if isinstance(one, Delta) and not one.does_nothing]
    if not deltas:
        return ""
    if untied(model, changed_by_deltas(model, [one for _, one in deltas])):
        raise ValueError("This Delta changes one side of tied embeddings only; no script is written for that. Bake it: "
                         "recipe.bake(model, folder).")  # fmt: skip
    lines, weights = [], dict(model.hf.named_parameters(remove_duplicate=False))
    for i, delta in deltas:
        seen = set()
        for name in delta.names:
            if id(weights[name]) in seen:  # a tied weight under its second name
                continue
            seen.add(id(weights[name]))
            key = f"{i}.{name}"
            value = f'tensors["{key}"]' if name in delta.weights else f'tensors["{key}.left"] @ tensors["{key}.right"]'
            lines.append(f'    hf.get_parameter("{name}").add_({delta.strength!r} * ({value}))\n')
    return "\nwith torch.no_grad():  # other weights\n" + "".join(lines)


def _body(model, recipe) -> str:
    """The lines inside the trace, in forward order, eight spaces deep."""
    stops: dict[tuple, list] = {}
    refused = []
    for i, one in enumerate(recipe):
        if isinstance(one, Delta) or one.does_nothing:
            continue
        reason = _why_not(one)
        if reason:
            refused.append(f"- {one!r}: {reason}")
            continue
        for which, family in enumerate(one.at):
            for component in model.names.expand([family]):
                stops.setdefault(_stop(component), []).append((component, i, one, which))
    if refused:
        raise ValueError("No script is written for these:\n" + "\n".join(refused) + "\nRun them as they are, model.logits(prompt, recipe), "
                         "and save them with recipe.save(folder).")  # fmt: skip
    middles = [layer for (_, layer), steps in stops.items() if any(step[0].kind == "resid_mid" for step in steps)]
    before = {_stop(Component("resid_pre", layer)) for layer in middles}  # resid_mid is resid_pre + attn_out
    stops = dict(sorted((stops | {stop: stops.get(stop, []) for stop in before}).items(), key=_order))
    shapes = model.trace(model.inputs(torch.stack(probe(model))), lambda: _shapes(model.names, stops)) if stops else {}
    lines = []
    for (kind, layer), steps in stops.items():
        steps.sort(key=lambda step: RANK[step[0].canonical.kind])
        lines += _stop_lines(model.names, kind, layer, steps, *shapes[kind, layer], (kind, layer) in before)
    return "".join(f"        {line}\n" for line in lines)


def _why_not(one) -> str | None:
    if one.gate is not None:
        return "a gate reads each prompt first; take it off with .gated(None)."
    for component in one.at:
        if component.kind not in KINDS:
            return f"{component.kind} is not written out; covered are {', '.join(KINDS)}."
        if isinstance(component.position, str):
            return f"{component} names a span, which comes with a task; give its position as a number."
    if isinstance(one, Add) and one.unit == "angle":
        return "turns are not written out; unit='norm' pushes by a share of the local length."
    if not isinstance(one, (*OPERATIONS, Zero)):
        return f"{type(one).__name__} is not written out."
    return None


def _shapes(names, stops) -> dict:
    """Inside a trace: is the module's output a tuple, and are rows and positions flattened into one axis?"""
    found = {}
    for kind, layer in stops:
        place = names.place(kind, layer, 2)
        value = place.envoy.input if place.side == "input" else place.envoy.output
        found[kind, layer] = (isinstance(value, tuple), (value[0] if isinstance(value, tuple) else value).dim() == 2)
    return found


def _stop_lines(names, kind, layer, steps, is_tuple: bool, flat: bool, keep: bool) -> list[str]:
    """Read one tensor, change it, write it back; `keep` it as what the stream was before attention."""
    row, place = names.row, names.place(kind, layer, 1)
    block, (experts, router) = f"model.{row.layers}[{layer}]", names.experts.get(layer, (None, None))
    where = {"embed": f"model.{row.embed}", "ln_final": f"model.{row.ln_final}", "z": f"{block}.{row.heads}",
             "router": f"{block}.{router}.source.F_linear_0", "neuron": f"{block}.{row.neurons}",
             "expert": f"{block}.{experts}", "attn_out": f"{block}.{row.attn_add}", "mlp_out": f"{block}.{row.mlp_add}"}  # fmt: skip
    tensor = f"{where.get(kind, block)}.{place.side}{'s' if kind == 'expert' else ''}"
    lines = [f"x = {tensor}{'[0]' if is_tuple else ''}{'[None]' if flat else ''}.clone()  # [row, position, width]"]
    if kind == "expert":
        lines = [f"(given, chosen, weights), more = {tensor}",
                 f"x = weights.new_zeros(len(chosen), {names.n_experts}).scatter(1, chosen, weights)[None]  # [row, position, expert]"]  # fmt: skip
    if place.scale != 1.0:
        lines.append(f"x *= {place.scale!r}  # what is added to the stream")
    if not steps:
        return [f"pre = {tensor}{'[0]' if is_tuple else ''}"]
    middle = False
    for component, i, one, which in _together(steps):
        if component.kind == "resid_mid" and not middle:
            middle, lines = True, [*lines, "x += pre  # the stream between attention and FFN"]
        lines += _step_lines(names, component, i, one, which)
    if middle:
        lines.append("x -= pre")
    if place.scale != 1.0:
        lines.append(f"x /= {place.scale!r}")
    x = "x[0]" if flat else "x"
    if kind == "expert":  # all of them run, each with its weight
        lines.append(f"every = torch.arange({names.n_experts}).to(chosen).expand(len(chosen), -1)")
        return [*lines, f"{tensor} = ((given, every, {x}), more)"]
    lines.append(f"{tensor} = ({x}, *{tensor}[1:])" if is_tuple else f"{tensor} = {x}")
    return [*lines, "pre = x"] if keep else lines


def _together(steps) -> list:
    """Heads or neurons of one intervention at one position as one step: which becomes [(which, index), ...]."""
    found: list = []
    for component, i, one, which in steps:
        last = found[-1] if found else None
        if component.index is None:
            found.append((component, i, one, which))
        elif last and last[1] == i and last[0].index is not None and last[0].position == component.position:
            last[3].append((which, component.index))
        else:
            found.append((component, i, one, [(which, component.index)]))
    return found


def _step_lines(names, component, i: int, one, which) -> list[str]:
    at = component.position
    if at is None:
        rows = {"both": ":", "prompt": ":n", "generation": "n:"}[one.phase]
    else:
        rows = f"n - {-at}" if at < 0 else str(at)
    if component.index is None:
        return [f"# {one!r}", *_operation(f"x[:, {rows}]", i, one, str(which))]
    width = names.d_head if component.kind == "z" else 1
    noun = "head" if component.kind == "z" else component.kind
    own = f"{noun} * {width} : {noun} * {width} + {width}" if width > 1 else f"{noun} : {noun} + 1"
    (place, index), *more = which
    if not more:
        own = f"{index * width}:{index * width + width}"
        return [f"# {one!r}", *_operation(f"x[:, {rows}, {own}]", i, one, str(place))]
    families = {w for w, _ in which}  # of one family: the same for all; else each has its own
    loop = (
        f"for {noun} in {tuple(n for _, n in which)!r}:"
        if len(families) == 1
        else f"for which, {noun} in {tuple(which)!r}:"
    )
    inner = _operation(f"x[:, {rows}, {own}]", i, one, str(place) if len(families) == 1 else "which")
    return [f"# {one!r}", loop, *(f"    {line}" for line in inner)]


def _operation(x: str, i: int, one, which: str) -> list[str]:
    if isinstance(one, Zero):
        return [f"{x} = 0"]
    return next(make for op, make in OPERATIONS.items() if isinstance(one, op))(x, i, one, which)


def _add(x, i, one, which):
    if one.unit == "raw":
        return [f'{x} += {one.strength!r} * tensors["{i}.vector"]']
    return [f'v = tensors["{i}.vector"]', f"{x} += {one.strength!r} * {x}.norm(dim=-1, keepdim=True) * v / v.norm()"]


def _affine(x, i, one, which):
    matrix = f'tensors["{i}.matrix"]' + (f"[{which}]" if one.matrix.dim() == 3 else "")
    return [f"{x} = {x} @ {matrix}.T + " + f'tensors["{i}.bias"]' + (f"[{which}]" if one.bias.dim() == 2 else "")]


OPERATIONS = {
    Scale: lambda x, i, one, which: [f"{x} *= {one.factor!r}" + (f"[{which}]" if isinstance(one.factor, tuple) else "")],
    Clamp: lambda x, i, one, which: [f"{x} = {one.value!r}"],
    Replace: lambda x, i, one, which: [f'{x} = tensors["{i}.values"]' + (f"[{which}]" if one._one_each else "")],
    Add: _add,
    ProjectOut: lambda x, i, one, which: [f'r = basis(tensors["{i}.direction"])', f"{x} -= ({x} @ r) @ r.T"],
    Affine: _affine,
}  # fmt: skip
