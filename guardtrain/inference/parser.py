"""Read the answer of a guard that ran freely. Strict: what is not one clear verdict is none, and none never means benign."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from guardtrain.types import Label

_SPACE = r"[ \t\r\n]*"
_ANSWER = re.compile(
    rf"{_SPACE}<think>(?P<reason>.*)</think>{_SPACE}\nVerdict: (?P<verdict>{'|'.join(Label)}){_SPACE}", re.DOTALL
)
_CLAIM = re.compile(r"verdict\s*:")


@dataclass(frozen=True, slots=True)
class Answer:
    """reason: what stands in the think block, empty in mode `off`; verdict: None where the text holds no clear one."""

    reason: str | None
    verdict: Label | None


NO_ANSWER = Answer(reason=None, verdict=None)


def parse_answer(text: str) -> Answer:
    """The reason and the verdict of what an assistant wrote, special tokens of the turn left out.

    One think block, closed, and behind it one line with one of the labels, spelt as in training, and nothing else. A second
    verdict anywhere, in the reason too and in any case or width of letters, is a forgery: no verdict. So is a second think tag.
    """
    match = _ANSWER.fullmatch(text)
    folded = unicodedata.normalize("NFKC", text).casefold()
    is_single = len(_CLAIM.findall(folded)) == folded.count("<think>") == folded.count("</think>") == 1
    if match is None or not is_single:
        return NO_ANSWER
    return Answer(reason=match["reason"].strip(), verdict=Label(match["verdict"]))
