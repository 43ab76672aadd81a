"""The guard in production: checks prompts in this process, behind a server, or through one; loads nothing heavy on import."""

from guardtrain.serve.guard import Guard
from guardtrain.serve.verdict import Failure, Status, Verdict

__all__ = ["Failure", "Guard", "Status", "Verdict"]
