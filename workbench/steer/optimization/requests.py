"""Requests to edit facts: which prompts, where their subject stands, what is to be said, what else is to stay."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from workbench.component import Component
from workbench.model import Prompts
from workbench.task import Task

ESSENCE = ("{subject} is a",)  # as in the reference; tells what the subject is
NEEDED = "An edit is a row such as {'prompt': 'tim young lives in', 'subject': 'tim young', 'target_new': 'paris'}"


@dataclass
class Edit:
    """One fact to change, as token ids.

    Attributes:
        subject, target: as texts; label: for messages.
        prompts: (ids with all but the last token of the target, length of the prompt, position of the site).
        target_ids: what is to be said. keep: prompts as (ids, length, position) whose prediction is to stay.
    """

    subject: str
    target: str
    target_ids: torch.Tensor
    prompts: list[tuple] = field(default_factory=list)
    keep: list[tuple] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.subject} -> {self.target}"


def read_edits(model, requests, at: Component, prefixes=(), keep=None) -> list[Edit]:
    """The requests for one site, those of the same subject and target joined into one edit with several prompts.

    Args:
        requests: a row, rows, or a task of pairs (the foil becomes the answer after the clean prompt).
        prefixes: texts; each prompt also stands behind each of them.
        keep: see `values.target_values`.
    Raises:
        ValueError: for rows without prompt, subject or target, a subject that is not in its prompt, one subject with two
            targets, or words the model does not know.
    """
    rows, found = _rows(requests), {}
    for number, row in enumerate(rows):
        prompts, target = row.get("prompt"), row.get("target_new")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        if not prompts or not isinstance(target, str) or not target.strip():
            raise ValueError(f"{NEEDED}; row {number} has {', '.join(map(repr, row))}.")
        subject = row.get("subject")
        if subject is None and isinstance(at.position, str):
            raise ValueError(f"Row {number} names no subject, but the edit is at {at}. {NEEDED}.")
        if (key := subject or prompts[0]) in found and found[key].target != target:
            raise ValueError(
                f"{key!r} is asked to become {found[key].target!r} and {target!r}. Give each subject one target."
            )
        for text in [f"{prefix} {prompt}" for prompt in prompts for prefix in prefixes] + prompts:
            ids, length = continued(model, text, target)
            edit = found.setdefault(key, Edit(key, target, ids[length:]))
            edit.prompts.append((ids[:-1], length, place(model, text, length, at, subject)))
        for text in texts_about(subject, [*_texts(keep), *(row.get("keep") or [])]) if subject else []:
            if (kept := _kept(model, text, at, subject)) is not None:
                found[key].keep.append(kept)
    for edit in found.values():
        if not edit.keep and keep is None and isinstance(at.position, str):
            edit.keep = [
                kept for text in ESSENCE if (kept := _kept(model, text.format(subject=edit.subject), at, edit.subject))
            ]
    return list(found.values())


def continued(model, prompt: str, target: str) -> tuple[torch.Tensor, int]:
    """The ids of prompt and target together, and how many of them are prompt."""
    start = model.ids(prompt)
    for text in [target] if target[0].isspace() else [f" {target}", target]:
        whole = model.ids(prompt + text)
        if len(whole) > len(start) and torch.equal(whole[: len(start)], start):
            return whole, len(start)
    raise ValueError(f"After {prompt!r} the target {target!r} changes how the prompt is cut: model.tokens(text) shows it. End "
                     "the prompt with a whole word.")  # fmt: skip


def place(model, text: str, length: int, at: Component, subject: str | None) -> int:
    """The position of the site in a prompt: the last token of the subject, or the number in the address."""
    if isinstance(at.position, int):
        if not -length <= at.position < length:
            raise ValueError(f"{at}: {text!r} has only {length} tokens.")
        return at.position % length
    spots = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    if len(spots) != 1:
        raise ValueError(f"The subject {subject!r} stands {len(spots)} times in {text!r}; it must stand there once.")
    offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    start, end = spots[0]
    return length - len(offsets) + max(i for i, (a, b) in enumerate(offsets) if a < end and b > start)


def layout(edits: list[Edit], which: list[int]) -> tuple[Prompts, list[int], list[int]]:
    """The prompts of some edits as one batch: (prompts whose span "site" is the site, owner of each row, rows to keep)."""
    ids, lengths, spots, owner, kept = [], [], [], [], []
    for number in which:
        for one, is_kept in [(p, 0) for p in edits[number].prompts] + [(k, 1) for k in edits[number].keep]:
            ids.append(one[0])
            lengths.append(one[1])
            spots.append({"site": [one[2]]})
            owner.append(number)
            kept.append(is_kept)
    return Prompts(ids, lengths, spots), owner, kept


def texts_about(subject: str, texts: list[str]) -> list[str]:
    """The texts in which the subject stands once; `{subject}` in a text is filled in."""
    filled = [text.replace("{subject}", subject) for text in texts]
    return list(dict.fromkeys(t for t in filled if len(re.findall(rf"(?<!\w){re.escape(subject)}(?!\w)", t)) == 1))


def _texts(keep) -> list[str]:
    """Prompts of tasks (their clean side) and prompts given as texts."""
    keep = [keep] if isinstance(keep, (str, Task)) else list(keep or [])
    found = []
    for one in keep:
        if isinstance(one, Task) or one in Task.names():
            task = Task.of(one)
            found += task.column("clean" if task.kind == "pairs" else "text")
        else:
            found.append(one)
    return found


def _kept(model, text: str, at: Component, subject: str):
    try:
        ids = model.ids(text)
    except ValueError:  # words this model does not know
        return None
    return ids, len(ids), place(model, text, len(ids), at, subject)


def _rows(requests) -> list[dict]:
    if isinstance(requests, dict):
        return [requests]
    if isinstance(requests, (str, Task)):
        task = Task.of(requests)
        if task.kind != "pairs":
            raise ValueError(f"Edits are made from pairs or rows; task {task.name!r} holds {task.kind} texts.")
        return [_from_pair(row) for row in task]
    rows = list(requests)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{NEEDED}, a list of them, or a task of pairs.")
    return rows


def _from_pair(row: dict) -> dict:
    where = (row.get("spans") or {}).get("subject")
    subject = row["clean"][where[0] : where[1]] if isinstance(where, (list, tuple)) else where
    return {"prompt": row["clean"], "subject": subject, "target_new": row["foil"], "target_true": row["answer"]}
