"""The words of a report, in one line each."""

GLOSSARY = {
    "Malicious, benign": "The two labels. Which texts count as malicious is what the policy says.",
    "Mode off, on, both, cascade": "Verdict at once; after a reason; the mean of the two; off where clear, else both.",
    "Score": "Logit of the verdict “malicious” minus that of “benign”; never a number that the model writes.",
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
    "No interval of ECE": "Fewer different rows, as resamples have, always look less calibrated: it would lie above the figure.",
    "95 % interval": "Where 95 % of draws of other such rows would lie: bootstrap; for sources and attacks Wilson's.",
    "p": "How often a difference this large comes about when there is none. Not corrected for the number of sets.",
    "Control": "A simpler judge on the same rows: what a guard must beat to be worth its cost.",
    "Rows without a verdict": "Rows on which a free-running guard would give none; they count as errors at the threshold.",
    "Contaminated": "A row that stands in the training data, in part or nearly: remembered, not judged, so left out.",
}
