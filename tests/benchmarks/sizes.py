"""How long and how much memory do the usual calls take on models of real size?

    python tests/benchmarks/sizes.py --device cpu  --models gpt2                       # a laptop
    python tests/benchmarks/sizes.py --device cuda --models gpt2 qwen2.5-1.5b llama-3.1-8b

Times hang on shapes, not on what was learnt: the models are built from their configurations with random weights (bf16 on a GPU,
fp32 elsewhere), so nothing is downloaded, and read the bundled tokenizer's ids. 32 pairs of about 16 tokens. Rows are added to
data/sizes.csv with --out. Memory is the peak over the whole call, weights included (on a GPU; on a processor it is not measured).
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import workbench as wb

SHAPES = {
    "gpt2": ("gpt2", {}),
    "tiny": ("gpt2", dict(n_layer=3, n_embd=64, n_head=4)),
    "qwen2.5-1.5b": ("qwen2", dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True)),
    "llama-3.1-8b": ("llama", dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False)),
}  # fmt: skip


def build(name: str, device: str, tokenizer):
    kind, sizes = SHAPES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **sizes), dtype=dtype, attn_implementation="eager"
        )
    return wb.load(hf.to(dtype), tokenizer=tokenizer, bos=False)


def pairs(model, n: int) -> wb.Task:
    """Pairs that this untrained model happens to tell apart, all the same way round: others are refused, rightly."""
    task = wb.Task.load("ioi")[:400].on(model).task
    gap = task.score(model) - task.score(model, prompt="corrupted")
    keep = ("clean", "corrupted", "answer", "foil", "spans")
    clearest = [task.rows[i] for i in gap.argsort()[::-1][:n]]
    return wb.Task(
        [
            {key: row[key] for key in keep if key in row} | {"split": "select" if i % 4 == 3 else "fit"}
            for i, row in enumerate(clearest)
        ],
        "ioi",
    )


def calls(model, task):
    n, quiet = model.names.n_layers, {"progress": False}
    prompt = task.rows[0]["clean"]
    push = wb.Add(f"resid_post.{n // 2}", torch.randn(model.names.d_model), 0.01)
    yield "logits of 32 prompts", lambda: model.logits([row["clean"] for row in task])
    yield "50 tokens", lambda: model.generate(prompt, max_new_tokens=50)
    yield "50 tokens, steered", lambda: model.generate(prompt, push, max_new_tokens=50)
    yield (
        "difference of means, one place",
        lambda: wb.steer.vector.difference_of_means(model, task, f"resid_post.{n // 2}@-1"),
    )
    yield "logit lens, one prompt", lambda: wb.locate.vocabulary.logit_lens(model, [prompt])
    yield "direct logit attribution", lambda: wb.locate.vocabulary.logit_attribution(model, task)
    yield (
        "attribution patching: heads, FFNs, all tokens",
        lambda: wb.locate.gradient.attribution_patch(model, task, ["z.*.*", "mlp_out.*"], positions="each", null=False),
    )
    yield "patching: all heads, 8 pairs", lambda: wb.locate.causal.patch(model, task[:8], "z.*.*", null=False, **quiet)
    yield (
        "patching: stream, all tokens, 8 pairs",
        lambda: wb.locate.causal.patch(model, task[:8], "resid_pre", positions="each", null=False, **quiet),
    )
    yield "EAP-IG, 5 steps, 8 pairs", lambda: wb.locate.circuit.eap_ig(model, task[:8], null=False)
    yield (
        "steering vector by gradient, 20 steps",
        lambda: wb.steer.optimization.steering_vector(
            model, task, f"resid_post.{n // 2}@-1", keep=(), steps=20, **quiet
        ),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["gpt2"], choices=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    gpu = given.device == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"processor, {given.threads} thread{'s' * (given.threads > 1)}"
    tokenizer, rows = wb.load("course").tokenizer, []
    for name in given.models:
        model = build(name, given.device, tokenizer)
        billions = sum(p.numel() for p in model.hf.parameters()) / 1e9
        task = pairs(model, given.pairs)
        for what, call in calls(model, task):
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            try:
                call()
                seconds, said = time.perf_counter() - began, ""
            except (torch.OutOfMemoryError, ValueError) as error:
                seconds, said = float("nan"), f"{type(error).__name__}: {str(error)[:120]}"
            memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")
            rows.append({"machine": machine, "model": name, "parameters (B)": round(billions, 2), "call": what,
                         "seconds": round(seconds, 2), "GiB": round(memory, 1), "note": said})  # fmt: skip
            print(*rows[-1].values(), sep=" | ", flush=True)
        if given.out:
            add(given.out, machine, name, rows)
        del model, call


def add(path: Path, machine: str, name: str, rows: list[dict]) -> None:
    """This model's rows, in the place of older ones from the same kind of machine."""
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(rows[0]))
    old = old[~(old.machine.eq(machine) & old.model.eq(name))]
    pd.concat([old, pd.DataFrame([row for row in rows if row["model"] == name])], ignore_index=True).to_csv(
        path, index=False
    )


if __name__ == "__main__":
    main()
