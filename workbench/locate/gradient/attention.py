"""The QK fix of AtP*: what a changed query or key does to the attention pattern, exactly, and the slope only from there on."""

from __future__ import annotations

import torch

from workbench.model.names import Names


class Attention:
    """One layer's attention on the side that is run, taken apart to be put together with other queries or keys.

    Args:
        acts: q, k [row, column, head * d_head], attn_scores, pattern [row, query, head * key]; slope: of the pattern.
        softcap: scores are softcap * tanh(raw / softcap), where the model does so.
    Raises:
        ValueError: where the scores are not a multiple of query times key.
    """

    def __init__(self, names: Names, acts: dict, slope: torch.Tensor, layer: int, softcap: float | None = None):
        self.names, self.softcap = names, softcap
        self.q, self.k = (self.heads(acts[kind, layer]) for kind in ("q", "k"))
        self.scores, self.pattern, self.slope = (
            x.unflatten(2, (names.n_heads, -1)).transpose(1, 2).float()
            for x in (acts["attn_scores", layer], acts["pattern", layer], slope)
        )
        self.open = self.scores > torch.finfo(acts["attn_scores", layer].dtype).min / 2
        product = self.product(self.q, self.k)
        raw = torch.where(self.open, self.scores, 0)
        raw = raw if softcap is None else softcap * torch.atanh((raw / softcap).clamp(-1 + 1e-6, 1 - 1e-6))
        inside = torch.where(self.open, product, 0)
        self.scale = (raw * inside).sum() / (inside * inside).sum().clamp(min=1e-30)
        self.raw = self.scale * product
        off = torch.where(self.open, self.capped(self.raw) - self.scores, 0).abs().max()
        if not off <= 1e-2 * torch.where(self.open, self.scores, 0).abs().max() + 1e-4:
            raise ValueError(f"The QK fix needs scores that are a multiple of query times key; in layer {layer} of this model "
                             "something is added to them. Leave out qk_fix, or use wb.locate.causal.patch.")  # fmt: skip

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[row, head, column, d_head], of the key-value heads for keys."""
        return x.unflatten(2, (-1, self.names.d_head)).transpose(1, 2).float()

    def product(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[row, head, query, key]"""
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)

    def capped(self, raw: torch.Tensor) -> torch.Tensor:
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def effect(self, change: torch.Tensor) -> torch.Tensor:
        """What a change of query-times-key [row, head, query, key] does to the metric, by query: [row, head, query]."""
        moved = self.capped(self.raw + self.scale * change) - self.capped(self.raw)
        scores = torch.where(self.open, self.scores + moved, self.scores)
        return ((scores.softmax(-1) - self.pattern) * self.slope).sum(-1)

    def query(self, other: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """[place, row, head] with other queries [row, column, head * d_head] in the columns of each place."""
        effect = self.effect(self.product(self.heads(other) - self.q, self.k))
        return torch.einsum("nhq,pnq->pnh", effect, masks)

    def key(self, other: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """[place, row, key-value head] with other keys: every query sees them, and the softmax is taken again."""
        change = self.product(self.q, self.heads(other) - self.k)
        effect = torch.stack([self.effect(change * mask[:, None, None]).sum(-1) for mask in masks])
        return effect.unflatten(2, (self.names.n_kv_heads, -1)).sum(-1)
