"""The model card: every line from the facts, with the header that the Hugging Face Hub reads. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from guardtrain.evaluate.reporting.document import Block, Bullets, Cell, Document, Facts, Paragraph, Quote, Section, Table, Warned
from guardtrain.evaluate.reporting.markdown import render_markdown
from guardtrain.evaluate.reporting.set_sections import MEASURES, measure_cell
from guardtrain.evaluate.reporting.text import DASH, decimal, decimal_interval, percent, percent_interval, seconds
from guardtrain.evaluate.scores import too_few_benign
from guardtrain.publish.facts import Evidence, ModelFacts, SetFigures
from guardtrain.publish.origin import obligations

CARD_FILE = "README.md"
TAGS = ("guardtrain", "guardrail", "prompt-injection", "safety")
RELATIONS = {"merged": "finetune", "adapter": "adapter", "gguf": "quantized"}
LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
TEXT = "A reasoning guard: it reads what a user or a tool sends to an AI agent, writes one sentence, and gives a verdict."


def card_of(facts: ModelFacts) -> str:
    """README.md of a guard."""
    calibration = facts.settings.calibration
    status = calibration.said() if calibration else "uncalibrated: its scores have no thresholds and no probabilities"
    sections = (
        Section("What it is", tuple(_what(facts))),
        Section("Intended use", tuple(_use())),
        Section("Figures", tuple(_figures(facts.evidence))),
        Section("Calibration", tuple(_calibration(facts))),
        Section("Contamination", (Paragraph(_contamination(facts.evidence)),)),
        Section("Limits", (Bullets(tuple(Paragraph(text) for text in _limits(facts))),)),
        Section("Training", tuple(_training(facts))),
        Section("Policy", (Paragraph("What counts as malicious is what this text says:"), Quote(facts.settings.policy))),
        Section("Licence", (Paragraph(" ".join([_licence(facts), *obligations(facts.licence, facts.repository)])),)),
    )
    document = Document(status, facts.repository.partition("/")[2], sections)
    return "\n".join([_header(facts), render_markdown(document), _links(facts)])


def _header(facts: ModelFacts) -> str:
    header: dict[str, Any] = {
        "license": facts.licence,
        "base_model": [facts.base],
        "base_model_relation": RELATIONS[facts.kind],
        "library_name": LIBRARIES[facts.kind],
        "pipeline_tag": "text-generation",
        "tags": [*TAGS],
    }
    if facts.data_sets:
        header["datasets"] = list(facts.data_sets)
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"


def _what(facts: ModelFacts) -> Iterator[Block]:
    yield Paragraph(f"{TEXT} Tuned from {facts.base} (method {facts.settings.method}) with guardtrain.")
    modes = ", ".join(facts.settings.modes)
    yield Facts(
        (
            ("Modes", f"{modes}; off gives the verdict at once, on writes a reason first"),
            ("Longest prompt in training", f"{facts.settings.max_prompt_tokens:,} tokens"),
            ("Longest reason", f"{facts.settings.max_reason_tokens} tokens, behind which the verdict is forced"),
            ("Score", "logit of malicious minus that of benign at the verdict, never a number that the model writes"),
        )
    )


def _use() -> Iterator[Block]:
    yield Bullets(
        (
            Paragraph("a filter in front of an AI agent, for what users write and for what tools return", lead="For:"),
            Paragraph("the only protection of an agent, judging people, or moderating by another policy", lead="Not for:"),
            Paragraph("guardtrain serve reads guard.json: policy, thresholds and the forced verdict are part of it", lead="How:"),
        )
    )


def _figures(evidence: Evidence | None) -> Iterator[Block]:
    if evidence is None:
        yield Warned(("nothing was measured that this card knows of",))
        return
    if evidence.is_held_out:
        said = "From the run's summary: rows held out of the training sources. Thresholds were set on these rows, so that rates"
        yield Warned((f"{said} at the threshold are no evidence, and rows of the same sources flatter every model.",))
        yield Paragraph("Rates at the threshold carry Wilson's 95 % intervals; other intervals were not drawn.")
    else:
        yield Paragraph("From an evaluation report, with 95 % intervals (bootstrap of the rows).")
    for note in evidence.notes:
        yield Paragraph(note)
    for each in evidence.sets:
        yield from _set_blocks(each)


def _set_blocks(each: SetFigures) -> Iterator[Block]:
    first = next(iter(each.modes.values()))
    few = too_few_benign(first.benign, 0.01) if first.malicious else None
    warnings = tuple(dict.fromkeys([*each.warnings, *([few] if few else [])]))
    if warnings:
        yield Warned(warnings)
    rows: list[tuple[Cell, ...]] = [
        (title, *(measure_cell(measures, key) for measures in each.modes.values())) for key, title in MEASURES.items()
    ]
    rows.append(("threshold", *(decimal(measures.threshold) for measures in each.modes.values())))
    rows.append(("rows without a verdict", *(f"{measures.parse_failures:,}" for measures in each.modes.values())))
    yield Table(f"{each.name}: {first.malicious:,} malicious and {first.benign:,} benign rows", ("", *each.modes), tuple(rows))


def _calibration(facts: ModelFacts) -> Iterator[Block]:
    calibration = facts.settings.calibration
    if calibration is None:
        yield Warned(("not calibrated: guardtrain calibrate fits thresholds and probabilities on rows of your own",))
        return
    rows = []
    for mode, each in calibration.modes.items():
        interval = decimal_interval(*each.threshold_interval) if each.threshold_interval else ""
        rate = f"{percent(each.fpr)} {percent_interval(*each.fpr_interval)}" if each.fpr_interval else DASH
        rows.append((mode, f"{decimal(each.threshold)} {interval}".strip(), rate, decimal(each.temperature), decimal(each.bias)))
    header = ("mode", "threshold", "false alarms there", "temperature", "bias")
    yield Table("p_malicious = sigmoid(score / temperature + bias); flagged from the threshold on", header, tuple(rows))
    if facts.settings.cascade:
        low, high = (decimal(end) for end in facts.settings.cascade)
        yield Paragraph(f"Cascade: a score of mode off from {low} to {high} asks for a reason, any other decides by itself.")
    if calibration.warnings:
        yield Warned(calibration.warnings)


def _contamination(evidence: Evidence | None) -> str:
    counts = [(each.name, each.contaminated) for each in evidence.sets if each.contaminated is not None] if evidence else []
    if not counts:
        return "No evaluation set was compared with the training rows for this card."
    found = "; ".join(f"{name}: {count:,} rows left out" for name, count in counts)
    return f"Rows of each set that stand in the training data, in part or nearly, are in no figure above. {found}."


def _limits(facts: ModelFacts) -> Iterator[str]:
    yield "A threshold holds for texts like those that it was set on; calibrate on your own traffic before you block by it."
    yield "Long optimised attacks, other languages than those of the training data and odd spellings may pass."
    yield "The reason explains the verdict and is no evidence for it: it may be fluent and wrong."
    yield "A server that decodes freely may cut a reason off before the verdict: treat an answer without one as a block."
    evaded = facts.evidence.evaded if facts.evidence else {}
    if evaded:
        counts = ", ".join(f"{count:,} of {of:,} read {how}" for how, (count, of) in evaded.items())
        yield f"Of requests that it flags when they are plain, dressed up as an attack these got through: {counts}."
    if facts.settings.collapsed:
        yield f"The watch for collapse said in training: {facts.settings.collapsed}"


def _training(facts: ModelFacts) -> Iterator[Block]:
    pairs = [("Data", ", ".join([*facts.data_sets, *facts.sources]) or DASH)]
    summary = facts.summary
    known = {"training_rows": "Training rows", "held_out_rows": "Held-out rows", "steps": "Steps", "compute_dtype": "Format"}
    for key, title in known.items():
        if key in summary:
            value = summary[key]
            pairs.append((title, f"{value:,}" if isinstance(value, int) else str(value)))
    if facts.recipe:
        train, model = facts.recipe.train, facts.recipe.model
        pairs.append(("Rate, epochs", f"{train.learning_rate:g}, {train.epochs:g}"))
        pairs += [("LoRA rank, alpha", f"{model.lora_rank}, {model.lora_alpha}")] * (model.method in ("lora", "qlora"))
    if "train_seconds" in summary:
        pairs.append(("Time", seconds(summary["train_seconds"])))
    yield Facts(tuple(pairs))


def _licence(facts: ModelFacts) -> str:
    return f"That of the base model {facts.base}: {facts.licence}. The training data have licences of their own."


def _links(facts: ModelFacts) -> str:
    """Ids are checked to be plain, so they may be links."""
    links = [f"- base model: [{facts.base}](https://huggingface.co/{facts.base})"]
    links += [f"- data card: [{each}](https://huggingface.co/datasets/{each})" for each in facts.data_sets]
    return "\n".join(["## Links", "", *links, ""])
