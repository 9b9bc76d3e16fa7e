"""Memory that is freed stays with the process: on Linux, that makes training steps faster.

The activations of a batch are tens of megabytes, which glibc asks of the kernel anew in every step, zeroed page by
page, unless it is told to keep what was freed. Forward and backward passes of the CNN of width 32, batch 128, on two
cores: 1,909 images/s without, 2,677 with it; batch 256: 1,383 and 2,515.
"""

import ctypes
import functools
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_memory():
    """Tell glibc's malloc, once and for the whole process; where there is another, do nothing."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks from the heap too, not from the kernel one by one
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # of the heap's free end, keep up to so many bytes
