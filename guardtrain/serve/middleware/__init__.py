"""A guard inside somebody else's program: an ASGI layer, a step of a chain, an OpenAI client. Each takes a guard or a URL."""

from guardtrain.serve.middleware.common import GuardBlocked

__all__ = ["GuardBlocked"]
