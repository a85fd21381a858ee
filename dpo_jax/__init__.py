"""Direct Preference Optimization in JAX, from pairs to win rates."""
