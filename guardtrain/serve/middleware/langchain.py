"""For chains: a step that lets harmless input through unchanged. It needs no LangChain, and LangChain takes it as a Runnable.

chain = RunnableLambda(GuardStep(Guard.load("runs/guard"))) | prompt | model
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from guardtrain.serve.middleware.common import Checks, Gatekeeper, GuardBlocked
from guardtrain.serve.untrusted import UNTRUSTED, Piece, in_anything, in_messages, piece
from guardtrain.serve.verdict import Failure


class GuardStep:
    """Input in, the same input out; GuardBlocked is raised for what must not go on, or `on_block` says what to return instead.

    Input: a text, a mapping, messages (LangChain's, OpenAI's, pairs of role and text), or a prompt value that holds them.
    guard: a local one, or the URL of a running server (with api_key). fails_open: failures that let a text pass.
    """

    def __init__(
        self,
        guard: Checks | str,
        *,
        api_key: str | None = None,
        fails_open: Collection[Failure] = (),
        on_block: Callable[[GuardBlocked], Any] | None = None,
    ) -> None:
        self.gatekeeper = Gatekeeper(guard, api_key=api_key, fails_open=fails_open)
        self.on_block = on_block

    def invoke(self, given: Any, config: Any = None, **options: Any) -> Any:
        """Judge and pass on. Raises GuardBlocked, ServeError."""
        try:
            self.gatekeeper.admit(pieces_of(given))
        except GuardBlocked as blocked:
            return self._blocked(blocked)
        return given

    async def ainvoke(self, given: Any, config: Any = None, **options: Any) -> Any:
        """As `invoke`."""
        try:
            await self.gatekeeper.aadmit(pieces_of(given))
        except GuardBlocked as blocked:
            return self._blocked(blocked)
        return given

    def __call__(self, given: Any) -> Any:
        """As `invoke`."""
        return self.invoke(given)

    def _blocked(self, blocked: GuardBlocked) -> Any:
        if self.on_block is None:
            raise blocked
        return self.on_block(blocked)


def pieces_of(given: Any) -> list[Piece]:
    """The untrusted texts of whatever flows through a chain."""
    if hasattr(given, "to_messages"):
        given = given.to_messages()
    if isinstance(given, str):
        return [piece("input", "user", given)]
    if isinstance(given, Mapping):
        return [found for value in given.values() for found in pieces_of(value)]
    if isinstance(given, Sequence) and given and all(map(_is_message, given)):
        return in_messages([_as_message(each) for each in given], UNTRUSTED)
    if _is_message(given):
        return in_messages([_as_message(given)], UNTRUSTED)
    return in_anything(given, "input")


def _is_message(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)
    return is_pair or (isinstance(value, Mapping) and "role" in value) or (hasattr(value, "content") and hasattr(value, "type"))


def _as_message(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple):
        return {"role": value[0], "content": value[1]}
    return {"role": {"ai": "assistant"}.get(value.type, value.type), "content": value.content}
