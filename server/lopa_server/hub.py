"""Where a foundation model's files are."""

from __future__ import annotations

from pathlib import Path


def resolve_folder(fm: str | Path) -> Path:
    """The folder of a Hugging Face id or path; an id is looked up in the local cache and downloaded when missing.

    Raises:
        FileNotFoundError: neither a folder nor an id that can be fetched.
    """
    folder = Path(fm)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(fm), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{fm} is neither a model folder nor a Hugging Face id that can be fetched: {error}") from error
