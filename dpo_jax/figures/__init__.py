"""Figures in one house style, from plain rows to PNG and PDF files.

What stands here is what other modules use; the rest by submodule: `house` the
style and the files, `rates` win rates, `runs` training, `layout` where tokens
and arrays lie. The style itself is house.mplstyle:
plt.style.use("dpo_jax.figures.house").
"""

from dpo_jax.figures import house, layout, rates, runs

fingerprint = house.fingerprint
points = rates.points
length_points = rates.length_points
vector = house.vector
win_rate_by_temperature = rates.win_rate_by_temperature
win_rate_by_step = rates.win_rate_by_step
win_rate_by_length = rates.win_rate_by_length
training_curves = runs.training_curves
reward_margins = runs.reward_margins
reward_accuracy = runs.reward_accuracy
has_rewards = runs.has_rewards
shown = runs.shown
packing_mask = layout.packing_mask
sharding = layout.sharding
