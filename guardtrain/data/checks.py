"""What a set of rows must satisfy before a model may see it. Pure functions on examples; each returns its problems.

Rows of a group (duplicates, conflicts) get one problem each, so that setting the named rows aside mends the set.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from guardtrain.data.keys import example_text, label_of, normalised, pair_of
from guardtrain.data.problems import AnyExample, Cause, Problem
from guardtrain.data.sentences import count_sentences, names_verdict
from guardtrain.data.similar import Groups, shingle_ids, similar_pairs
from guardtrain.types import Example, GuardExample, Label

ALL_ROWS = "all rows"
MAX_IMBALANCE = 4.0  # rows of the larger class to one of the smaller
MAX_LENGTH_RATIO = 2.0  # between the medians of the two classes


def check_examples(
    examples: Sequence[Example],
    *,
    max_prompt_tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    near_duplicates: bool = True,
) -> list[Problem]:
    """Every problem of a set of rows, in the order of the checks below. Pure.

    count_tokens: tokens of a text; without it, or without the limit, the budget is not checked.
    near_duplicates: the one check that takes seconds (see `similar`).
    """
    guard = [example for example in examples if isinstance(example, GuardExample)]
    problems = [*conflicting_labels(guard), *exact_duplicates(examples)]
    if near_duplicates:
        problems += find_near_duplicates(examples)
    if max_prompt_tokens is not None and count_tokens is not None:
        problems += over_budget(examples, max_prompt_tokens, count_tokens)
    problems += [*repeated_ids(examples), *reason_style(guard)]
    if guard:
        problems += [*class_balance(guard), *length_gap(guard), *reason_length_gap(guard)]
    return problems


def conflicting_labels(examples: Sequence[GuardExample]) -> list[Problem]:
    """Rows whose prompt stands elsewhere with the other label. Neither is trusted."""
    problems = []
    for group in _same_text(examples):
        if len({example.label for example in group}) < 2:
            continue
        for example in group:
            other = next(row for row in group if row.label != example.label)
            what = f"labelled {example.label}, but the same prompt at {other.where} is {other.label}"
            problems.append(_of(example, Cause.CONFLICTING_LABELS, what))
    return problems


def exact_duplicates(examples: Sequence[Example]) -> list[Problem]:
    """Rows that repeat an earlier row with the same label. They would leak from training into validation."""
    problems = []
    for group in _same_text(examples):
        if len({label_of(example) for example in group}) == 1:
            what = f"the same text as {group[0].where}"
            problems += [_of(example, Cause.EXACT_DUPLICATE, what) for example in group[1:]]
    return problems


def find_near_duplicates(examples: Sequence[Example]) -> list[Problem]:
    """Rows close to an earlier row (word 5-gram Jaccard >= 0.8, also through a third row), exact duplicates aside.

    The twins of a minimal pair are close by design and are no problem.
    """
    firsts = [group[0] for group in _same_text(examples)]
    groups = Groups(len(firsts))

    def is_twin_or_known(a: int, b: int) -> bool:
        return groups.same(a, b) or bool(pair_of(firsts[a]) and pair_of(firsts[a]) == pair_of(firsts[b]))

    for a, b in similar_pairs(shingle_ids([example_text(example) for example in firsts]), skip=is_twin_or_known):
        groups.join(a, b)
    problems = []
    for members in groups.members():
        rows = [firsts[index] for index in members]
        both = " with both labels" if len({label_of(row) for row in rows}) > 1 else ""
        what = f"close to {rows[0].where} ({len(rows)} rows{both})"
        problems += [_of(row, Cause.NEAR_DUPLICATE, what) for row in rows[1:]]
    return problems


def overlap(training: Sequence[Example], validation: Sequence[Example]) -> list[Problem]:
    """Validation rows that stand in the training rows, exactly or nearly: their scores would flatter."""
    known = {normalised(example_text(example)): example.where for example in training}
    problems, fresh = [], []
    for example in validation:
        where = known.get(normalised(example_text(example)))
        if where is None:
            fresh.append(example)
        else:
            problems.append(_of(example, Cause.LEAK, f"the same text as training row {where}"))
    rows = [*training, *fresh]
    matched: set[int] = set()

    def is_one_side_or_known(a: int, b: int) -> bool:
        return (a < len(training)) == (b < len(training)) or max(a, b) in matched

    for a, b in similar_pairs(shingle_ids([example_text(row) for row in rows]), skip=is_one_side_or_known):
        matched.add(max(a, b))
        problems.append(_of(rows[max(a, b)], Cause.NEAR_LEAK, f"close to training row {rows[min(a, b)].where}"))
    return problems


def over_budget(examples: Sequence[Example], max_tokens: int, count_tokens: Callable[[str], int]) -> list[Problem]:
    """Rows whose prompt (of chat rows: whole conversation) has more than `max_tokens` tokens. Nothing is truncated."""
    problems = []
    for example in examples:
        text = example_text(example)
        count = count_tokens(text)
        if count > max_tokens:
            what = f"{count:,} tokens ({len(text):,} characters), the limit is {max_tokens:,} (data.max_prompt_tokens)"
            problems.append(_of(example, Cause.OVER_BUDGET, what))
    return problems


def repeated_ids(examples: Sequence[Example]) -> list[Problem]:
    """Rows whose id an earlier row has: reasons and exclusions, which go by id, reach both."""
    first: dict[str, str] = {}
    return [
        _of(example, Cause.SAME_ID, f"the id of {first[example.id]}")
        for example in examples
        if example.id and first.setdefault(example.id, example.where) != example.where
    ]


def reason_style(examples: Sequence[GuardExample]) -> list[Problem]:
    """Reasons that are not one sentence, or that name the verdict before the model gives it."""
    problems = []
    for example in examples:
        if example.reason is None:
            continue
        sentences = count_sentences(example.reason)
        if sentences > 1:
            problems.append(_of(example, Cause.SEVERAL_SENTENCES, f"expected a reason of one sentence, found {sentences}"))
        if names_verdict(example.reason):
            problems.append(
                _of(example, Cause.NAMES_VERDICT, "the reason has the word malicious or benign: describe, do not judge")
            )
    return problems


def class_balance(examples: Sequence[GuardExample]) -> list[Problem]:
    """One class only is an error, more than 4 to 1 a warning."""
    counts = Counter(example.label for example in examples)
    if len(counts) == 1:
        return [_of_all(Cause.ONE_CLASS, f"all {len(examples):,} rows are {examples[0].label}: a guard needs both classes")]
    (large, most), (small, least) = counts.most_common()
    if most > MAX_IMBALANCE * least:
        return [_of_all(Cause.IMBALANCE, f"{most:,} {large} rows to {least:,} {small} ones, more than {MAX_IMBALANCE:g} to 1")]
    return []


def length_gap(examples: Sequence[GuardExample]) -> list[Problem]:
    """A warning when the median prompt of one class is over twice as long: length is then a shortcut to the label."""
    return _gap([(row.label, len(example_text(row))) for row in examples], Cause.LENGTH_GAP, "prompt")


def reason_length_gap(examples: Sequence[GuardExample]) -> list[Problem]:
    """The same for reasons, in characters."""
    lengths = [(row.label, len(row.reason)) for row in examples if row.reason is not None]
    return _gap(lengths, Cause.REASON_LENGTH_GAP, "reason")


def _gap(lengths: Sequence[tuple[Label, int]], cause: Cause, name: str) -> list[Problem]:
    by_label = {label: [length for row_label, length in lengths if row_label == label] for label in Label}
    if not all(by_label.values()):
        return []
    medians = {label: statistics.median(found) for label, found in by_label.items()}
    if max(medians.values()) <= MAX_LENGTH_RATIO * min(medians.values()):
        return []
    found = ", ".join(f"{label} {median:,.0f}" for label, median in medians.items())
    return [_of_all(cause, f"median characters of a {name}: {found}; more than {MAX_LENGTH_RATIO:g} to 1 gives the label away")]


def _same_text(examples: Sequence[AnyExample]) -> list[list[AnyExample]]:
    groups: dict[str, list[AnyExample]] = {}
    for example in examples:
        groups.setdefault(normalised(example_text(example)), []).append(example)
    return list(groups.values())


def _of(example: Example, cause: Cause, what: str) -> Problem:
    return Problem(where=example.where, cause=cause, what=what, row_id=example.id, row=example)


def _of_all(cause: Cause, what: str) -> Problem:
    return Problem(where=ALL_ROWS, cause=cause, what=what)
