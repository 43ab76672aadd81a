"""The backends by name."""

from __future__ import annotations

from guardtrain.errors import ConfigError
from guardtrain.options import one_of
from guardtrain.serve.backend import Backend, ThreadBackend
from guardtrain.serve.chat import ChatBackend
from guardtrain.serve.completions import CompletionsBackend
from guardtrain.serve.loading import ModelArguments, load_engine
from guardtrain.serve.options import GuardOptions
from guardtrain.serve.process import ProcessBackend

REMOTE = {"openai": CompletionsBackend, "openai-chat": ChatBackend}
NAMES = ("transformers", "process", *REMOTE)


def make_backend(
    name: str,
    model: str,
    *,
    policy: str | None,
    device: str | None,
    base_url: str | None,
    api_key: str | None,
    options: GuardOptions,
) -> Backend:
    """A backend that is not started yet. Raises ConfigError."""
    one_of("backend", name, NAMES)
    if (name in REMOTE) is (base_url is None):
        raise ConfigError(
            "the address of a server goes with backend openai, and with no other", where="base_url", found=str(base_url)
        )
    if base_url is not None:
        return REMOTE[name](
            model,
            base_url,
            api_key=api_key,
            policy=policy,
            concurrency=options.max_batch,
            timeout_seconds=options.timeout_seconds,
        )
    arguments = ModelArguments(
        model=model,
        policy=policy,
        device=device,
        max_batch=options.max_batch,
        batch_tokens=options.batch_tokens,
        threads=options.threads,
    )
    if name == "process":
        return ProcessBackend(arguments, hang_seconds=options.hang_seconds)
    return ThreadBackend(lambda: load_engine(arguments))
