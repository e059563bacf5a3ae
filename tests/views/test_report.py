"""The view of a report: its verdict as text, over its picture."""

import pandas as pd

import workbench as wb


def line(arm, role, task, change):
    return {"arm": arm, "role": role, "task": task, "split": "ood", "metric": "accuracy", "before": 0.4, "n": 20,
            "after": 0.4 + change, "change": change, "ci_lo": change - 0.1, "ci_hi": change + 0.1}  # fmt: skip


def test_a_report_shows_its_verdict_and_its_picture():
    frame = pd.DataFrame([line("recipe", "target", "a<b", 0.3), line("random", "target", "a<b", 0.0),
                          line("recipe", "guard", "agreement", -0.02)])  # fmt: skip
    against = pd.DataFrame(
        [{"control": "random", "split": "ood", "metric": "accuracy", "ci_lo": 0.1, "ci_hi": 0.4, "difference": 0.3,
          "control_after": 0.4}]
    )  # fmt: skip
    each = {
        "arm": "recipe",
        "task": "agreement",
        "split": "ood",
        "metric": "accuracy",
        "before": [1.0, 0.0],
        "after": 0.0,
    }
    report = wb.Report("less copying", frame, against, pd.DataFrame(each), {})
    view = wb.show(report)
    _, words, picture, *_ = view.children
    assert "a&lt;b (ood): 0.40 -&gt; 0.70" in words.value and "1 of 2 lost" in words.value and "a<b" not in words.value
    assert "data:image/png" in picture.value and 'alt="It helps' in picture.value
    assert view.value is report and repr(report) in repr(view) and view.figure().axes
