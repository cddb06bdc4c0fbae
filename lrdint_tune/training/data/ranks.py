"""Let one process of every machine prepare files before the others read them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# Tokenising millions of rows takes longer than any collective's default timeout (10 minutes with NCCL).
_PATIENCE = timedelta(days=1)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_main_process() -> bool:
    """True in rank 0, and in a run without a process group."""
    return not _initialised() or dist.get_rank() == 0


def is_first_on_node() -> bool:
    """True in the first process of this machine (``LOCAL_RANK``; the global rank when the launcher did not set it)."""
    return not _initialised() or int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body in the first process of every machine, then in all others, which find its caches on disk.

    Every rank must enter. The waiting uses its own gloo group with a long timeout, so that it works whatever the
    backend of the run and however long the first process takes. When the body raises in the first process the others
    are released too: they run the body themselves and meet the same error, instead of waiting for a dead rank.
    """
    if not _initialised():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    first = is_first_on_node()
    try:
        if not first:
            dist.barrier(group=group)
        try:
            yield
        finally:
            if first:
                dist.barrier(group=group)
    finally:
        dist.destroy_process_group(group)
