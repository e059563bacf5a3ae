"""The survey as a table: which method locates which object, by which call, in which notebook, after which paper.

    python survey_map.py             (prints the two tables; --write puts them into ../README.md between its marks)

Example row:
    Method("magnitude.contrast", "neuron z ...", "10_locate_magnitude", "H-Neurons, Whispering Experts", "safety, persona")
What is offered here is what tests/contracts/test_locate.py holds the package to, in both directions: offered objects are scored
with null and cost, all others are refused with a sentence.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
NOTEBOOKS = {path.stem for path in (README.parent / "notebooks").glob("*.ipynb")}
START, END = "<!-- survey map: python data/survey_map.py --write -->", "<!-- end of survey map -->"
STREAM = ("resid_pre", "resid_mid", "resid_post")
BLOCKS = ("attn_out", "mlp_out")
QKV = ("q", "k", "v")
EXPERTS = ("router", "expert")
COLUMNS = {"stream": STREAM, "embedding": ("embed",), "blocks": BLOCKS, "heads": ("z",), "q, k, v": QKV,
           "attention": ("attn_scores", "pattern"), "neurons": ("neuron",), "experts": EXPERTS, "SAE features": ("feature",)}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One way of locating: the call under `wb.locate`, the kinds of component it scores, where it is taught, its source."""

    call: str
    kinds: tuple[str, ...]
    notebook: str
    paper: str
    serves: str  # applications in which the survey's papers use it


RANKINGS = (
    Method("magnitude.contrast", ("embed", *STREAM, *BLOCKS, *QKV, "z", "neuron", "expert", "ln_final"), "10_locate_magnitude",
           "Suau et al. 2024", "safety, persona, knowledge"),
    Method("magnitude.language_neurons", ("neuron",), "10_locate_magnitude", "Tang et al. 2024", "multilingualism"),
    Method("magnitude.pattern_scores", ("pattern", "z"), "10_locate_magnitude", "Olsson et al. 2022", "reasoning, inference"),
    Method("magnitude.wanda", ("z", "neuron"), "10_locate_magnitude", "Sun et al. 2024; Wei et al. 2024", "safety, inference"),
    Method("magnitude.weight_norms", ("z", "neuron"), "10_locate_magnitude", "data-free baseline", "inference"),
    Method("causal.patch", (*STREAM, *BLOCKS, *QKV, "attn_scores", "pattern", "z", "neuron", *EXPERTS, "feature"), "12_locate_causal",
           "Vig et al. 2020; Zhang and Nanda 2024", "fairness, knowledge, reasoning"),
    Method("causal.ablate", (*STREAM, *BLOCKS, *QKV, "attn_scores", "pattern", "z", "neuron", *EXPERTS, "feature"), "12_locate_causal",
           "Wang et al. 2022; Li and Janson 2024", "safety, reasoning, inference"),
    Method("gradient.attribution_patch", (*STREAM, *BLOCKS, *QKV, "attn_scores", "pattern", "z", "neuron", *EXPERTS, "feature"), "13_locate_gradient",
           "Nanda 2022; Kramár et al. 2024", "fairness, persona, knowledge"),
    Method("gradient.relevance_patch", (*STREAM, *BLOCKS, "v", "z", "neuron", "feature"), "13_locate_gradient", "Jafari et al. 2025",
           "reasoning"),
    Method("gradient.knowledge_neurons", ("neuron",), "13_locate_gradient", "Dai et al. 2022", "knowledge"),
    Method("gradient.weight_importance", (*QKV, *BLOCKS, "z", "neuron"), "13_locate_gradient", "Lee et al. 2019; Wei et al. 2024",
           "safety, training"),
    Method("probing.probe", ("embed", *STREAM, *BLOCKS, *QKV, "z", "neuron", *EXPERTS, "ln_final"), "14_locate_probing",
           "Hewitt and Liang 2019; Gurnee et al. 2023", "safety, persona, knowledge"),
    Method("vocabulary.logit_attribution", ("embed", *BLOCKS, "z", "neuron"), "11_locate_vocabulary", "Elhage et al. 2021",
           "fairness, reasoning"),
    Method("vocabulary.copying_scores", ("z",), "11_locate_vocabulary", "Elhage et al. 2021", "reasoning"),
    Method("features.find", ("feature",), "16_locate_features", "Arad et al. 2025; Marks et al. 2025", "safety, persona"),
)  # fmt: skip
# calls whose result is a reading, a test or a circuit rather than a ranking of components
READINGS = (
    ("magnitude.block_influence", "how much each layer turns the stream", "10_locate_magnitude", "Men et al. 2024"),
    ("magnitude.massive_activations", "outliers of the stream; sinks, super_weights beside it", "10_locate_magnitude", "Sun et al. 2024b"),
    ("magnitude.expert_use", "which experts a set of texts is sent to", "10_locate_magnitude", "survey, experts"),
    ("causal.joint_ablation", "what components do only together; self-repair", "12_locate_causal", "McGrath et al. 2023"),
    ("causal.trace", "states that bring a fact back after noise", "12_locate_causal", "Meng et al. 2022"),
    ("causal.knockout", "attention edges an answer needs", "12_locate_causal", "Geva et al. 2023"),
    ("causal.path_patch", "paths from senders to receivers", "12_locate_causal", "Goldowsky-Dill et al. 2023"),
    ("causal.between", "what differs between two models or checkpoints", "12_locate_causal", "Prakash et al. 2024"),
    ("gradient.saliency", "tokens an answer hangs on; integrated_gradients beside it", "13_locate_gradient", "Sundararajan et al. 2017"),
    ("probing.erase", "is what a probe reads needed?", "14_locate_probing", "Belrose et al. 2023"),
    ("probing.das", "a subspace that carries a variable", "14_locate_probing", "Geiger et al. 2024"),
    ("vocabulary.logit_lens", "what the stream says at each layer; tuned_lens beside it", "11_locate_vocabulary", "nostalgebraist 2020; Belrose et al. 2023b"),
    ("vocabulary.ov_circuit", "what a head copies, qk_circuit: what it looks for", "11_locate_vocabulary", "Elhage et al. 2021"),
    ("vocabulary.neuron_vocabulary", "what a neuron promotes", "11_locate_vocabulary", "Geva et al. 2022"),
    ("vocabulary.backward_lens", "what a gradient would write", "11_locate_vocabulary", "Katz et al. 2024"),
    ("vocabulary.patchscope", "what a hidden state says in another prompt", "11_locate_vocabulary", "Ghandeharioun et al. 2024"),
    ("circuit.eap_ig", "edges by gradient; eap, flow beside it", "15_locate_circuit", "Syed et al. 2023; Hanna et al. 2024"),
    ("circuit.nodes", "SAE features, error terms, heads and FFNs in one ranking; keep, feature_edges beside it", "16_locate_features", "Marks et al. 2025"),
    ("circuit.exact", "edges by real runs; acdc, masks beside it", "15_locate_circuit", "Conmy et al. 2023; Bhaskar et al. 2024"),
    ("circuit.curve", "faithfulness over sizes, CPR and CMD", "15_locate_circuit", "Mueller et al. 2025"),
    ("features.train", "a sparse autoencoder; evaluate, contexts beside it", "16_locate_features", "Bussmann et al. 2024"),
)  # fmt: skip


def number(notebook: str) -> str:
    """Of a notebook that is there already."""
    return notebook[:2] if notebook in NOTEBOOKS else ""


def tables() -> str:
    """Both tables in Markdown."""
    lines = [
        f"| `wb.locate.` | {' | '.join(COLUMNS)} | notebook | source | used for |",
        "|---|" + ":-:|" * len(COLUMNS) + "---|---|---|",
    ]
    for one in RANKINGS:
        marks = [
            "●" if set(kinds) <= set(one.kinds) else "◐" if set(kinds) & set(one.kinds) else ""
            for kinds in COLUMNS.values()
        ]
        lines.append(f"| `{one.call}` | {' | '.join(marks)} | {number(one.notebook)} | {one.paper} | {one.serves} |")
    lines += ["", "| `wb.locate.` | tells | notebook | source |", "|---|---|---|---|"]
    lines += [f"| `{call}` | {what} | {number(notebook)} | {paper} |" for call, what, notebook, paper in READINGS]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    if not parser.parse_args().write:
        print(tables())
        return
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    README.write_text(f"{before}{START}\n{tables()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
