"""The limits of the shell on the memory of this process (`ulimit`)."""

import sys

LEAST_SPACE, LEAST_DATA = 1_600_000_000, 1_000_000_000  # bytes of MLX and its threads, two cores


def memory_limits() -> list[tuple[str, int, int]]:
    """Return the command, the bytes and the least useful bytes of each limit on this process."""
    if sys.platform != "linux":  # a Mac does not enforce them
        return []
    import resource  # Windows, on which cli.run refuses to start, has none

    kinds = (("ulimit -v", resource.RLIMIT_AS, LEAST_SPACE),
             ("ulimit -d", resource.RLIMIT_DATA, LEAST_DATA))  # fmt: skip
    sizes = [(command, resource.getrlimit(kind)[0], least) for command, kind, least in kinds]
    return [limit for limit in sizes if limit[1] != resource.RLIM_INFINITY]


def check_memory_limits() -> None:
    """Raise MemoryError if a limit leaves too little to begin with.

    Libraries would end the process themselves, with lines that name no cure.
    """
    for _, size, least in memory_limits():
        if size < least:
            raise MemoryError(f"MLX and its threads take {least:,} bytes before any model")
