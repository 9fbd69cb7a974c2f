"""Hypothesis: the same examples every time in CI, random ones in development, ten times as many on request.

    python -m pytest --hypothesis-profile=thorough --hypothesis-seed=1
"""

import os

import torch
from hypothesis import register_random, settings

torch.set_num_threads(1)  # the tensors are small: a second thread waits more than it works
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


class TorchGenerator:
    """Hypothesis seeds it before every example, as those of Python and numpy: a failing torch.randn can be replayed."""

    seed, getstate, setstate = map(staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state))


register_random(TorchGenerator)
