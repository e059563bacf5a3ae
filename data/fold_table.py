"""Which interventions become weights on which architecture? Found by doing it, on the tiny models of tests/tiny.py.

    python fold_table.py             (prints the table; --write puts it into ../README.md between its marks)

Each cell bakes a checkpoint and loads it with plain transformers, which compares the logits:
    ● a stock checkpoint does it    ○ inside `with model.edited(...)` only, since the architecture stores no such bias
    – stays an intervention         (empty) the architecture has no such part
"""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

import workbench as wb

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
START, END = "<!-- fold table: python data/fold_table.py --write -->", "<!-- end of fold table -->"
LEGEND = "● a stock checkpoint does it, ○ inside `with model.edited(...)` only (no such bias is stored), – stays an intervention."


def rows(model) -> dict[str, list]:
    """Label -> the recipes that are tried on this model."""
    rng, names = torch.Generator().manual_seed(0), model.names
    weight = f"{names.row.layers}.1.{names.row.heads}.weight"
    d, h = names.d_model, names.d_head
    v, w, one = torch.randn(d, generator=rng), torch.randn(h, generator=rng), torch.randn(2, generator=rng)
    found = {
        "Zero, Scale, ProjectOut of heads `z`": [wb.Zero("z.1.*"), wb.Scale("z.1.2", 0.5), wb.ProjectOut("z.1.2", w)],
        "Mean, Replace, Affine of heads `z`": [
            wb.Mean("z.1.2", w),
            wb.Replace("z.1.*", w),
            wb.Affine("z.1.2", w.outer(w), w),
        ],
        "Zero, Scale of neurons": [wb.Zero("neuron.1.3"), wb.Scale("neuron.1.*", 2.0)],
        "Mean, Replace, Clamp of neurons": [wb.Mean(["neuron.1.3", "neuron.0.5"], one), wb.Clamp("neuron.1.3", 1.0)],
        "Zero, Scale of experts": [wb.Zero("expert.1.3"), wb.Scale("expert.1.*", 0.5)],
        "Mean, Replace, Clamp of experts": [wb.Mean(["expert.1.3", "expert.0.1"], one), wb.Clamp("expert.1.3", 1.0)],
    }
    for at in ("attn_out", "mlp_out"):
        found |= {
            f"Zero, Scale at `{at}`": [wb.Zero(f"{at}.1"), wb.Scale(f"{at}.*", 0.5)],
            f"ProjectOut at `{at}`": [wb.ProjectOut(f"{at}.1", v)],
            f"Add, Mean, Replace, Affine at `{at}`": [wb.Add(f"{at}.1", v), wb.Mean(f"{at}.1", v), wb.Replace(f"{at}.1", v),
                                                      wb.Affine(f"{at}.1", v.outer(v) / d, v)],
        }  # fmt: skip
    return found | {
        "Add, Scale at `embed`, `resid_pre.0`": [
            wb.Add("embed", v),
            wb.Add("resid_pre.0", v),
            wb.Scale("resid_pre.0", 0.5),
        ],
        "Add at `resid_mid`": [wb.Add("resid_mid.1", v)],
        "Add at `resid_post`": [wb.Add("resid_post.1", v)],
        "ProjectOut at `resid_pre.0`": [wb.ProjectOut("resid_pre.0", v)],
        "ProjectOut of all that writes": [wb.ProjectOut(["resid_pre.0", "attn_out.*", "mlp_out.*"], v)],
        "Scale, ProjectOut at `ln_final`": [wb.Scale("ln_final", 0.5), wb.ProjectOut("ln_final", v)],
        "Add, Mean at `ln_final`": [wb.Add("ln_final", v), wb.Mean("ln_final", v)],
        "Delta": [wb.Delta(weights={weight: 0.1 * torch.randn(model.hf.get_parameter(weight).shape, generator=rng)})],
    }


def cell(model, recipes) -> str:
    """The mark of one row on one model: the worst of its recipes."""
    marks = ""
    for one in recipes:
        if any(place.kind in model.names.refused for place in one.at):
            return ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                with model.edited(one):
                    marks += "○"
                wb.Recipe([one]).bake(model, Path(folder) / "baked")
                marks += "●"
            except ValueError as error:
                if "has no place for these biases" not in str(error) and "do not fold" not in str(error):
                    raise
    if marks.count("○") < len(recipes):
        return "–"
    return "●" if marks.count("●") == len(recipes) else "○"


def column(architecture: str) -> dict[str, str]:
    """Label -> mark, for one architecture."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import build, tokenizer

    model = wb.load(build(architecture), tokenizer=tokenizer())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="AutoTokenizer takes this tokenizer")  # of the tiny models only
        return {label: cell(model, recipes) for label, recipes in rows(model).items()}


def table(columns: dict[str, dict[str, str]]) -> str:
    """Markdown; architectures that agree share a column."""
    groups: dict[tuple, list[str]] = {}
    for name, marks in columns.items():
        groups.setdefault(tuple(marks.items()), []).append(name)
    lines = [
        "| | " + " | ".join(", ".join(names) for names in groups.values()) + " |",
        "|---" * (len(groups) + 1) + "|",
    ]
    for label in dict.fromkeys(label for marks in columns.values() for label in marks):
        lines.append(f"| {label} | " + " | ".join(dict(marks).get(label, "●") for marks in groups) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md between its marks")
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import CONFIGS

    arguments = parser.parse_args()
    transformers.logging.set_verbosity(logging.ERROR)
    text = f"{table({name: column(name) for name in CONFIGS})}\n\n{LEGEND}"
    print(text)
    if arguments.write:
        whole = README.read_text(encoding="utf-8")
        before, rest = whole.split(START)
        README.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
