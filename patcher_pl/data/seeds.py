"""Independent seeds for independent uses of randomness."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Returns a seed in [0, 2^63) that depends on `seed` and on what it is used for.

    The same on every machine and Python version; neighboring seeds and purposes are unrelated.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
