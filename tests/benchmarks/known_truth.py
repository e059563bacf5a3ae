"""Which locator finds what is certainly there? Plants in the bundled model, by kind and seed, and circuits written by hand.

    python tests/benchmarks/known_truth.py --seeds 10                       # 60 plants and 3 circuits, printed
    python tests/benchmarks/known_truth.py --seeds 10 --out data/known_truth.csv

Each plant (wb.improve.plant) is looked for among its like: planted neurons among all neurons of their layer at the last
token, the saturated head among the keys of all heads, the edited FFN among all FFNs at the subject; circuit methods rank
heads and FFNs (keys, for the saturated head) by the sum of their edges' |scores|. `rank` is that of the true component, of
several the worst. The plant is found when it is no larger than their number and, where the method gives an effect, that is
at least a tenth of the metric's gap (`share`, the least of the true components). A decoy is picked when no true component
scores higher. Joint ablation takes out every pair of the six neurons with the largest contrast, and gives a neuron the
largest share that a pair with it takes away beyond its stronger half.

Of a written circuit, the true edges are those that carry a difference between the two prompts (by exact patching, more
than a twentieth of the largest), and the true nodes their heads and FFNs; AUROC of |score| over all edges or nodes.
"""

import argparse
import contextlib
import csv
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

import workbench as wb
from workbench import measure
from workbench.improve.planting import KINDS
from workbench.locate import causal, circuit, gradient, magnitude

COLUMNS = ("part", "kind", "seed", "method", "rank", "of", "share", "found", "decoy_rank", "decoy_picked", "auroc", "seconds",
           "what")  # fmt: skip
QUIET = {"null": False}
PROMPTS, LEAST = 8, 0.1
WITHIN = {"saturated": "k.*.*", "fact": "mlp_out.*@subject"}
CONTRASTS = ("contrast", "contrast, AUROC")
METHODS = {
    "attribution": lambda model, task, at: gradient.attribution_patch(model, task, at, **QUIET),
    "attribution, QK fix": lambda model, task, at: gradient.attribution_patch(model, task, at, qk_fix=True, **QUIET),
    "attribution, GradDrop": lambda model, task, at: gradient.attribution_patch(model, task, at, grad_drop=True, **QUIET),
    "exact patching": lambda model, task, at: causal.patch(model, task, at, progress=False, **QUIET),
    "single ablation": lambda model, task, at: causal.ablate(model, task, at, "zero", progress=False, **QUIET),
}  # fmt: skip
CIRCUITS = {
    "edges, EAP": lambda model, task: circuit.eap(model, task, **QUIET),
    "edges, EAP-IG": lambda model, task: circuit.eap_ig(model, task, **QUIET),
}


def ranks(strength: dict, wanted) -> list[int]:
    """How many score at least as high as each of these (itself included), ties counted in its disfavour."""
    values = np.array(list(strength.values()))
    return [int((values >= strength[one] * (1 - 1e-4)).sum()) for one in wanted]


def plain(scores, auroc: bool) -> dict:
    """Component without position -> strength: an effect as a share of the metric's gap, or a contrast."""
    values = np.abs(np.asarray(scores.columns["auroc"]) - 0.5) if auroc else np.abs(scores.values)
    values = np.abs(np.asarray(scores.columns["share"])) if "share" in scores.columns else values
    return {one.at(None): float(value) for one, value in zip(scores.components, values, strict=True)}


def of_edges(found, kind: str) -> dict:
    """Heads and FFNs by the sum of |scores| of their edges out; keys by that of their edges in."""
    total: dict = {}
    for edge, score in zip(found.edges, found.scores, strict=True):
        one = edge.target if kind == "saturated" else edge.source
        if one.kind in (("k",) if kind == "saturated" else ("mlp_out",) if kind == "fact" else ("z", "mlp_out")):
            total[one] = total.get(one, 0.0) + abs(float(score))
    return total


def joint(model, task, contrast: dict) -> dict:
    """What a pair takes away beyond its stronger half, as a share of the gap; the largest over pairs."""
    most = sorted(contrast, key=contrast.get, reverse=True)[:6]
    best = dict.fromkeys(contrast, 0.0)
    for pair in itertools.combinations(most, 2):
        found = causal.joint_ablation(model, task, list(pair), method="zero", random=0, progress=False)
        more = float(found.effects[0].mean() - found.single.mean(1).max()) / (found.clean - found.corrupted)
        for one in pair:
            best[one] = max(best[one], more)
    return best


def of_plant(model, kind: str, seed: int):
    """Rows of one plant."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        try:
            planted = stack.enter_context(wb.improve.plant(model, kind, seed))
        except RuntimeError as error:  # no draw worked: this is no plant
            yield {"method": "(planting)", "seconds": time.perf_counter() - began, "what": f"failed: {error}"}
            return
        spent, task = time.perf_counter() - began, planted.task.split("test")[:PROMPTS]
        true, decoys = ([one.at(None) for one in some] for some in (planted.components, planted.decoys))
        at = WITHIN.get(kind, f"neuron.{true[0].layer}.*@-1")
        if kind == "saturated":  # its key is what the gradient misses
            true = [wb.Component("k", one.layer, one.index) for one in true]
        yield {"method": "(planting)", "seconds": spent, "what": planted.what}
        began = time.perf_counter()
        scores = magnitude.contrast(model, task, at, **QUIET)
        contrast = plain(scores, False)
        for method in CONTRASTS:
            yield row(method, plain(scores, "AUROC" in method), true, decoys, began)
        for method, run in METHODS.items():
            if "QK fix" in method and kind != "saturated":
                continue
            began = time.perf_counter()
            yield row(method, plain(run(model, task, at), False), true, decoys, began)
        if kind == "redundant":
            began = time.perf_counter()
            yield row("joint ablation", joint(model, task, contrast), true, decoys, began)
        for method, run in CIRCUITS.items():
            began = time.perf_counter()
            strength = of_edges(run(model, task), kind)
            inside = true if kind in WITHIN else [wb.Component("mlp_out", true[0].layer)]
            yield row(method, strength, inside, [], began)


def row(method: str, strength: dict, true: list, decoys: list, began: float) -> dict:
    own, share = ranks(strength, true), min(strength[one] for one in true)
    effect = method not in (*CONTRASTS, *CIRCUITS)
    hit = max(own) <= len(true) and (share >= LEAST or not effect)
    found = {"method": method, "rank": max(own), "of": len(strength), "share": share if effect else None, "found": int(hit),
             "seconds": time.perf_counter() - began}  # fmt: skip
    if decoys:
        highest = max(strength[one] for one in true)
        found |= {"decoy_rank": min(ranks(strength, decoys)),
                  "decoy_picked": int(max(strength[one] for one in decoys) >= highest * (1 - 1e-4))}  # fmt: skip
    return found


def of_circuit(name: str):
    """Rows of one written circuit."""
    from sklearn.metrics import roc_auc_score

    folder = wb.task.DATA / "planted" / name
    model, task = wb.load(folder), wb.Task.load(folder / "task.jsonl").split("fit")[:16]
    written = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))["edges"]
    written = [circuit.Edge(a, f"{part}.{b[2:]}" if part else b) for a, b, part in written]
    oracle = circuit.exact(model, task, progress=False)
    true = [edge for edge in written if abs(oracle[edge]) > 0.05 * np.abs(oracle.scores).max()]
    parts = {
        one for edge in true for one in (edge.source, *oracle.readers(edge.target)) if one.kind in ("z", "mlp_out")
    }
    edges = CIRCUITS | {
        "edges, EAP-IG, activations": lambda model, task: circuit.eap_ig(model, task, of="activations", **QUIET),
        "edges, exact": lambda model, task: oracle,
        "edges, flow": circuit.flow,
        "edges, ACDC": lambda model, task: circuit.acdc(model, task[:6], 0.01, progress=False),
        "edges, learned masks": lambda model, task: circuit.masks(model, task, price=0.01, progress=False),
    }
    for method, run in edges.items():
        began = time.perf_counter()
        found = run(model, task)
        yield {"method": method, "of": found.whole, "auroc": found.auroc(true), "seconds": time.perf_counter() - began}
    for method, run in METHODS.items():
        if "QK fix" in method:
            continue
        began = time.perf_counter()
        strength = {}
        for at in ("z.*.*", "mlp_out.*"):
            strength |= plain(run(model, task, at), False)
        auroc, spent = (
            roc_auc_score([one in parts for one in strength], list(strength.values())),
            time.perf_counter() - began,
        )
        yield {"method": f"nodes, {method}", "of": len(strength), "auroc": auroc, "seconds": spent}


def summary(rows: list[dict]) -> str:
    """The printed table: by kind and method, how often found, with a Clopper-Pearson interval, and the decoys."""
    lines = [f"{'kind':11s} {'method':22s} {'found':>7s} {'95 % interval':>14s} {'median rank':>13s}   decoy picked"]
    plants = [one for one in rows if one["part"] == "plant" and one.get("rank")]
    for (kind, method), some in itertools.groupby(sorted(plants, key=_by), lambda one: (one["kind"], one["method"])):
        some = list(some)
        hits, n = sum(one["found"] for one in some), len(some)
        low, high = measure.share_bound(hits, n)
        rank = f"{np.median([one['rank'] for one in some]):g} of {some[0]['of']}"
        decoy = [one["decoy_picked"] for one in some if one.get("decoy_picked") is not None]
        last = f"{sum(decoy)} of {len(decoy)}" if decoy else ""
        lines.append(f"{kind:11s} {method:22s} {hits:3d}/{n:<3d} {low:7.2f} to {high:.2f} {rank:>13s}   {last}")
    planted = [one for one in rows if one["method"] == "(planting)"]
    failed = [f"{one['kind']} {one['seed']}" for one in planted if one["what"].startswith("failed")]
    which = f" (not: {', '.join(failed)})" if failed else ""
    lines += ["", f"{len(planted) - len(failed)} of {len(planted)} plants worked{which}", ""]
    for one in rows:
        if one["part"] == "circuit":
            lines.append(f"{one['kind']:11s} {one['method']:30s} AUROC {one['auroc']:.2f} over {one['of']}")
    return "\n".join(lines)


def _by(one: dict) -> tuple:
    return list(KINDS).index(one["kind"]), [*CONTRASTS, *METHODS, "joint ablation", *CIRCUITS].index(one["method"])


def written(value):
    return f"{value:.4g}" if isinstance(value, float) else value  # None becomes an empty field


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="plants of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, help="also write every plant and method to this CSV")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"threads: {torch.get_num_threads()}, {given.seeds * len(given.kinds)} plants")
    model, rows, began = wb.load("course"), [], time.perf_counter()
    for kind in given.kinds:
        for seed in range(given.seeds):
            rows += [{"part": "plant", "kind": kind, "seed": seed, **one} for one in of_plant(model, kind, seed)]
        save(given.out, rows)
        print(f"{kind}: {time.perf_counter() - began:.0f} s", flush=True)
    for name in ("induction", "lookup", "inhibition"):
        rows += [{"part": "circuit", "kind": name, **one} for one in of_circuit(name)]
    save(given.out, rows)
    print(f"all: {time.perf_counter() - began:.0f} s, of the processor {time.process_time():.0f} s\n")
    print(summary(rows))


def save(path: Path | None, rows: list[dict]) -> None:
    """Write what there is so far; the file is whole at any time."""
    if path is None:
        return
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows({name: written(one.get(name)) for name in COLUMNS} for one in rows)
    beside.replace(path)


if __name__ == "__main__":
    main()
