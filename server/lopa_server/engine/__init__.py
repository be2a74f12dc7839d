"""Engines: whoever runs the frozen foundation model. `base` is the seam; nothing here imports torch until an engine is built."""
