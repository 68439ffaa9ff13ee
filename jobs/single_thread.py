"""One thread for all numerics: the same sums in the same order, and one core per worker."""

from __future__ import annotations

__all__ = ["use_one_thread"]


def use_one_thread() -> None:
    """Set torch, and what numpy calls, to one thread for the rest of the process."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    torch.set_num_threads(1)
    threadpool_limits(1)
