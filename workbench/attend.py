"""What heads look at: attention to certain tokens scaled or hidden."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import ClassVar

import torch

from workbench.intervention import Intervention


@dataclass(frozen=True, eq=False, repr=False)
class Attend(Intervention):
    """What happens when heads attend more, less or not at all to certain tokens?

    In generation it acts at every step: what is generated looks at `keys` as the prompt does.

    Args:
        at: attn_scores, where the rest of the attention grows or shrinks so that it still sums to one, or pattern, where
            it stays. A position in `at` is that of the query.
        keys: the tokens that are looked at: a position of the prompt (3, -1), a span that the task names, or a list of
            these.
        factor: the attention to `keys` times this; 0 hides them. A query that sees nothing but `keys` is left as it is.
    Source:
        Zhang et al. 2024, "Tell your model where to attend" (PASTA): there all other tokens times 0.01, which is `keys`
        times 100.
    """

    keys: int | str | tuple[int | str, ...]
    factor: float = 0.0
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = self.keys if isinstance(self.keys, (list, tuple)) else (self.keys,)
        object.__setattr__(self, "keys", tuple(keys))
        if not keys or not self.factor >= 0:
            raise ValueError(
                f"Attend takes at least one key and a factor from 0 on; got {self.keys} and {self.factor}."
            )
        for one in self.at:
            if one.kind not in ("attn_scores", "pattern"):
                raise ValueError(f"Attend acts on attn_scores or pattern, for example 'attn_scores.2.*'; got {one}.")

    def on(self, prompts) -> Attend:
        found, seen = replace(self), torch.zeros(len(prompts.ids), prompts.width, dtype=torch.bool)
        for row in range(len(seen)):
            for key in self.keys:
                seen[row, prompts.columns(self.at[0].at(key), row)] = True
        object.__setattr__(found, "_seen", seen)
        return found

    def after(self, step: int) -> Attend:
        found = replace(self)  # no generated token is among the keys
        object.__setattr__(found, "_seen", torch.nn.functional.pad(self._seen, (0, step)))
        return found

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        columns = _columns(x, self._seen.shape[1])
        keys = self._seen[:, columns].to(x.device).view(len(x), *[1] * (x.dim() - 2), x.shape[-1])
        if self.at[which].kind == "pattern":
            return torch.where(keys, x * self.factor, x)
        lowest = torch.finfo(x.dtype).min
        rest = ((x > lowest / 2) & ~keys).any(-1, keepdim=True)  # else the softmax would fall on the future
        return torch.where(keys & rest & (x > lowest / 2), x + math.log(self.factor) if self.factor else lowest, x)

    @property
    def does_nothing(self) -> bool:
        return self.factor == 1


@dataclass(frozen=True, eq=False, repr=False)
class Window(Intervention):
    """What happens when heads see only the first tokens and the latest ones? (Streaming heads.)

    Every query sees the first `sink` tokens of its prompt, the last `window` tokens and itself among these; in generation
    so does every generated token. Nothing is saved here: scores are masked, so that any method can be run on it;
    `improve.efficiency.StreamingCache` stores less and computes the same.

    Args:
        at: attn_scores; a position in `at` is that of the query.
        sink: how many first tokens stay visible. window: how many latest tokens, the query's own included.
    Source:
        Xiao et al. 2023, "Efficient streaming language models with attention sinks".
    """

    sink: int = 1
    window: int = 4
    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in zip(("sink", "window"), window_of(self.sink, self.window), strict=True):
            object.__setattr__(self, name, value)
        for one in self.at:
            if one.kind != "attn_scores":
                raise ValueError(f"Window acts on attn_scores, for example 'attn_scores.2.*'; got {one}.")

    def on(self, prompts) -> Window:
        found = replace(self)
        object.__setattr__(found, "_pads", torch.tensor(prompts.pads))
        object.__setattr__(found, "_width", prompts.width)
        return found

    def after(self, step: int) -> Window:
        found = replace(self)
        object.__setattr__(found, "_pads", self._pads)
        object.__setattr__(found, "_width", self._width + step)
        return found

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        place, query = _columns(x, self._width), torch.arange(self._width)[-x.shape[1] :, None]
        seen = (place < (self._pads + self.sink)[:, None, None]) | (place > query - self.window)
        return torch.where(seen.to(x.device), x, torch.finfo(x.dtype).min)


def window_of(sink, window) -> tuple[int, int]:
    """How much a streaming head sees, checked.

    Raises:
        ValueError: for what is no whole number, a window without the query itself, a sink below 0.
    """
    for value, least in ((sink, 0), (window, 1)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"Window and streaming heads take sink, a whole number from 0 on, and window, one from 1 on; got "
                             f"sink={sink!r} and window={window!r}.")  # fmt: skip
    return int(sink), int(window)


def _columns(x: torch.Tensor, width: int) -> torch.Tensor:
    """Which columns are the keys of scores [row, query, key], of `width` so far: a local layer keeps the latest."""
    if x.shape[-1] > width:
        raise ValueError(f"The cache has room for {x.shape[-1]} keys where there are {width} tokens. Leave out cache_implementation: "
                         "Window and Attend need a cache that grows.")  # fmt: skip
    return torch.arange(width - x.shape[-1], width)
