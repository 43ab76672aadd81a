"""What a command says, and where: results on standard output, everything else on the error stream."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def start() -> Console:
    """Logging and a console on the error stream; results go to the output stream."""
    from rich.console import Console
    from rich.logging import RichHandler

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # launch/accelerate/cpu.yaml means it, also where there is a GPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at import of a faster kernel that is not installed
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    logger = logging.getLogger("guardtrain")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.handlers = [handler]
    logger.propagate = False
    return console


def output() -> Console:
    """For results."""
    from rich.console import Console

    return Console()


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
