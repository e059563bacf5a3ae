"""Training: a dictionary that rebuilds activations from few features each."""

from __future__ import annotations

import math
import os

import torch
from tqdm import trange

from workbench.component import Component
from workbench.locate.features.tokens import activations
from workbench.sae import SAE

TRAINED = ("batchtopk", "topk", "jumprelu")
AUX, CLIP, BANDWIDTH = 1 / 32, 1.0, 0.05  # weight of the dead features' loss; gradient norm; width of JumpReLU's window


def train(model, prompts, at=None, *, d_sae: int | None = None, k: int = 16, architecture: str = "batchtopk",
          steps: int = 1000, batch: int = 2048, lr: float | None = None, tokens: int = 500_000, name: str = "sae",
          seed: int = 0, progress: bool = True) -> SAE:  # fmt: skip
    """Which sparse features does this part of the model compute with? Trains an SAE on its activations.

    About 0.15 s a step on one thread for 192 -> 1536 features. The first token of each text is left out.

    Args:
        prompts: texts (a list, a task or its name) like those that the model was trained on; as many as can be had.
        at: the component, the stream after the middle block by default; "z.3.*" is all heads of a layer together.
        d_sae: number of features, 8 times the width by default. k: features active at a token, on average ("batchtopk",
            "jumprelu") or at most ("topk").
        tokens: how many activations to collect at most. steps, batch: updates, and activations in each.
        lr: 1.5e-3 / sqrt(d_sae / 2^14) by default, for a thousand steps; less for many more.
    Returns:
        SAE; its `notes` say how it was made.
    Raises:
        ValueError: for an architecture that is not trained here, a family of components, or too few tokens.
    Source:
        Bussmann et al. 2024 (BatchTopK); Gao et al. 2024 (TopK and the loss for dead features); Rajamanoharan et al.
        2024 (JumpReLU).
    """
    at = Component.parse(at) if at is not None else Component("resid_post", max(0, model.names.n_layers // 2 - 1))
    model.names.validate(at)
    if at.layer == "*" or at.position is not None:
        raise ValueError(f"A dictionary belongs to one tensor at all positions, for example 'resid_post.3'; got {at}.")
    x = activations(model, prompts, at, tokens, torch.float16 if model.names.d_model > 512 else torch.float32)
    return fit(x, at=at, d_sae=d_sae, k=k, architecture=architecture, steps=steps, batch=batch, lr=lr, name=name, seed=seed,
               fingerprint=model.fingerprint, progress=progress)  # fmt: skip


def fit(x: torch.Tensor, *, at="resid_post.0", d_sae: int | None = None, k: int = 16, architecture: str = "batchtopk",
        steps: int = 1000, batch: int = 2048, lr: float | None = None, name: str = "sae", seed: int = 0,
        fingerprint: str = "", progress: bool = True) -> SAE:  # fmt: skip
    """`train` on activations [token, width] that are there already."""
    d, d_sae = x.shape[1], d_sae or 8 * x.shape[1]
    if architecture not in TRAINED:
        raise ValueError(f"architecture={architecture!r} is not trained here; choose {', '.join(TRAINED)}.")
    if not 0 < k < d_sae:
        raise ValueError(f"k={k} features of {d_sae} cannot be active at a token; choose a k from 1 to {d_sae - 1}.")
    if len(x) < batch:
        raise ValueError(f"{len(x)} tokens are fewer than one batch of {batch}: give more texts, or a smaller batch.")
    rng = torch.Generator().manual_seed(seed)
    scale = x[torch.randperm(len(x), generator=rng)[:20_000]].float().pow(2).sum(1).mean().rsqrt().item()
    b_dec = geometric_median(x[torch.randperm(len(x), generator=rng)[:4096]].float() * scale)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=rng), dim=1)
    log_threshold = torch.full((d_sae,), math.log(0.05))
    weights = [
        W_dec.T.clone(),
        torch.zeros(d_sae),
        W_dec,
        b_dec,
        *([log_threshold] if architecture == "jumprelu" else []),
    ]
    for tensor in weights:
        tensor.requires_grad_(True)
    W_enc, b_enc, W_dec, b_dec = weights[:4]
    lr = lr or 1.5e-3 / math.sqrt(d_sae / 2**14)
    optimizer = torch.optim.Adam(weights, lr, betas=(0.0 if architecture == "jumprelu" else 0.9, 0.999))
    warm, decay = max(1, steps // 20), steps // 5
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm, (steps - step) / max(1, decay))
    )
    quiet, threshold, order = torch.zeros(d_sae, dtype=torch.long), None, torch.empty(0, dtype=torch.long)
    dead_after, loss = 50 * batch, torch.tensor(float("nan"))
    hidden = not progress or os.environ.get("WORKBENCH_STRICT") == "1"
    for step in trange(steps, desc="training", leave=False, delay=5, mininterval=0.5, disable=hidden):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(x), generator=rng)])
        now, order = x[order[:batch]].float() * scale, order[batch:]
        pre = (now - b_dec) @ W_enc + b_enc
        sparsity = torch.zeros(())
        if architecture == "jumprelu":
            bar = log_threshold.exp()
            f, active = Jump.apply(pre, bar), pre.detach() > bar.detach()
            sparsity = min(1.0, 5 * step / steps) * (Step.apply(pre, bar).sum(1).mean() / k - 1).pow(2)
        else:
            active = largest(pre.detach(), k, architecture)
            f = pre.relu() * active
            if architecture == "batchtopk" and step >= steps // 10:
                lowest = pre.detach()[active].min()
                threshold = lowest if threshold is None else 0.99 * threshold + 0.01 * lowest
        rest = now - (f @ W_dec + b_dec)
        loss = rest.pow(2).sum(1).mean()
        quiet = torch.where(active.any(0), 0, quiet + batch)
        revive = dead_loss(rest.detach(), pre, W_dec, quiet > dead_after)
        (loss + AUX * revive + 0.1 * sparsity).backward()
        with torch.no_grad():  # rows of the decoder keep length 1
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        optimizer.zero_grad()
        schedule.step()
    if architecture == "jumprelu":
        threshold = log_threshold.detach().exp() / scale
    elif architecture == "batchtopk":
        threshold = (threshold if threshold is not None else torch.zeros(())).expand(d_sae).clone() / scale
    notes = {"tokens": len(x), "steps": steps, "batch": batch, "lr": lr, "seed": seed, "k": k,
             "loss": round(loss.item(), 4), "dead_in_training": int((quiet > dead_after).sum())}  # fmt: skip
    return SAE(W_enc.detach(), b_enc.detach() / scale, W_dec.detach(), b_dec.detach() / scale, at=at, k=k,
               architecture=architecture, threshold=threshold, name=name, fingerprint=fingerprint, notes=notes)  # fmt: skip


def largest(pre: torch.Tensor, k: int, architecture: str) -> torch.Tensor:
    """Which pre-activations stay: the k largest of each token, or k per token on average, the largest of the batch.

    For the batch, no token gets more than 4 k, which saves sorting everything.
    """
    top = pre.topk(k if architecture == "topk" else min(4 * k, pre.shape[1]), dim=1, sorted=False)
    keep = torch.ones_like(top.values, dtype=torch.bool)
    if architecture == "batchtopk":
        keep = top.values >= top.values.flatten().topk(k * len(pre)).values[-1]
    return torch.zeros_like(pre, dtype=torch.bool).scatter(1, top.indices, keep & (top.values > 0))


def dead_loss(rest: torch.Tensor, pre: torch.Tensor, W_dec: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """How badly do the strongest dead features explain what is left? Its gradient brings them back (Gao et al. A.2)."""
    dead = dead.nonzero()[:, 0]
    if not len(dead):
        return torch.zeros(())
    top = pre[:, dead].topk(min(rest.shape[1] // 2, len(dead)), dim=1, sorted=False)
    f = torch.zeros(len(rest), len(dead)).scatter(1, top.indices, top.values.relu())
    return (rest - f @ W_dec[dead]).pow(2).sum(1).mean() / (rest - rest.mean(0)).pow(2).sum(1).mean()


def geometric_median(x: torch.Tensor, steps: int = 30) -> torch.Tensor:
    """The point with the least sum of distances (Weiszfeld); far tokens move it less than they move a mean."""
    at = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - at).norm(dim=1).clamp(min=1e-6)
        at = (weight[:, None] * x).sum(0) / weight.sum()
    return at


class Step(torch.autograd.Function):
    """1 where x is above the threshold; to the threshold a gradient from the x within half a window of it."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return (x > threshold).float()

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < BANDWIDTH / 2).float()
        return None, -(near * grad).sum(0) / BANDWIDTH


class Jump(torch.autograd.Function):
    """x where it is above the threshold, else 0 (Rajamanoharan et al. 2024, eq. 8 and 11)."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx, grad):
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < BANDWIDTH / 2).float()
        return grad * (x > threshold), -(threshold / BANDWIDTH) * (near * grad).sum(0)
