"""Hypothesis: the same examples every time in CI, random ones in development, ten times as many on request.

    python -m pytest --hypothesis-profile=thorough --hypothesis-seed=1
"""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
