"""guardtrain: fine-tune language models into reasoning guards, on one machine or many.

Importing the package loads no torch: `guardtrain --help` must answer at once.
"""

__version__ = "0.1.0"
