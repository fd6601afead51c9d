"""What an object's name decides, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np


def stable_hash(text: str) -> int:
    """62 bits of the text's SHA-256, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 2


def object_seed(seed: int, object_id: str) -> int:
    """The seed of an object within a run: 62 bits of SeedSequence([seed, hash of its name])."""
    state = np.random.SeedSequence([seed, stable_hash(object_id)]).generate_state(1, np.uint64)
    return int(state[0]) >> 2
