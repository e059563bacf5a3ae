"""How fast is attribution patching? All heads, FFNs and streams at every position, against TransformerLens and one forward pass.

    pip install -e '.[bench]'
    python tests/benchmarks/attribution.py            # the bundled weights as a Llama, 32 pairs of 16 tokens, 1 thread

One alternating run, medians over rounds; both compute the same numbers (checked to 1e-4). TransformerLens has no function
for it: what is timed is the usual recipe (clean cache, corrupted pass with gradients at the hooks), without null or interval.
"""

import argparse
import statistics
import tempfile
import time

import torch
from patch_sweep import as_llama, metric

import workbench as wb

HOOKS = {"resid_pre": "hook_resid_pre", "z": "attn.hook_z", "mlp_out": "hook_mlp_out"}


def of_length(task, model, n, length):
    """n pairs of so many tokens."""
    pairs = task.on(model)
    rows = [row for row, ids in zip(pairs.task, pairs.clean) if len(ids) == length]
    return wb.Task((rows * n)[:n], task.name)


def with_transformer_lens(path, pairs):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(path), device="cpu", dtype=torch.float32)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    clean, corrupted, score = torch.stack(pairs.clean), torch.stack(pairs.corrupted), metric(pairs)
    places = {(kind, i): f"blocks.{i}.{hook}" for i in range(bridge.cfg.n_layers) for kind, hook in HOOKS.items()}

    def run():
        kept = {}

        def keep(name):
            def hook(value, hook):
                kept[name] = value if value.requires_grad else value.detach().requires_grad_(True)
                return kept[name]

            return hook

        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean, names_filter=list(places.values()))
        logits = bridge.run_with_hooks(corrupted, fwd_hooks=[(name, keep(name)) for name in places.values()])
        slopes = torch.autograd.grad(score(logits) * len(clean), [kept[name] for name in places.values()])
        found = {}
        for (site, name), slope in zip(places.items(), slopes):
            found[site] = (
                ((cache[name] - kept[name].detach()) * slope).sum(-1).mean(0)
            )  # [position] or [position, head]
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
    batch = model.inputs(torch.stack(pairs.clean))
    print(
        f"threads: {torch.get_num_threads()}, torch {torch.__version__}, {given.pairs} pairs of {given.tokens} tokens"
    )

    def workbench(null=True):
        return wb.locate.gradient.attribution_patch(model, task, list(HOOKS), positions="each", null=null)

    def forward():
        with torch.no_grad():
            return model.hf(**batch, logits_to_keep=1).logits

    contenders = {"workbench": workbench, "without null": lambda: workbench(False), "one forward pass": forward}
    try:
        contenders["TransformerLens"] = with_transformer_lens(path, pairs)
    except ImportError:
        print("TransformerLens is not installed (pip install -e '.[bench]')")
    results = {name: run() for name, run in contenders.items()}  # also warms up
    if "TransformerLens" in results:
        scores, theirs = results["workbench"], results["TransformerLens"]
        off = max(abs(theirs[one.site][(one.position, *([one.index] if one.kind == "z" else []))].item() - effect)
                  for one, effect in zip(scores.components, scores.per_prompt.mean(1)))  # fmt: skip
        off /= abs(scores.per_prompt.mean(1)).max()
        print(f"TransformerLens differs by {off:.1e}")
        assert off < 1e-4
    wall, cpu = ({name: [] for name in contenders} for _ in range(2))
    for _ in range(given.rounds):
        for name, run in contenders.items():
            began = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began[0])
            cpu[name].append(time.process_time() - began[1])
    for name in contenders:
        print(f"  {name:18s} {1000 * statistics.median(wall[name]):7.0f} ms (min {1000 * min(wall[name]):.0f}), "
              f"of the processor {1000 * statistics.median(cpu[name]):.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
