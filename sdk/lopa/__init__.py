"""The device: a personal version of a frozen language model, without torch."""
