"""Does an engine compute what Hugging Face computes, and where does it first go wrong?

`inlay verify` in Python: `verify_model(source, options)` gives a `Report`.
"""

from inlay.verify.report import Report, verify_model
from inlay.verify.tokens import GAP_FACTOR, MAX_EXCUSED, TokenComparison, compare_greedy

__all__ = [
    "GAP_FACTOR",
    "MAX_EXCUSED",
    "Report",
    "TokenComparison",
    "compare_greedy",
    "verify_model",
]
