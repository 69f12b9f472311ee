"""Random states, saved and put back; and seeds that ranks and resumed runs share, never taken from a global state."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from groundwire._lightning import collect_rng_states, set_rng_states

#: Random generators that somebody may hold as an object.
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def derive_seed(*parts: int | str) -> int:
    """Return a well-mixed 63-bit seed from ``parts``, the same in every process and Python version.

    Example:
        >>> derive_seed(1, 2) == derive_seed(1, 2), derive_seed(1, 2) == derive_seed(1, 3)
        (True, False)
    """
    digest = blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_globals(seed: int) -> None:
    """Seed the global generators of torch (all devices in use), NumPy and Python."""
    if _accelerator_in_use():
        torch.manual_seed(seed)
    else:
        # With an accelerator that nobody has used yet, torch.manual_seed formats a stack trace, which is slow, and
        # seeds that device whenever it is first used: a trace that could not be undone.
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _accelerator_in_use() -> bool:
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return False
    module = torch.get_device_module(kind)
    return bool(module.is_initialized()) if hasattr(module, "is_initialized") else True


def rewinding(generator: Any) -> Callable[[], Any]:
    """Return what puts ``generator``, one of :data:`GENERATORS`, back to its state of now.

    Example:
        >>> generator = random.Random(1)
        >>> rewind, first = rewinding(generator), generator.random()
        >>> rewind()
        >>> generator.random() == first
        True
    """
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    return functools.partial(generator.setstate, generator.getstate())


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Context manager that puts every global random state back on exit, also after an exception.

    Lightning's ``isolate_rng`` does not after an exception.

    Example:
        >>> import random
        >>> with preserve_rng():
        ...     first = random.random()
        >>> random.random() == first
        True
    """
    states = collect_rng_states()
    try:
        yield
    finally:
        set_rng_states(states)
