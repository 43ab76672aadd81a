"""A report on disk: for people as HTML and Markdown, for machines as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guardtrain.evaluate.reporting.data import Report, SetReport
from guardtrain.evaluate.reporting.findings import Share, over_refusal, set_warnings, shares_by_source, status, worst_mistakes
from guardtrain.evaluate.reporting.html import render_html
from guardtrain.evaluate.reporting.markdown import render_card, render_markdown
from guardtrain.evaluate.reporting.sections import document

DIGITS = 6


def write_report(report: Report, folder: Path, *, show_prompts: bool = True) -> None:
    """Write report.html, report.md and report.json into `folder`, which is made.

    show_prompts: whether the worst errors are shown with their texts and reasons; report.json never holds any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = document(report, show_prompts=show_prompts, has_pictures=True)
    text = json.dumps(report_json(report), indent=1, allow_nan=False) + "\n"
    for name, content in (("report.html", render_html(shown)), ("report.md", render_markdown(shown)), ("report.json", text)):
        (folder / name).write_text(content, encoding="utf-8")


def model_card_section(report: Report) -> str:
    """Markdown for a model card: the summary, the figures of every set, the costs; no prompt."""
    return render_card(document(report, show_prompts=False, has_pictures=False))


def report_json(report: Report) -> dict[str, Any]:
    """Every figure with its interval as plain data; no prompt, no reason."""
    return {
        "status": status(report),
        "model": report.model,
        "base_model": report.base_model,
        "method": report.method,
        "policy": report.policy,
        "mode": report.mode,
        "threshold": report.threshold,
        "calibration": report.calibration.to_json() if report.calibration else None,
        "axes": {axis: pooled.to_json() for axis, pooled in report.pooled.items()},
        "sets": [_set_json(each, report) for each in report.sets],
        "reasoning": [each.to_json() for each in report.reasoning],
        "against_controls": [each.to_json() for each in report.against_controls],
        "over_refusal": [
            {"set": each.name, "source": source, "false_alarms": {name: _share_json(found) for name, found in shares.items()}}
            for each, source, shares in over_refusal(report)
        ],
        "worst_errors": [
            {
                "set": mistake.set_name,
                "id": mistake.example.id,
                "where": mistake.example.where,
                "label": mistake.example.label,
                "score": round(mistake.score, DIGITS),
                "margin": round(mistake.margin, DIGITS),
            }
            for mistake in worst_mistakes(report)
        ],
        "speed": {
            mode: {"rows_per_second": speed.rows_per_second, "p50_seconds": speed.p50_seconds, "p95_seconds": speed.p95_seconds}
            for mode, speed in report.speed.items()
        },
        "escalation_rate": report.escalation_rate,
        "flip_rate": report.flip_rate,
        "attacks": list(report.attacks) if report.attacks else None,
        "environment": dict(report.environment),
        "command": report.command,
        "seconds": report.seconds,
        "training_rows": report.training_rows,
        "notes": list(report.notes),
    }


def _set_json(each: SetReport, report: Report) -> dict[str, Any]:
    return {
        "name": each.name,
        "axis": each.axis,
        "licence": each.licence,
        "note": each.note,
        "is_calibration_set": each.is_calibration_set,
        "modes": {name: measures.to_json() for name, measures in each.measures.items() if name in each.judged},
        "controls": {name: measures.to_json() for name, measures in each.measures.items() if name in each.controls},
        "by_source": {
            source: {label.value: _share_json(found) for label, found in of_class.items()}
            for source, of_class in shares_by_source(each, report.mode).items()
        },
        "warnings": list(set_warnings(each)),
        "contaminated": [
            {"id": row.id, "kind": row.kind, "similarity": round(row.similarity, DIGITS)} for row in each.contaminated
        ],
    }


def _share_json(found: Share) -> dict[str, Any]:
    return {
        "count": found.count,
        "rows": found.rows,
        "value": round(found.value, DIGITS),
        "interval": [round(end, DIGITS) for end in found.interval],
    }
