"""What all tests have in common."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("lopa", deadline=None)
settings.load_profile("lopa")
"""No example is too slow: how long one takes says how busy the machine is."""
