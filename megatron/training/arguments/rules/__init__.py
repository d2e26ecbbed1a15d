"""Rules about several flags at once.  Each returns a list of problems, and never raises.

What one flag needs, excludes or may be stands on its row.
"""

from megatron.training.arguments.rules import model, moe, parallel, run, training

RULES = (*model.RULES, *moe.RULES, *parallel.RULES, *training.RULES, *run.RULES)
