"""Load a guard for serving: the engine that scores, and what its verdicts rest on."""

from __future__ import annotations

from dataclasses import dataclass

from guardtrain.serve.engine import Engine
from guardtrain.serve.facts import GuardFacts


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What to load and how much at once. model: as for `load_guard`. threads: of torch; its own choice if absent."""

    model: str
    policy: str | None = None
    device: str | None = None
    max_batch: int
    batch_tokens: int
    threads: int | None = None


def load_engine(arguments: ModelArguments) -> tuple[Engine, GuardFacts]:
    """The guard in this process. Raises ModelError."""
    import torch

    from guardtrain.inference.guards import load_guard
    from guardtrain.inference.lean import make_lean
    from guardtrain.inference.live import LiveScorer
    from guardtrain.model.packed import pack_linear_layers

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    guard = load_guard(arguments.model, policy=arguments.policy, device=arguments.device)
    if not make_lean(guard.model):
        pack_linear_layers(guard.model)
    settings, template = guard.settings, guard.template
    live = LiveScorer(guard.model, guard.tokenizer, template, max_reason_tokens=settings.max_reason_tokens)
    engine = Engine(
        live,
        lambda prompt: template.prompt_segment(prompt).input_ids,
        max_batch=arguments.max_batch,
        batch_tokens=arguments.batch_tokens,
    )
    return engine, GuardFacts.of(settings, template.encoder)
