"""The server: one frozen language model for everybody, nothing kept about anyone."""
