"""Units that a reader of results meets."""

import math


def bits_per_byte(nats: float) -> float:
    """Return a loss in bits per byte from one in nats per byte, a number or an array of them."""
    return nats / math.log(2)
