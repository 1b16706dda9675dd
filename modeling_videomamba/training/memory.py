"""Memory of a training process."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """
    From now on the C library keeps memory that is freed, where it can be told to (glibc), and says whether it does.

    A step of training on a CPU frees what the backward pass has used, and the next step takes it anew. By default that
    memory goes back to the system in between, which clears all of it again, page by page.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # glibc before 2.35 takes no more than the second size
    large = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    return bool(large and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
