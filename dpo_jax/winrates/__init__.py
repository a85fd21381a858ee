"""Win rates against the dataset's chosen answers, from judge calls.

What stands here is what other modules use; the rest by submodule: `calls`
which calls count, `intervals`, `rates` a table's rows and rates at equal
length, `controls` the judge's own record, and `paired` differences.
"""

from dpo_jax.winrates import calls, controls, intervals, rates

MODELS = calls.MODELS
current = calls.current
first_slot_rate = rates.first_slot_rate
judge_health = controls.judge_health
wilson_interval = intervals.wilson
win_rates = rates.win_rates
Settings = intervals.Settings
JudgeHealth = controls.JudgeHealth
WinRate = rates.WinRate
