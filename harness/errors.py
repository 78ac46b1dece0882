"""The one error that commands explain instead of tracing."""

from __future__ import annotations


class HarnessError(Exception):
    """A mistake the caller can mend. Its text is one line: what is wrong, where, what to do. The CLI exits with 2."""
