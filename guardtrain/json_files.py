"""JSON files that users write or name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guardtrain.errors import ConfigError


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in a file. kind: what it is, for messages ("a DeepSpeed file"). Raises ConfigError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("cannot be read", where=str(path), expected=kind, found=error.strerror) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not a text file", where=str(path), expected=f"{kind}, in UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError("broken JSON", where=f"{path}:{error.lineno}", expected=kind, found=error.msg) from error
    if not isinstance(tree, dict):
        raise ConfigError("not an object", where=str(path), expected=kind, found=type(tree).__name__)
    return tree
