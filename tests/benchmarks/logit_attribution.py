"""Does direct logit attribution agree with TransformerLens on the same weights, and how fast is it?

    pip install -e '.[bench]'
    python tests/benchmarks/logit_attribution.py      # the bundled weights as a Llama, 32 pairs of 16 tokens, 1 thread

Embedding, every head and every FFN, at the last position, per prompt. TransformerLens' way is a cached run, each head's
result, the frozen scale of the final norm, and the unembedding of answer minus foil.
"""

import argparse
import statistics
import tempfile
import time

import torch
from attribution import of_length
from patch_sweep import as_llama

import workbench as wb


def with_transformer_lens(path, pairs):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(path), device="cpu", dtype=torch.float32)
    clean, cfg = torch.stack(pairs.clean), bridge.cfg
    names = ["hook_embed", "ln_final.hook_scale"]
    names += [f"blocks.{i}.{hook}" for i in range(cfg.n_layers) for hook in ("attn.hook_z", "hook_mlp_out")]
    norm = next(p for name, p in bridge.named_parameters() if name.startswith("model.norm."))

    @torch.no_grad()
    def run():
        _, cache = bridge.run_with_cache(clean, names_filter=names)
        W_U = bridge.W_U  # [d_model, d_vocab]
        direction = (W_U[:, pairs.answer] - W_U[:, pairs.foil]).T * norm / cache["ln_final.hook_scale"][:, -1]
        found = {"embed": (cache["hook_embed"][:, -1] * direction).sum(-1)[:, None]}
        for i in range(cfg.n_layers):
            z = cache[f"blocks.{i}.attn.hook_z"][:, -1]  # [prompt, head, d_head]
            results = torch.einsum("phd,hdm->phm", z, bridge.blocks[i].attn.W_O)
            found["z", i] = torch.einsum("phm,pm->ph", results, direction)
            found["mlp_out", i] = (cache[f"blocks.{i}.hook_mlp_out"][:, -1] * direction).sum(-1)[:, None]
        return found

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = as_llama(tempfile.mkdtemp())
    model = wb.load(path)
    task = of_length(wb.Task.load("ioi"), model, given.pairs, given.tokens)
    pairs = task.on(model)
    contenders = {
        "workbench": lambda: wb.locate.vocabulary.logit_attribution(model, task),
        "without null": lambda: wb.locate.vocabulary.logit_attribution(model, task, null=False),
        "TransformerLens": with_transformer_lens(path, pairs),
    }
    results = {name: run() for name, run in contenders.items()}  # also warms up
    scores, theirs = results["workbench"], results["TransformerLens"]
    off = 0.0
    for one, effect in zip(scores.components, torch.tensor(scores.per_prompt)):
        if one.kind == "ln_final":
            continue
        key = "embed" if one.kind == "resid_pre" else (one.kind, one.layer)
        off = max(off, (theirs[key][:, one.index or 0].double() - effect).abs().max().item())
    total = abs(scores.per_prompt.sum(0) - task.score(model)).max()
    print(
        f"threads: {torch.get_num_threads()}, torch {torch.__version__}, {given.pairs} pairs of {given.tokens} tokens"
    )
    print(
        f"TransformerLens differs by {off:.1e} nats at most, on any prompt; contributions sum to the logit difference within {total:.1e}"
    )
    assert off < 1e-4
    wall = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            wall[name].append(time.perf_counter() - began)
    for name, times in wall.items():
        print(f"  {name:18s} {1000 * statistics.median(times):7.0f} ms (min {1000 * min(times):.0f})")


if __name__ == "__main__":
    main()
