"""What runs inside the sandbox: the standard library only, imported by processes without site-packages."""
