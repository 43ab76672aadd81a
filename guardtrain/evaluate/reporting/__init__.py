"""The report of an evaluation: what was found, for someone who did not train the guard. Shape suffix: N rows."""

from guardtrain.evaluate.reporting.write import model_card_section, write_report

__all__ = ["model_card_section", "write_report"]
