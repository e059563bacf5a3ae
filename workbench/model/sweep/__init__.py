"""Many patches in few forward passes, exactly.

A patch changes the run at a depth and a position; nothing before either moves. So each patch starts there: blocks below
are skipped, positions before are read from cached keys and values, and patches that start at the same depth share a
batch, also of prompts of different length (they are lined up at their ends). Patches that cannot have an effect (the
prompts agree up to there, or no attention follows) are not run. What a block writes (z, neurons, features, its output)
is added to the stream as a difference; queries, keys, values, attention scores and patterns are set inside the block's
attention, routers and experts inside its FFN, and so is everything when several components change together. Results equal
patching with full forward passes to float error.
"""

from workbench.model.sweep.capture import Run, capture, span, stream_at
from workbench.model.sweep.cells import Cell, Row, bar, run_rows, sweep
from workbench.model.sweep.resume import resume

__all__ = ["Cell", "Row", "Run", "bar", "capture", "resume", "run_rows", "span", "stream_at", "sweep"]
