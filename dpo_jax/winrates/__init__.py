"""Win rates against the dataset's chosen responses, from judge calls.

`calls`: which calls count. `intervals`: of a proportion or a mean. `rates`: the
table, and rates at equal length. `controls`: the judge's record. `paired`:
differences on the same prompts.
"""

from dpo_jax.winrates import calls, controls, intervals, rates

MODELS = calls.MODELS
current = calls.current
judge_health = controls.judge_health
wilson_interval = intervals.wilson
win_rates = rates.win_rates
Settings = intervals.Settings
JudgeHealth = controls.JudgeHealth
WinRate = rates.WinRate
