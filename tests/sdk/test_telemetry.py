"""What runs on the device tells nobody but its server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ONE_RUN = """
import sys
from pathlib import Path
from lopa.bundle import Bundle
from lopa.encoder import PromptEncoder
PromptEncoder(Bundle.open(Path(sys.argv[1]))).encode(["x"])
"""


def test_the_runtime_leaves_no_device_id(bundle_folder: Path, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry keeps one in the cache folder as soon as it is loaded; the variable CI would turn it off by itself."""
    inherited = {name: value for name, value in os.environ.items() if name != "CI" and "TELEMETRY" not in name}
    homes = dict.fromkeys(("HOME", "XDG_CACHE_HOME"), str(tmp_path))
    subprocess.run([sys.executable, "-c", ONE_RUN, str(bundle_folder)], env={**inherited, **homes}, check=True)
    assert not [path for path in tmp_path.rglob("*") if "Microsoft" in path.parts or "deviceid" in path.name]
