"""Where XLA for CPUs must not join what comes before with what comes after.

It joins a chain of operations into one, which then runs on fewer cores, or
computes what is read several times anew for each reader. An optimisation
barrier does not prevent it, as XLA takes barriers away before it joins. A
condition that it cannot decide does.
"""

from typing import Any

import jax
import jax.numpy as jnp


def fence(tree: Any, holds: jax.Array) -> Any:
  """The same arrays, which exist before anything reads them.

  Args:
    tree: arrays.
    holds: a condition, bool [], which is always true, but not to XLA.
  """
  return jax.lax.cond(
    holds,
    lambda tree: tree,
    lambda tree: jax.tree.map(jnp.zeros_like, tree),
    tree,
  )


def fenced(x: jax.Array) -> jax.Array:
  """`fence` for whoever has no such condition at hand; of NaN too."""
  first = x.ravel()[0]
  # LLVM knows that this holds, but comes after what joins.
  return fence(x, (first == first) | (first != first))
