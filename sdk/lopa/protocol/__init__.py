"""The contract's client half without any I/O, so that a synchronous and an asynchronous client share it."""
