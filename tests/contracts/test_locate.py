"""Every way of locating keeps one contract: offered objects are scored with null and cost, by seed, with the weights untouched;
all other objects are refused with a sentence. The table in README says the same."""

import sys
from functools import reduce

import numpy as np
import pytest
import torch
from tiny import copying, tokenizer
from tiny import trained as train

import workbench as wb
from workbench.component import KINDS
from workbench.model.names import MIXTURE
from workbench.scores import Scores
from workbench.task import DATA

sys.path.insert(0, str(DATA))
survey_map = pytest.importorskip("survey_map")

RANKINGS = {one.call: one for one in survey_map.RANKINGS}
ROWS = [row | {"split": split} for row, split in zip(copying(36), ["fit", "test", "ood"] * 12, strict=True)]
LABELLED = [
    {"text": row[side], "label": side, "split": row["split"]} for row in ROWS for side in ("clean", "corrupted")
]


@pytest.fixture(scope="module")
def model():
    found = wb.load(train(), tokenizer=tokenizer())
    eye = torch.eye(found.names.d_model)
    zero = torch.zeros(2 * len(eye)), torch.zeros(len(eye))
    found.attach(
        wb.SAE(torch.cat([eye, -eye], 1), zero[0], torch.cat([eye, -eye]), zero[1], "resid_post.0", name="exact")
    )
    return found


def call(name: str):
    return reduce(getattr, name.split("."), wb.locate)


def family(kind: str) -> str:
    """Every component of a kind, as it is written."""
    return kind if KINDS[kind][0] is None else "feature.exact.*" if kind == "feature" else f"{kind}.*.*"


def run(name: str, model, kind: str) -> Scores:
    task, at = wb.Task(ROWS, "copying"), family(kind)
    if name == "magnitude.pattern_scores":
        return call(name)(model, "induction", at=at)
    if name in ("magnitude.weight_norms", "vocabulary.copying_scores"):
        return call(name)(model, at)
    if name == "magnitude.language_neurons":
        return call(name)(model, wb.Task(LABELLED, "languages"), at)
    if name == "probing.probe":
        return call(name)(model, task, f"{at}@-1")
    return call(name)(model, task, at)


NAMES = [name for name in RANKINGS if name != "features.find"]  # takes an SAE; see test_features.py


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_offered_or_refused(name, kind, model, trained_mixture):
    model = trained_mixture if kind in MIXTURE else model
    before = {key: value.clone() for key, value in model.hf.state_dict().items()}
    if kind not in RANKINGS[name].kinds:
        with pytest.raises(ValueError, match=r"\w+ \w+ .*\w"):
            run(name, model, kind)
    else:
        scores = run(name, model, kind)
        assert isinstance(scores, Scores) and scores.method.startswith(name.split(".")[0])
        assert np.isfinite(scores.values).any() and np.isfinite(scores.null_p95).any() and scores.null
        assert scores.cost >= 0 and scores.seconds > 0 and (scores.n >= 1 or "data-free" in repr(scores))
        assert {"component", "score", "ci_lo", "ci_hi", "null_p95", "n"} <= set(scores.frame.columns)
        assert list(scores.components) == sorted(scores.components) or len({c.position for c in scores.components}) > 1
    for key, value in model.hf.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MIXTURE)
def test_a_model_without_experts_refuses_them(name, kind, model):
    with pytest.raises(ValueError, match=r"\w+ \w+ .*\w"):
        run(name, model, kind)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_scores(name, model):
    kind = next(kind for kind in ("z", *RANKINGS[name].kinds) if kind in RANKINGS[name].kinds)
    one, two = (run(name, model, kind) for _ in range(2))
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.null_p95, two.null_p95)


def test_every_call_of_the_map_is_there():
    for name in [*RANKINGS, *(row[0] for row in survey_map.READINGS)]:
        assert callable(call(name)), name


def test_the_readme_holds_the_map_as_printed():
    assert survey_map.tables() in survey_map.README.read_text(encoding="utf-8")
