"""A behaviour as data: rows of prompts with what counts as right. Three kinds, told apart by their columns.

- pairs: `clean`, `corrupted`, `answer`, `foil` (answer is right after clean, foil after corrupted)
- labelled texts: `text`, `label`
- plain texts: `text`

Optional columns: `spans` (name -> [start, end] characters of `clean`, or a substring), `template`, `entity`, `split`
(fit, select, test: new entities, ood: new entities and new templates).
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from workbench import measure, storage

SPLITS = ("fit", "select", "test", "ood")
PAIR = ("clean", "corrupted", "answer", "foil")
DATA = next(p for p in (Path(__file__).parent / "data", Path(__file__).parents[1] / "data") if p.is_dir())


@dataclass(frozen=True)
class Task:
    """A behaviour as rows of prompts.

    Args:
        rows: a list of dicts, or a pandas or datasets table. A row has the texts `clean`, `corrupted`, `answer` and `foil` (pairs:
            the answer is right after clean, the foil after corrupted); or `text` and `label`; or `text` alone. It may have
            `spans` {name: [start, end] characters of clean, or a substring}, `split` ("fit", "select", "test", "ood"),
            `entity` and `template` (who and how it asks, to hold out), and in pairs `completion` (a whole answer that begins
            with `answer`, for training).
        name: for titles.
    """

    rows: tuple[dict, ...]
    name: str = ""

    def __post_init__(self) -> None:
        rows = self.rows
        if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
            rows = rows.to_dict("records")
        if isinstance(rows, (str, dict)) or not all(hasattr(row, "items") for row in rows):
            raise TypeError("A task is made from a list of dicts, such as [{'clean': ..., 'corrupted': ..., 'answer': ..., "
                            "'foil': ...}], or a table. wb.Task.load(name) opens a bundled one or a file.")  # fmt: skip
        rows = tuple({k: v for k, v in row.items() if not _empty(v)} for row in rows)
        if not rows:
            raise ValueError("A task needs at least one row.")
        object.__setattr__(self, "rows", rows)
        kind = self.kind
        needed = {"pairs": PAIR, "labelled": ("text", "label"), "plain": ("text",)}[kind]
        for i, row in enumerate(rows):
            for column in needed:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise ValueError(
                        f"Row {i} of a task of {kind} needs a text in {column!r}; got {row.get(column)!r}."
                    )
            if row.get("split", SPLITS[0]) not in SPLITS:
                raise ValueError(f"Row {i}: split {row['split']!r} is unknown; use {', '.join(SPLITS)}.")

    @property
    def kind(self) -> str:
        """ "pairs", "labelled" or "plain"."""
        columns = {column for row in self.rows for column in row}
        if "clean" in columns:
            return "pairs"
        if "text" in columns:
            return "labelled" if "label" in columns else "plain"
        raise ValueError(f"These columns make no task: {', '.join(sorted(columns))}. Pairs have {', '.join(PAIR)}; "
                         "labelled texts text, label; plain texts text.")  # fmt: skip

    @classmethod
    def names(cls) -> list[str]:
        """The tasks that come with the workbench."""
        return sorted(path.stem for path in (DATA / "tasks").glob("*.jsonl"))

    @classmethod
    def load(cls, name) -> Task:
        """A bundled task by name, or a CSV, JSON or JSONL file.

        Raises:
            ValueError: for an unknown name, with the nearest.
        """
        path = Path(name)
        if str(name) in cls.names():
            path = DATA / "tasks" / f"{name}.jsonl"
        elif not path.is_file():
            near = difflib.get_close_matches(str(name), cls.names(), 1, 0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"There is no task {str(name)!r}.{hint} Bundled: {', '.join(cls.names())}; or give a CSV, "
                             "JSON or JSONL file.")  # fmt: skip
        if path.suffix == ".csv":
            import pandas as pd

            return cls(pd.read_csv(path, keep_default_na=False, dtype=str), path.stem)
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(s) for s in text.splitlines() if s.strip()]
        return cls(rows, path.stem)

    @classmethod
    def of(cls, task) -> Task:
        """A task as it is, or a bundled one by its name."""
        return task if isinstance(task, cls) else cls.load(task)

    def save(self, path) -> Path:
        """Write the rows as JSONL."""
        return storage.write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))

    @property
    def frame(self):
        """The rows as a pandas table."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def split(self, name: str) -> Task:
        """The rows of one split: "fit", "select", "test" or "ood".

        Raises:
            ValueError: when the task has no such rows.
        """
        rows = [row for row in self.rows if row.get("split") == name]
        if not rows:
            have = sorted({str(row.get("split")) for row in self.rows})
            raise ValueError(f"Task {self.name!r} has no rows of split {name!r}; it has {', '.join(have)}.")
        return Task(rows, self.name)

    def column(self, name: str) -> list:
        """One column; None where a row has none."""
        return [row.get(name) for row in self.rows]

    def clusters(self, rows=None) -> list | None:
        """Which rows does an interval resample together? Those of one entity, and those of one template.

        For `measure.mean_interval`. A row that names none stands alone; a labeling that tells no rows apart is left out.

        Args:
            rows: numbers of the rows that are meant; all without.
        Returns:
            A label for each of these rows, once per labeling; None where each row stands alone.
        """
        rows, found = list(range(len(self)) if rows is None else rows), []
        for name in ("entity", "template"):
            column = self.column(name)
            labels = [f"row {i}" if column[i] is None else f"{name} {column[i]}" for i in rows]
            if len(set(labels)) > 1 and any(column[i] is not None for i in rows):
                found.append(labels)
        return found or None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter([dict(row) for row in self.rows])

    def __getitem__(self, index) -> Task:
        rows = self.rows[index]
        return Task([rows] if isinstance(rows, dict) else rows, self.name)

    def __repr__(self) -> str:
        counts = {name: sum(row.get("split") == name for row in self.rows) for name in SPLITS}
        parts = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
        return f"Task({self.name or 'unnamed'}, {len(self)} {self.kind}{': ' + parts if parts else ''})"

    # with a model

    def on(self, model) -> Pairs:
        """The pairs as token ids of this model; rows that do not fit are left out, with reasons in `.dropped`.

        Raises:
            ValueError: when fewer than a quarter of the rows fit, with the reasons; for a task of texts.
        """
        if self.kind != "pairs":
            raise ValueError(f"Task {self.name!r} holds {self.kind} texts; this needs pairs ({', '.join(PAIR)}).")
        tokenizer, bos, pairs = self.__dict__.get("_read", (None, None, None))
        if tokenizer is not model.tokenizer or bos != model.bos:  # tasks do not change: they are cut once
            pairs = self._cut(model)
            object.__setattr__(self, "_read", (model.tokenizer, model.bos, pairs))
        clean, corrupted = ([ids.clone() for ids in side] for side in (pairs.clean, pairs.corrupted))
        # copies: what a caller does to them stays out of later scores
        return replace(pairs, clean=clean, corrupted=corrupted, answer=pairs.answer.clone(), foil=pairs.foil.clone(),
                       spans=[{name: list(places) for name, places in row.items()} for row in pairs.spans])  # fmt: skip

    def _cut(self, model) -> Pairs:
        kept, compiled, dropped = [], [], []
        for row in self.rows:
            try:
                compiled.append(_compile(row, model))
                kept.append(row)
            except ValueError as error:
                dropped.append((row["clean"], str(error)))
        if len(self.rows) == 1 and dropped:
            raise ValueError(dropped[0][1])
        if len(kept) * 4 < len(self.rows):
            reasons = list(dict.fromkeys(reason for _, reason in dropped))[:3]
            raise ValueError(f"Only {len(kept)} of {len(self.rows)} rows of task {self.name!r} fit this model. "
                             + " ".join(reasons))  # fmt: skip
        import pandas as pd

        clean, corrupted, answer, foil, spans = zip(*compiled, strict=True)
        return Pairs(Task(kept, self.name), list(clean), list(corrupted), torch.tensor(answer), torch.tensor(foil),
                     list(spans), pd.DataFrame(dropped, columns=["clean", "reason"]))  # fmt: skip

    def tokens(self, model) -> tuple:
        """Clean and corrupted ids: tensors [prompt, position] where all lengths agree, else lists of 1-D tensors."""
        pairs = self.on(model)
        same = len({len(ids) for ids in pairs.clean}) == 1
        return (torch.stack(pairs.clean), torch.stack(pairs.corrupted)) if same else (pairs.clean, pairs.corrupted)

    def answers(self, model) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer and foil ids, each [prompt]."""
        pairs = self.on(model)
        return pairs.answer, pairs.foil

    def score(self, model, *interventions, metric="logit_diff", prompt: str = "clean") -> np.ndarray:
        """How well does the model do on each row, with these interventions? [prompt], in units of the metric."""
        pairs = self.on(model)
        logits = model.logits(getattr(pairs, prompt), *interventions, spans=pairs.spans)
        return measure.metric(metric)(logits, pairs.answer, pairs.foil).numpy()


@dataclass(frozen=True, eq=False)
class Pairs:
    """A task of pairs as token ids of one model.

    Attributes:
        task: the rows that fit. clean, corrupted: lists of 1-D ids, equally long row by row.
        answer, foil: ids [prompt]. spans: name -> positions, for each prompt. dropped: a table of rows and reasons.
    """

    task: Task
    clean: list
    corrupted: list
    answer: torch.Tensor
    foil: torch.Tensor
    spans: list[dict]
    dropped: object


def _empty(value) -> bool:
    """Nothing in this column: None, an empty text, or the NaN that tables put there."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _compile(row: dict, model) -> tuple:
    clean, corrupted = model.ids(row["clean"]), model.ids(row["corrupted"])
    if len(clean) != len(corrupted):
        raise ValueError(f"Clean and corrupted must have equal token length, to be compared position by position: "
                         f"{row['clean']!r} has {len(clean)} tokens, {row['corrupted']!r} {len(corrupted)}. "
                         "model.tokens(text) shows the cuts.")  # fmt: skip
    answer, foil = (_answer(row["clean"], row[column], clean, model) for column in ("answer", "foil"))
    if answer == foil:
        raise ValueError(f"Answer {row['answer']!r} and foil {row['foil']!r} begin with the same token.")
    return clean, corrupted, answer, foil, _spans(row, clean, model)


def _answer(prompt: str, answer: str, ids: torch.Tensor, model) -> int:
    """The one token that `answer` adds to the prompt, after a space unless it brings its own."""
    for text in [answer] if answer[0].isspace() else [f" {answer}", answer]:
        try:
            whole = model.ids(prompt + text)
        except ValueError:  # a word the tokenizer does not know
            continue
        if len(whole) == len(ids) + 1 and torch.equal(whole[:-1], ids):
            return int(whole[-1])
    cut = model.tokens(f"{prompt} {answer.strip()}")[len(ids) :]
    raise ValueError(f"The answer {answer!r} is no single token of this model after {prompt!r}: it is cut into {cut}.")


def _spans(row: dict, ids: torch.Tensor, model) -> dict[str, list[int]]:
    spans = row.get("spans") or {}
    if not spans:
        return {}
    spans = ast.literal_eval(spans) if isinstance(spans, str) else spans  # from a CSV file
    text, found = row["clean"], {}
    offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    shift = len(ids) - len(offsets)
    for name, where in spans.items():
        if isinstance(where, str):
            places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(where)}(?!\w)", text)]
            if len(places) != 1:
                raise ValueError(f"Span {name!r}: {where!r} stands {len(places)} times in {text!r}; give [start, end] "
                                 "characters.")  # fmt: skip
            where = places[0]
        start, end = where
        positions = [i + shift for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not positions:
            raise ValueError(f"Span {name!r} [{start}, {end}] holds no token of {text!r}.")
        found[name] = positions
    return found
