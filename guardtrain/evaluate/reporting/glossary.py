"""The words of a report, in one line each."""

GLOSSARY = {
    "Malicious, benign": "The two labels. Which texts count as malicious is what the policy says.",
    "Mode off, on, both, cascade": "Verdict at once; after one sentence of reasoning; the mean of the two; off where that is clear, both elsewhere.",
    "Score": "How much more likely the verdict “malicious” is than “benign”, as a difference of logits; never a number the model writes.",
    "Threshold": "A text is flagged when its score is at least this. Frozen: chosen before, on calibration data.",
    "p_malicious": "The score as a probability; only as good as the calibration that the first line tells of.",
    "Recall": "The share of malicious texts that are flagged.",
    "False alarms, FPR": "The share of benign texts that are flagged (false-positive rate).",
    "Recall at 1 % FPR": "The best recall that some threshold reaches with at most 1 % false alarms on these very rows.",
    "AUROC": "The chance that a malicious text scores above a benign one: 0.5 is guessing, 1 is perfect.",
    "AUPRC": "Precision averaged over recall; its floor is the share of malicious rows.",
    "Precision, F1": "The share of flagged texts that are malicious; the harmonic mean of precision and recall.",
    "MCC": "The correlation of verdict and label: 0 is guessing, 1 is perfect, whatever the share of malicious rows.",
    "ECE, Brier score": "How far probabilities are from frequencies; the mean squared error of probabilities. Lower is better.",
    "95 % interval": "Where the figure would lie in 95 % of draws of other rows of the same kind; bootstrap, for shares by source Wilson's.",
    "p": "How often a difference this large comes about when there is none. Not corrected for the number of sets.",
    "Control": "A simpler judge on the same rows: what a guard must beat to be worth its cost.",
    "Rows without a verdict": "Rows on which a free-running guard would have answered something else; counted as errors at the threshold.",
    "Contaminated": "A row that stands in the training data, in part or nearly; left out, for it would be remembered, not judged.",
}
