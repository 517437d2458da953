# SPDX-License-Identifier: Apache-2.0
"""Progress of calibration as lines on stderr."""
import sys
import time

SECONDS_BETWEEN = 5


class ProgressLines:
    """progress(phase, done, total): a line when a phase ends, and every few seconds."""

    def __init__(self):
        self._phase, self._began, self._shown = None, 0.0, 0.0

    def __call__(self, phase, done, total):
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._shown = phase, now, now
        if done < total and now - self._shown < SECONDS_BETWEEN:
            return
        self._shown = now
        print(f"turboquant: {phase}: {done} of {total}, {now - self._began:.0f} s", file=sys.stderr, flush=True)
