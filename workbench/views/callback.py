"""What went wrong in a control? Jupyter swallows exceptions of callbacks; here they are shown in the view."""

from __future__ import annotations

import os
from functools import wraps


def guarded(view, function):
    """The callback to hand to ipywidgets: runs `function`, shows its error in the view, and clears it on success.

    Args:
        view: a `View`; its `error` becomes the message.
        function: what the control does.
    Returns:
        A function that raises only where the environment says WORKBENCH_STRICT=1, as it does in tests.
    """

    @wraps(function)
    def callback(*args, **kwargs):
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            view.error = f"{type(error).__name__}: {error.args[0] if len(error.args) == 1 else error}"
            if os.environ.get("WORKBENCH_STRICT") == "1":
                raise
            return None
        view.error = ""
        return found

    return callback
