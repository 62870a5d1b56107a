"""How much worse than its checkpoint is an engine? The judge of quantization.

`inlay eval` in Python: `evaluate(engine, text=...)` gives an `Evaluation`.
"""

from inlay.eval.evaluation import Evaluation, Setting
from inlay.eval.judge import evaluate, evaluate_all
from inlay.eval.options import EvalOptions
from inlay.eval.statistics import Interval

__all__ = ["EvalOptions", "Evaluation", "Interval", "Setting", "evaluate", "evaluate_all"]
