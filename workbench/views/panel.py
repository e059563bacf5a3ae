"""What does this change do to what the model says? A panel to steer with, and to read the result in."""

from __future__ import annotations

import html
from dataclasses import replace

import anywidget
import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from traitlets import Any, Dict, Int, Unicode

from workbench.intervention import Intervention
from workbench.measure import mean_interval
from workbench.operations import Delta
from workbench.plot import png
from workbench.recipe import Recipe, flatten
from workbench.task import Task
from workbench.views import pictures
from workbench.views.callback import guarded
from workbench.views.knobs import STRONG, alike, knob_for, named, placed, places_for, set_knob
from workbench.views.names import written
from workbench.views.view import View, image, script

POINTS, PROMPTS, BARS = 9, 16, 8


class Strip(anywidget.AnyWidget):
    """Tokens with the steered ones marked, or bars of next tokens: `data` is drawn. Use `Panel`."""

    _esm, _css = script("strip")
    data = Dict().tag(sync=True)


class Panel(View):
    """Text without and with an intervention, the next token, and the metric against strength.

    Every `Add` and `Delta` gets a slider, every other intervention a switch, and each a menu of the tokens it acts on.

    Args:
        value: an Intervention or a Recipe.
        model: the model to ask.
        prompt: what it is asked.
        task: of pairs; with it the panel can draw the metric against strength, on its first 16 rows.
        guards: tasks of pairs, or their names, whose accuracy is drawn beside it: what else the strength changes.
        max_new_tokens: how much it says.
    Attributes:
        value: at the present strength, without what is switched off. Can be set.
        text: what the model says with it: `model.generate(prompt, value, max_new_tokens=max_new_tokens)`.

    Example:
        >>> panel = wb.show(2 * push, model, prompt="once upon a time")  # doctest: +SKIP
        >>> panel.value = 3 * push  # doctest: +SKIP
    """

    value = Any()
    model = Any()
    prompt = Unicode()
    task = Any(None, allow_none=True)
    max_new_tokens = Int(20, min=1)
    text = Unicode("")

    def __init__(self, value, model, prompt: str, task=None, max_new_tokens: int = 20, guards=()):
        task = task if task is None else Task.of(task)
        super().__init__(value=value, model=model, prompt=prompt, task=task, max_new_tokens=max_new_tokens)
        self.guards = [Task.of(one) for one in ([guards] if isinstance(guards, (str, Task)) else guards)]
        self._given, self._own, self._points, self._bars = value, False, None, []
        self._strip, self._chart = Strip(), Strip()
        self._controls, self._curve = widgets.VBox(), widgets.HTML()
        box = widgets.Textarea if "\n" in prompt else widgets.Text  # chat templates have lines
        ask = box(prompt, continuous_update=False, description="prompt", layout={"width": "600px"},
                  style={"description_width": "initial"})  # fmt: skip
        count = widgets.BoundedIntText(max_new_tokens, min=1, max=2000, description="new tokens",
                                       layout={"width": "150px"}, style={"description_width": "initial"})  # fmt: skip
        traitlets.link((ask, "value"), (self, "prompt"))
        traitlets.link((count, "value"), (self, "max_new_tokens"))
        self._measure = widgets.Button(description="metric against strength", layout={"width": "190px"})
        self._measure.on_click(guarded(self, self._measured))
        self._folder = widgets.Text(
            placeholder="folder of a recipe", layout={"width": "300px"}, continuous_update=False
        )
        files = [self._folder]
        for name, what in (("save", self._saved), ("load", self._loaded)):
            button = widgets.Button(description=name, layout={"width": "80px"})
            button.on_click(guarded(self, what))
            files.append(button)
        head, keep = widgets.HBox([ask, count]), widgets.HBox(files)
        right = widgets.VBox([self._measure, self._curve], layout={"display": "" if task is not None else "none"})
        below = widgets.HBox([self._chart, right], layout={"flex_flow": "row wrap", "grid_gap": "8px 24px"})
        head.add_class("wb-row")
        keep.add_class("wb-row")
        self.fill(head, self._controls, self._strip, below, keep)
        self._build()
        self.observe(guarded(self, self._changed), ["value", "prompt", "max_new_tokens"])
        guarded(self, self._run)()

    @traitlets.validate("value")
    def _is_intervention(self, proposal) -> Intervention | Recipe:
        if not isinstance(proposal["value"], (Intervention, Recipe)):
            raise TypeError(f"panel.value is an Intervention or a Recipe; got {type(proposal['value']).__name__}.")
        return proposal["value"]

    @property
    def code(self) -> str:
        """The line that gives `text`, naming the notebook's own variables where it has them."""
        value, model = written(self.value), written(self.model, "model")
        return f"{model}.generate({self.prompt!r}, {value}, max_new_tokens={self.max_new_tokens})"

    def figure(self):
        lines = [(name, f"{self.prompt} → {text}") for name, text in (("without", self._before), ("with", self.text))]
        return pictures.still(self.error or _brief(self.value), lines, self._bars, self._points, self._now())

    def __repr__(self) -> str:
        return f"Panel({_brief(self.value)}, prompt={self.prompt!r})"

    # controls

    def _build(self) -> None:
        """One control for each part of the value."""
        self._parts = list(flatten(self.value))
        self._knobs = [knob_for(one) for one in self._parts]
        self._places = [places_for(one) for one in self._parts]
        for knob in [*self._knobs, *filter(None, self._places)]:
            knob.observe(guarded(self, self._turned), "value")
        rows = [widgets.HBox(list(filter(None, pair))) for pair in zip(self._knobs, self._places, strict=True)]
        for row in rows:
            row.add_class("wb-row")
        self._controls.children = tuple(rows)

    def _turned(self, _) -> None:
        if self._own:
            return
        parts = []
        for one, knob, place in zip(self._parts, self._knobs, self._places, strict=True):
            one = one if place is None else placed(one, place.value)
            if isinstance(one, STRONG):
                parts.append(replace(one, strength=round(knob.value, 9)))
            elif knob.value:
                parts.append(one)
        single = isinstance(self._given, Intervention) and len(parts) == 1
        whole = self._given if isinstance(self._given, Recipe) else Recipe(())
        self._own = True
        try:
            self.value = parts[0] if single else replace(whole, interventions=tuple(parts))
        finally:
            self._own = False

    def _changed(self, change) -> None:
        if change["name"] == "value" and not self._own:
            self._given = self.value
            parts = flatten(self.value)
            if len(parts) == len(self._parts) and all(map(alike, parts, self._parts)):
                self._own = True
                try:
                    for one, knob in zip(parts, self._knobs, strict=True):
                        set_knob(knob, one)
                finally:
                    self._own = False
            else:
                self._build()
        self._run()

    # keeping

    def _saved(self, _) -> None:
        recipe = self.value if isinstance(self.value, Recipe) else Recipe([self.value])
        self.say_code(f"saved: wb.Recipe.load({str(recipe.for_model(self.model).save(self._chosen()))!r})")

    def _loaded(self, _) -> None:
        self.value = Recipe.load(self._chosen())

    def _chosen(self) -> str:
        if not self._folder.value.strip():
            raise ValueError("Name a folder for the recipe first, for example my_recipe.")
        return self._folder.value.strip()

    # what the model says

    def _run(self) -> None:
        """Ask the model, without and with the value, and show both; after an error show nothing stale."""
        self._strip.add_class("wb-busy")
        self.say_code(self.code)
        try:
            self._ask()
        except BaseException:
            self._before, self.text, self._bars = "", "", []
            self._strip.data = self._chart.data = {}
            raise
        finally:
            self._strip.remove_class("wb-busy")

    def _ask(self) -> None:
        model, prompt, value = self.model, self.prompt, self.value
        plain = model.generate_ids(prompt, max_new_tokens=self.max_new_tokens)[0]
        changed = model.generate_ids(prompt, value, max_new_tokens=self.max_new_tokens)[0]
        first = torch.cat([model.logits(prompt), model.logits(prompt, value)]).softmax(-1)
        tokens, before, after = model.tokens(prompt), pieces(model, plain), pieces(model, changed)
        places, made = steered(value, len(tokens))
        self._before, self.text = "".join(before), "".join(after)
        note = "marked: the tokens at which the change acts" if places or made else ""
        rows = [_row("without", tokens, before, set(), False), _row("with", tokens, after, places, made)]
        self._strip.data = {"rows": rows, "note": note}
        top = sorted(first.amax(0).topk(min(BARS, first.shape[1])).indices.tolist(), key=lambda i: -float(first[1, i]))
        self._bars = [{"token": model.token(i), "before": float(first[0, i]), "after": float(first[1, i])} for i in top]
        self._chart.data = {"bars": self._bars}
        self._draw_curve()

    # the metric against strength

    def _at(self, x: float) -> Intervention | Recipe:
        """The value at strength x; with several Adds, at x times their present strengths."""
        parts = flatten(self.value)
        alone = sum(isinstance(one, STRONG) for one in parts) == 1
        return Recipe([replace(one, strength=float(x if alone else x * one.strength)) if isinstance(one, STRONG) else one
                       for one in parts])  # fmt: skip

    def _now(self) -> float | None:
        strengths = [one.strength for one in flatten(self.value) if isinstance(one, STRONG)]
        return strengths[0] if len(strengths) == 1 else 1.0 if strengths else None

    def _measured(self, _) -> None:
        task, now = self.task[:PROMPTS], self._now()
        about = f"logit_diff on {self.task.name or 'the task'}, {len(task)} prompts"
        if now is None:
            pair = [mean_interval(task.score(self.model, *change)) for change in ((), (self.value,))]
            said = [f"{m:+.2f} [{a:+.2f}, {b:+.2f}]" for m, a, b in pair]
            self._points, self._curve.value = None, html.escape(f"{about}: {said[0]} without, {said[1]} with")
            return
        sliders = [knob for knob in self._knobs if isinstance(knob, widgets.FloatSlider)]
        low, high = (sliders[0].min, sliders[0].max) if len(sliders) == 1 else (-1.0, 2.0)
        x, found, name = np.linspace(low, high, POINTS), [], self._measure.description
        guards = {one.name: [] for one in self.guards}
        try:
            for i, strength in enumerate(x):
                self._measure.description = f"point {i + 1} of {POINTS}"
                found.append(mean_interval(task.score(self.model, self._at(strength))))
                for one in self.guards:
                    kept = one[:PROMPTS].score(self.model, self._at(strength), metric="accuracy")
                    guards[one.name].append(float(kept.mean()))
        finally:
            self._measure.description = name
        mean, lower, upper = (np.array(part).tolist() for part in zip(*found, strict=True))
        unit = "strength" if len(sliders) == 1 else "times the present strengths"
        self._points = {"x": x.tolist(), "mean": mean, "low": lower, "high": upper, "for": self._fixed(),
                        "title": about, "xlabel": unit, "ylabel": "mean, 95 % interval", "guards": guards}  # fmt: skip
        self._draw_curve()

    def _fixed(self) -> Intervention | Recipe:
        """What a curve holds for: everything but the strength it runs over."""
        return self._at(0) if sum(isinstance(one, STRONG) for one in flatten(self.value)) == 1 else self.value

    def _draw_curve(self) -> None:
        if self._points is None or self._points["for"] != self._fixed():
            self._points, self._curve.value = None, ""
            return
        points = self._points
        alt = f"{points['title']}: " + ", ".join(
            f"{m:+.2f} at {x:g}" for x, m in zip(points["x"], points["mean"], strict=True)
        )
        self._curve.value = "".join(
            image(png(pictures.curve(points, self._now(), colours), dpi=200), alt, 400, f"wb-for-{name}")
            for name, colours in (("light", pictures.LIGHT), ("dark", pictures.DARK))
        )


def steered(value, length: int) -> tuple[set[int], bool]:
    """Which of `length` prompt positions does this change act on, and does it act on generated tokens?"""
    places, made = set(), False
    for one in flatten(value):
        if one.does_nothing:
            continue
        made = made or one.phase != "prompt"
        places |= set(range(length)) if isinstance(one, Delta) else set()
        for component in one.at if one.phase != "generation" else ():
            place = component.position
            places |= set(range(length)) if place is None else {place % length} if isinstance(place, int) else set()
    return places, made


def pieces(model, ids) -> list[str]:
    """The text of each generated token; joined they are what `model.generate` returns."""
    decode = lambda some: model.tokenizer.decode(some, skip_special_tokens=True).strip()  # noqa: E731
    whole, said, found = decode(ids), "", []
    for i in range(len(ids)):
        text = whole if i + 1 == len(ids) else decode(ids[: i + 1]).rstrip("\ufffd")
        found.append(text.removeprefix(said) if text.startswith(said) else "")
        said += found[-1]
    return found if said == whole else [whole]


def _row(name: str, tokens, said, places: set[int], made: bool) -> dict:
    """One line of the strip."""
    return {
        "name": name,
        "prompt": [{"text": text, "steered": i in places} for i, text in enumerate(tokens)],
        "generated": [{"text": text, "steered": made} for text in said],
    }


def _brief(value) -> str:
    if isinstance(value, Recipe):
        return f"{value.name or 'recipe'} of {len(value)}"
    strength = f", strength {value.strength:+g}" if isinstance(value, STRONG) else ""
    return f"{type(value).__name__} at {named(value)}{strength}"
