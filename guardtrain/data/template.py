"""From rows to token segments: the model's own chat template, the two modes, and which tokens are supervised.

A guard row becomes a tree (design: tree packing): the policy segment, which all rows share; the prompt segment; and one
completion segment for each mode. In text, on a model without think tokens of its own:

    mode off   <think></think>\\nVerdict: malicious
    mode on    <think>REASON</think>\\nVerdict: malicious

Everything that comes from a row is encoded by `encode_plain`, which knows no special tokens, so no prompt can close its
turn or open a think block of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

from guardtrain.data.packing import Segment
from guardtrain.errors import DataError, ModelError
from guardtrain.types import ChatExample, GuardExample, Label, Mode, Turn, prompt_text

VERDICT = "Verdict:"
# Llama 3.1 and later print today's date into the system turn; a fixed one keeps training and serving equal.
FIXED_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class ThinkSpelling:
    """How a template writes its think block: around a reason, and empty."""

    opening: str
    closing: str
    empty: str


OWN_THINK = ThinkSpelling(opening="<think>", closing="</think>\n", empty="<think></think>\n")
NATIVE_THINK = ThinkSpelling(opening="<think>\n", closing="\n</think>\n\n", empty="<think>\n\n</think>\n\n")


@dataclass(frozen=True)
class VerdictIds:
    """The forced tokens before a verdict and the tokens of each label after them; the labels' first tokens differ."""

    prefix: list[int]
    labels: dict[Label, list[int]]


class GuardTemplate:
    """The token segments of guard rows for one tokenizer and one policy.

    tokenizer: a fast transformers tokenizer, with or without a chat template and a pad token.
    Raises ModelError when the tokenizer cannot carry a guard (no fast tokenizer, labels that cannot be told apart).
    """

    def __init__(self, tokenizer: Any, policy: str, *, verdict_weight: float = 1.0) -> None:
        self.encoder = PlainEncoder(tokenizer)
        self.policy = policy
        self.verdict_weight = verdict_weight
        self.think = think_spelling(tokenizer)
        before_policy, before_prompt, after_prompt = guard_scaffold(tokenizer)
        encode = self.encoder.scaffold
        self.policy_ids = encode(before_policy) + self.encoder.plain(policy) + encode(before_prompt)
        self.after_prompt_ids = encode(after_prompt)
        self.end_ids = [end_of_turn_id(tokenizer)]
        self.opening_ids = encode(self.think.opening)
        self.off_verdict = verdict_ids(self.encoder, self.think.empty)
        self.on_verdict = verdict_ids(self.encoder, self.think.closing)

    def policy_segment(self, children: Sequence[Segment] = ()) -> Segment:
        """The root of every pack. Not supervised."""
        return Segment.unsupervised(self.policy_ids, children)

    def prompt_segment(self, prompt: tuple[Turn, ...]) -> Segment:
        """The untrusted text as plain tokens, and the opening of the assistant's turn. Not supervised."""
        return Segment.unsupervised(self.encoder.plain(prompt_text(prompt)) + self.after_prompt_ids)

    def row(self, example: GuardExample, modes: Sequence[str] = tuple(Mode)) -> Segment:
        """The prompt of a labelled row, continued by its completions; not supervised but for what these begin with alike."""
        return self.prompt_segment(example.prompt).continued(self.completions(example, modes))

    def completions(self, example: GuardExample, modes: Sequence[str] = tuple(Mode)) -> list[Segment]:
        """What the assistant says of a labelled row in each mode; `on` needs a reason. Raises DataError when nothing is left."""
        completions = []
        if Mode.OFF in modes:
            completions.append(self._off(example.label))
        if Mode.ON in modes and example.reason is not None:
            completions.append(self._on(example.reason, example.label))
        if not completions:
            raise DataError("the row trains nothing", where=example.where, expected="a reason, or mode off", found="neither")
        return completions

    def count_prompt_tokens(self, prompt: tuple[Turn, ...]) -> int:
        """Tokens of the untrusted text alone."""
        return len(self.encoder.plain(prompt_text(prompt)))

    def reason_stops(self) -> set[int]:
        """Tokens that end a reason wherever they come: the end of the turn, and a native closing token.

        2026-11: an untuned Qwen3 writes full stop and line end as one token, then </think>; the line end before it never comes.
        """
        return {*self.encoder.powerful_ids.intersection(self.on_verdict.prefix), *self.end_ids}

    def reason_end(self) -> list[int]:
        """How a trained reason ends: the shortest beginning of the closing that no single sentence holds.

        A line end, or `</think`: its first token alone (`</`, in SentencePiece models a space) may well stand in a reason.
        """
        closing = self.on_verdict.prefix
        for length in range(1, len(closing)):
            text = self.encoder.text(closing[:length])
            if "\n" in text or "</think" in text:
                return closing[:length]
        return closing

    def _off(self, label: Label) -> Segment:
        return Segment.concatenated([(self.off_verdict.prefix, 0.0), *self._verdict(self.off_verdict, label)])

    def _on(self, reason: str, label: Label) -> Segment:
        reason_ids = self.encoder.plain(reason)
        return Segment.concatenated(
            [(self.opening_ids, 1.0), (reason_ids, 1.0), (self.on_verdict.prefix, 1.0), *self._verdict(self.on_verdict, label)]
        )

    def _verdict(self, verdict: VerdictIds, label: Label) -> list[tuple[list[int], float]]:
        first, *rest = verdict.labels[label]
        return [([first], self.verdict_weight), (rest + self.end_ids, 1.0)]


class ChatTemplate:
    """The token segments of instruct rows: the whole conversation is one segment, assistant turns are supervised.

    is_plain: turns stand under headings, as of a base model, without the tokenizer's chat template and without system turns.
    """

    def __init__(self, tokenizer: Any, *, is_plain: bool = False) -> None:
        self.tokenizer = tokenizer
        self.encoder = PlainEncoder(tokenizer)
        self.is_plain = is_plain
        self.end_id = end_of_turn_id(tokenizer, is_plain=is_plain)

    def row(self, example: ChatExample) -> Segment:
        """The conversation as one segment. Raises DataError when nothing or everything in it is supervised."""
        scaffold = _plain_scaffold if self.is_plain else chat_scaffold
        turns = [turn for turn in example.turns if not (self.is_plain and turn.role == "system")]
        pieces = scaffold(self.tokenizer, [turn.role for turn in turns], open_assistant=False)
        parts: list[tuple[list[int], float]] = [(self.encoder.scaffold(pieces[0]), 0.0)]
        for turn, piece in zip(turns, pieces[1:], strict=True):
            weight = 1.0 if turn.role == "assistant" else 0.0
            after_ids = self.encoder.scaffold(piece)
            parts.append((self.encoder.plain(turn.content), weight))
            # The model must learn to end its turn: the first scaffold token after an answer is supervised too.
            ends_turn = weight > 0 and after_ids[:1] == [self.end_id]
            parts += [(after_ids[:1], 1.0), (after_ids[1:], 0.0)] if ends_turn else [(after_ids, 0.0)]
        segment = Segment.concatenated(parts)
        supervised = sum(weight > 0 for weight in segment.weights)
        if not 0 < supervised < len(segment.weights):
            found = f"{supervised} of {len(segment.weights)} tokens"
            raise DataError("nothing or everything is supervised", where=example.where, found=found)
        return segment


class PlainText:
    """Encodes text without the meaning of special tokens.

    spec: a tokenizer of the package tokenizers, as JSON. forbidden_ids: tokens that it must never give.
    """

    def __init__(self, spec: str, forbidden_ids: Collection[int]) -> None:
        self.spec = spec
        self.forbidden_ids = frozenset(forbidden_ids)
        self._plain = Tokenizer.from_str(spec)

    def plain(self, text: str) -> list[int]:
        """Token ids of untrusted `text`; never one that has a meaning of its own. Raises ModelError if one slips through."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        slipped = self.forbidden_ids.intersection(ids)
        if slipped:
            raise ModelError("the tokenizer gives special tokens for plain text", found=f"token ids {sorted(slipped)}")
        return ids

    def starts(self, text: str) -> list[int]:
        """The first character of each token of `plain(text)`, ascending; tokens of one character share its place."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return list(accumulate((start for start, _ in encoding.offsets), max))


class PlainEncoder(PlainText):
    """Encodes text without the meaning of special tokens, and trusted scaffold text with it."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError("the tokenizer has no fast version", expected="a tokenizer.json", found=type(tokenizer).__name__)
        self.tokenizer = tokenizer
        spec = json.loads(backend.to_str())
        # Runs of white space may be added tokens too (Gemma); they carry no power and keep ordinary text as trained.
        spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].strip()]
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        added = tokenizer.get_added_vocab()
        self.powerful_words = frozenset(text for text in added if text.strip())
        self.powerful_ids = frozenset(added[text] for text in self.powerful_words)
        # The unknown token is what a tokenizer without byte fallback gives for an unseen character.
        super().__init__(json.dumps(spec), self.powerful_ids - {tokenizer.unk_token_id})

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def scaffold(self, text: str) -> list[int]:
        """Token ids of trusted template text, special tokens included."""
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def verdict_ids(encoder: PlainEncoder, before: str) -> VerdictIds:
    """The verdict tokens in their context: what the two labels share is forced, what differs is scored.

    Raises ModelError when the tokenizer writes both labels alike.
    """
    full = {label: encoder.scaffold(f"{before}{VERDICT} {label}") for label in Label}
    malicious, benign = full[Label.MALICIOUS], full[Label.BENIGN]
    shared = next((i for i, (a, b) in enumerate(zip(malicious, benign, strict=False)) if a != b), None)
    if shared is None:
        raise ModelError(
            "the tokenizer cannot tell the two labels apart",
            expected="labels that differ in a token",
            found=f"{malicious} and {benign}",
        )
    return VerdictIds(prefix=malicious[:shared], labels={label: ids[shared:] for label, ids in full.items()})


def think_spelling(tokenizer: Any) -> ThinkSpelling:
    """The template's own think block where it has think tokens (Qwen3), ours otherwise."""
    added = tokenizer.get_added_vocab()
    native = "<think>" in added and "</think>" in added and "<think>" in (tokenizer.chat_template or "")
    return NATIVE_THINK if native else OWN_THINK


def chat_scaffold(tokenizer: Any, roles: Sequence[str], *, open_assistant: bool) -> list[str]:
    """The template's text around the contents of turns with these roles: before the first, between each two, after the last.

    The template renders placeholders, and the text is cut at them, so no content ever passes through the template.
    Raises ModelError when the template drops or repeats a turn.
    """
    if tokenizer.chat_template is None:
        return _plain_scaffold(tokenizer, roles, open_assistant=open_assistant)
    slots = [f"GUARDTRAINSLOT{number}END" for number in range(len(roles))]
    messages = [{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=open_assistant, enable_thinking=True, date_string=FIXED_DATE
    )
    pieces = []
    for slot in slots:
        before, found, text = text.partition(slot)
        if not found or slot in text:
            raise ModelError("the chat template drops, reorders or repeats a turn", found=f"roles {list(roles)}")
        pieces.append(before)
    return [*pieces, text]


def end_of_turn_id(tokenizer: Any, *, is_plain: bool = False) -> int:
    """The special token that ends an assistant turn: the template's own, else, or where it is not used, the end of sequence."""
    if tokenizer.chat_template is not None and not is_plain:
        after = chat_scaffold(tokenizer, ["user", "assistant"], open_assistant=False)[-1]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        if ids and ids[0] in tokenizer.get_added_vocab().values():
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no token that ends a turn", expected="an eos_token", found="none")
    return int(tokenizer.eos_token_id)


def guard_scaffold(tokenizer: Any) -> tuple[str, str, str]:
    """Text before the policy, between policy and prompt, and after the prompt up to the assistant's first token."""
    try:
        before, between, after = chat_scaffold(tokenizer, ["system", "user"], open_assistant=True)
    except Exception as error:  # templates refuse a system role by raising jinja2's TemplateError or by dropping it
        if not (isinstance(error, ModelError) or type(error).__name__ == "TemplateError"):
            raise
        before, after = chat_scaffold(tokenizer, ["user"], open_assistant=True)
        between = "\n\n"
    # Reasoning-only templates open the think block themselves; mode off must be able to close it empty.
    return before, between, re.sub(r"<think>\s*$", "", after)


def _plain_scaffold(tokenizer: Any, roles: Sequence[str], *, open_assistant: bool) -> list[str]:
    """For base models: turns under headings, each ended by the end-of-sequence token, which no prompt can write."""
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a chat template nor an eos_token", expected="one of them", found="none")
    pieces = [f"{tokenizer.bos_token or ''}### {roles[0]}\n"]
    pieces += [f"{tokenizer.eos_token}\n### {role}\n" for role in roles[1:]]
    return [*pieces, f"{tokenizer.eos_token}\n" + ("### assistant\n" if open_assistant else "")]
