"""How fast is the sweep? Patching against TransformerLens, a plain nnsight loop and one forward pass.

    pip install -e '.[bench]'
    python tests/benchmarks/patch_sweep.py            # the bundled weights as a Llama, indirect objects, 1 and 32 pairs

The stream before every layer at every position, then the output of every head at every position.

One alternating run: every contender once per round, on one thread, so that a change of the machine's speed meets all of
them. All compute the same numbers (checked to 1e-4) for every layer and position; figures are medians over rounds.
"""

import argparse
import itertools
import statistics
import tempfile
import time

import torch

import workbench as wb


def same_length(task, model, n):
    """n pairs of one token length, the most frequent one, in which clean beats corrupted: as a Llama the bundled weights do
    not solve every pair, and without a difference there is nothing to restore."""
    pairs = task.on(model)
    gap = task.score(model) - task.score(model, prompt="corrupted")
    kept = [(row, len(ids)) for row, ids, size in zip(pairs.task, pairs.clean, gap) if size > 1]
    lengths = [length for _, length in kept]
    common = max(set(lengths), key=lengths.count)
    rows = [row for row, length in kept if length == common]
    return wb.Task((rows * n)[:n], task.name)


def metric(pairs):
    """Mean logit difference at the last position, of full logits [pair, position, d_vocab]."""
    rows = torch.arange(len(pairs.answer))
    return lambda logits: (logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.foil]).mean()


def with_workbench(model, task, pairs, site):
    def run():
        scores = wb.locate.causal.patch(model, task, site, positions="each", null=False, progress=False)
        place = [(one.layer, one.position, one.index or 0) for one in scores.components]
        table = torch.zeros([1 + max(axis) for axis in zip(*place)])
        table[tuple(torch.tensor(axis) for axis in zip(*place))] = torch.tensor(
            scores.per_prompt.mean(1) + scores.corrupted, dtype=torch.float32
        )
        return table.squeeze(-1)  # [layer, position] or [layer, position, head]

    return run


def with_transformer_lens(path, pairs, site):
    import transformer_lens
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(path), device="cpu", dtype=torch.float32)
    clean, corrupted, score = torch.stack(pairs.clean), torch.stack(pairs.corrupted), metric(pairs)
    patching.tqdm = lambda items, *args, **kwargs: items

    def run():
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)
            if site == "resid_pre":
                return patching.get_act_patch_resid_pre(bridge, corrupted, cache, score)
            return patching.get_act_patch_attn_head_out_by_pos(bridge, corrupted, cache, score)

    assert transformer_lens
    return run


def with_nnsight(model, pairs):
    """The stream only."""
    nn, layers, score = model.nnsight, model.names.layers, metric(pairs)
    clean, corrupted = torch.stack(pairs.clean), torch.stack(pairs.corrupted)

    def run():
        with torch.no_grad():
            with nn.trace(model.inputs(clean)):
                kept = list().save()
                for layer in layers:
                    kept.append(layer.input.clone())
            table = torch.zeros(len(layers), clean.shape[1])
            for i, layer in enumerate(layers):
                for position in range(clean.shape[1]):
                    with nn.trace(model.inputs(corrupted)):
                        layer.input[:, position] = kept[i][:, position]
                        logits = nn.output.logits.save()
                    table[i, position] = score(logits)
        return table

    return run


def as_llama(folder):
    """The bundled weights in a plain Llama (all layers see everything), for TransformerLens knows no Ministral."""
    from transformers import LlamaConfig, LlamaForCausalLM

    course = wb.load("course")
    sizes = {k: getattr(course.hf.config, k) for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "pad_token_id")}  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    llama.load_state_dict(course.hf.state_dict())
    llama.save_pretrained(folder)
    course.tokenizer.save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="course")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--site", nargs="+", default=["resid_pre", "z"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"threads: {torch.get_num_threads()}, torch {torch.__version__}, model {given.model}, task {given.task}")
    path = as_llama(tempfile.mkdtemp()) if given.model == "course" else given.model
    model, whole = wb.load(path), wb.Task.load(given.task)
    for site, n in itertools.product(given.site, given.pairs):
        task = same_length(whole, model, n)
        pairs = task.on(model)
        batch = model.inputs(torch.stack(pairs.clean))

        def forward(batch=batch):
            with torch.no_grad():
                return model.hf(**batch).logits

        contenders = {"workbench": with_workbench(model, task, pairs, site), "one forward pass": forward}
        if site == "resid_pre":
            contenders["nnsight loop"] = with_nnsight(model, pairs)
        try:
            contenders["TransformerLens"] = with_transformer_lens(path, pairs, site)
        except ImportError:
            print("TransformerLens is not installed (pip install -e '.[bench]')")
        results = {name: run() for name, run in contenders.items()}  # also warms up
        for name in ("nnsight loop", "TransformerLens"):
            if name in results:
                off = (results[name] - results["workbench"]).abs().max() / results["workbench"].abs().max()
                print(f"{site}, {n} pairs of {batch['input_ids'].shape[1]} tokens: {name} differs by {off:.1e}")
                assert off < 1e-4
        times = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
        own = statistics.median(times["workbench"])
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            print(f"  {name:18s} {1000 * middle:9.1f} ms  (min {1000 * min(seconds):.1f}, max {1000 * max(seconds):.1f})"
                  f"  {middle / own:6.1f} x workbench")  # fmt: skip


if __name__ == "__main__":
    main()
