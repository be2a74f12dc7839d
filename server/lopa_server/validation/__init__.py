"""Every field that comes from outside becomes a checked engine type here, or a WireError naming field, limit and finding."""
