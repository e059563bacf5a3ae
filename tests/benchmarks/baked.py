"""Does a baked model generate at the plain model's speed? Alternating rounds, the ratio with its interval.

    python tests/benchmarks/baked.py            # the bundled model, 60 rounds of 40 tokens, 1 thread

Three checkpoints: the model itself, a recipe that changes weights only, and one that makes biases and untied embeddings necessary
(so that one more matrix is stored). Beside them the same recipe as hooks, which is what baking saves. Seconds are of the processor,
so that other work on the machine counts less.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import workbench as wb

PROMPT = "user : what country is berlin in ? i am tired . assistant :"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, folder = wb.load("course"), Path(tempfile.mkdtemp())
    off = wb.Recipe([wb.Zero(["z.4.2", "neuron.5.3"]), wb.Scale("mlp_out.6", 0.5)], name="weights")
    unit = torch.nn.functional.normalize(torch.randn(model.names.d_model), dim=0)
    out = wb.Recipe([wb.ProjectOut(at, unit) for at in ("embed", "attn_out.*", "mlp_out.*")], name="untied")
    off.bake(model, folder / "weights")
    out.bake(model, folder / "untied")
    ids = {"input_ids": model.ids(PROMPT)[None]}
    plain = wb.load(folder / "weights").hf, wb.load(folder / "untied").hf
    how = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens, "do_sample": False}
    contenders = {
        "plain": lambda: model.hf.generate(**ids, **how),
        "baked, weights": lambda: plain[0].generate(**ids, **how),
        "baked, untied": lambda: plain[1].generate(**ids, **how),
        "as hooks": lambda: model.generate(PROMPT, off, **how),
    }
    for run in contenders.values():
        run()
    took = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, run in contenders.items():
            began = time.process_time()
            run()
            took[name].append(time.process_time() - began)
    rng, base = np.random.default_rng(0), np.array(took["plain"])
    drawn = rng.integers(given.rounds, size=(2000, given.rounds))
    print(
        f"threads: {torch.get_num_threads()}, torch {torch.__version__}, {given.rounds} rounds of {given.tokens} tokens"
    )
    for name, some in took.items():
        some = np.array(some)
        ratios = np.median(some[drawn], 1) / np.median(base[drawn], 1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        print(f"  {name:16s} {1000 * np.median(some) / given.tokens:6.2f} ms a token, {np.median(some) / np.median(base):.3f} times plain "
              f"[{low:.3f}, {high:.3f}]")  # fmt: skip


if __name__ == "__main__":
    main()
