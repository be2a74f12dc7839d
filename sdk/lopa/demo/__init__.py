"""The demo: held-out Python packages as users, each with a device of its own, against one frozen lopa-nano."""
