"""How long do the locators take on the bundled model, and how much memory?

    python tests/benchmarks/locators.py            # 32 pairs of 16 tokens, 1 thread

One alternating run, medians over rounds, without nulls (what a null adds stands beside). Memory: the peak of a process that
sweeps the heads over so many prompts, above what it has before, against one forward pass of a batch of the sweep's size.
"""

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import threading
import time

import torch
from attribution import of_length

import workbench as wb
from workbench.model.sweep.cells import TOKENS_PER_CALL


def contenders(model, task):
    """Name -> (seconds aimed at on two cores, run)."""
    locate = wb.locate

    def forward():
        with torch.no_grad():
            return model.hf(**model.inputs(torch.stack(task.on(model).clean)), logits_to_keep=1)

    return {
        "one forward pass": (None, forward),
        "attribution patching": (0.25, lambda: locate.gradient.attribution_patch(model, task, ["z", "mlp_out", "resid_pre"], positions="each", null=False)),
        "EAP-IG": (1, lambda: locate.circuit.eap_ig(model, task, null=False)),
        "EAP-IG with its null": (None, lambda: locate.circuit.eap_ig(model, task)),
        "all heads, exact": (2, lambda: locate.causal.patch(model, task, "z", null=False, progress=False)),
        "full residual sweep": (2, lambda: locate.causal.patch(model, task, "resid_pre", null=False, progress=False)),
    }  # fmt: skip


def resident() -> int:
    """Bytes of memory this process holds now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak(what: str, n: int) -> int:
    """Bytes at the peak above what there is before; in this process, so call it in a fresh one."""
    model = wb.load("course")
    task = of_length(wb.Task.load("ioi"), model, n, 16)
    pairs = task.on(model)
    rows = torch.stack((pairs.clean * TOKENS_PER_CALL)[: TOKENS_PER_CALL // 16])
    wb.locate.causal.patch(model, task[:2], "z", null=False, progress=False)  # imports and what is kept for good
    gc.collect()
    before, seen, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    if what == "forward":
        with torch.no_grad():
            model.hf(**model.inputs(rows), logits_to_keep=1)
    else:
        wb.locate.causal.patch(model, task, "z", null=False, progress=False)
    done.set()
    watcher.join()
    return max(seen) - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, nargs="*", default=[10, 1000], help="numbers of prompts")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.peak[0], int(given.peak[1])))
        return
    model = wb.load("course")
    task = of_length(wb.Task.load("ioi"), model, given.pairs, given.tokens)
    print(
        f"threads: {torch.get_num_threads()}, torch {torch.__version__}, {given.pairs} pairs of {given.tokens} tokens"
    )
    runs = contenders(model, task)
    seconds = {name: [] for name in runs}
    for number in range(given.rounds + 1):  # the first round warms up
        for name, (_, run) in runs.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    for name, (aim, _) in runs.items():
        said = f", aim {aim} s" if aim else ""
        print(
            f"  {name:22s} {statistics.median(seconds[name]):6.3f} s (min {min(seconds[name]):.3f}, max {max(seconds[name]):.3f}){said}"
        )
    for n in given.memory:
        found = {}
        for what in ("forward", "sweep"):
            command = [sys.executable, __file__, "--threads", str(given.threads), "--peak", what, str(n)]
            found[what] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 2**20
        print(f"  memory, {n} prompts: one forward pass {found['forward']:.0f} MiB, head sweep {found['sweep']:.0f} MiB, "
              f"ratio {found['sweep'] / max(found['forward'], 1):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
