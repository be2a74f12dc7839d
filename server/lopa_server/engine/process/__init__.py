"""The engine in a process of its own: it can crash, hang and be killed while the server answers, and shares no interpreter with it."""
