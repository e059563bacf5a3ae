"""How fast is the sweep? resid_pre patching against TransformerLens, a plain nnsight loop and one forward pass.

    pip install -e '.[bench]'
    python tests/benchmarks/patch_sweep.py            # the bundled weights as a Llama, indirect objects, 1 and 32 pairs

One alternating run: every contender once per round, on one thread, so that a change of the machine's speed meets all of
them. All compute the same numbers (checked to 1e-4) for every layer and position; figures are medians over rounds.
"""

import argparse
import statistics
import tempfile
import time

import torch

import workbench as wb


def same_length(task, model, n):
    """n pairs of one token length, the most frequent one."""
    pairs = task.on(model)
    lengths = [len(ids) for ids in pairs.clean]
    common = max(set(lengths), key=lengths.count)
    rows = [row for row, length in zip(pairs.task, lengths) if length == common]
    return wb.Task((rows * n)[:n], task.name)


def metric(pairs):
    """Mean logit difference at the last position, of full logits [pair, position, d_vocab]."""
    rows = torch.arange(len(pairs.answer))
    return lambda logits: (logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.foil]).mean()


def with_workbench(model, task, pairs):
    def run():
        scores = wb.locate.causal.patch(model, task, "resid_pre", null=False, progress=False)
        table = scores.per_prompt.mean(1) + scores.corrupted
        return torch.tensor(table, dtype=torch.float32).view(model.names.n_layers, -1)

    return run


def with_transformer_lens(path, pairs):
    import transformer_lens
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(path), device="cpu", dtype=torch.float32)
    clean, corrupted, score = torch.stack(pairs.clean), torch.stack(pairs.corrupted), metric(pairs)
    patching.tqdm = lambda items, *args, **kwargs: items

    def run():
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)
            return patching.get_act_patch_resid_pre(bridge, corrupted, cache, score)

    assert transformer_lens
    return run


def with_nnsight(model, pairs):
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"threads: {torch.get_num_threads()}, torch {torch.__version__}, model {given.model}, task {given.task}")
    path = as_llama(tempfile.mkdtemp()) if given.model == "course" else given.model
    model, whole = wb.load(path), wb.Task.load(given.task)
    for n in given.pairs:
        task = same_length(whole, model, n)
        pairs = task.on(model)
        batch = model.inputs(torch.stack(pairs.clean))

        def forward(batch=batch):
            with torch.no_grad():
                return model.hf(**batch).logits

        contenders = {"workbench": with_workbench(model, task, pairs), "one forward pass": forward,
                      "nnsight loop": with_nnsight(model, pairs)}  # fmt: skip
        try:
            contenders["TransformerLens"] = with_transformer_lens(path, pairs)
        except ImportError:
            print("TransformerLens is not installed (pip install -e '.[bench]')")
        results = {name: run() for name, run in contenders.items()}  # also warms up
        for name in ("nnsight loop", "TransformerLens"):
            if name in results:
                off = (results[name] - results["workbench"]).abs().max() / results["workbench"].abs().max()
                print(f"{n} pairs of {batch['input_ids'].shape[1]} tokens: {name} differs by {off:.1e}")
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
