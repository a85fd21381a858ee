"""Direct Preference Optimization in JAX, from pairs to win rates."""

# The public home, in this one place; links in notebooks are tested against it.
REPOSITORY = "https://github.com/dpo-jax/dpo_jax"
