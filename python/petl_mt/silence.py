"""Keeps transformers' own messages away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hush() -> Iterator[None]:
    """While the block runs, transformers prints errors only, and no progress bars."""
    import transformers  # here: it takes seconds to load

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
