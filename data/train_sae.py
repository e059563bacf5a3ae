"""Trains the bundled sparse autoencoder on the activations of "course" over its own world, in about four minutes on one thread.

    OMP_NUM_THREADS=1 PYTHONPATH=.. python train_sae.py --seed 0 --at resid_post.4

Run it again whenever course/ is trained anew: the SAE carries the model's fingerprint and is refused by any other model.
It trains on documents of World(seed + 1) and is measured on those of World(seed + 2); what the tasks hold out of training
is in neither.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from grammar import World

import workbench as wb


def documents(seed: int, n: int) -> list[str]:
    """Texts of the world, for example "the city of lyon is in france ."."""
    world = World(seed)
    return [" ".join(world.generate().words) for _ in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="course")
    parser.add_argument("--at", default="resid_post.4")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--name", default="course")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sae")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    model = wb.load(asked.model)
    train = documents(asked.seed + 1, asked.documents)
    print(f"{len(train)} documents after {time.time() - began:.0f} s", flush=True)
    sae = wb.locate.features.train(model, train, asked.at, d_sae=asked.d_sae, k=asked.k, steps=asked.steps,
                                   name=asked.name, seed=asked.seed)  # fmt: skip
    folder = sae.save(asked.out / asked.name, torch.float16)
    print(f"{sae}\n{json.dumps(sae.notes)}\nwritten to {folder} after {time.time() - began:.0f} s", flush=True)
    stored = wb.locate.features.evaluate(model, wb.SAE.load(folder), documents(asked.seed + 2, 300), seed=asked.seed)
    print(stored, stored.frame.round(3).to_string(), f"{time.time() - began:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
