"""Responses with a label, desirable or not, for KTO.

A row has a prompt, a completion and a label; a pair is two of them. KTO's
reference point is the divergence of policy and reference on responses to other
prompts, so an item is a `Comparison` of a labeled response, as `chosen`, and
of the next row's to another prompt, as `rejected`.

References:
  Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization,
  2024 (arXiv 2402.01306), Section 4.1.
"""

import dataclasses
from collections.abc import Sequence

from dpo_jax.data import preferences


def items(
  rows: Sequence[preferences.Comparison],
) -> tuple[tuple[preferences.Comparison, ...], dict[str, bool]]:
  """Comparisons with responses to other prompts, and their labels by id.

  Raises:
    ValueError: a row has no other response to another prompt.
  """
  labeled = [one for row in rows for one in _labeled(row)]
  found, labels = [], {}
  for i, row in enumerate(labeled):
    following = (
      labeled[(i + k) % len(labeled)] for k in range(1, len(labeled))
    )
    other = next(
      (
        x
        for x in following
        if x.prompt != row.prompt and x.chosen != row.chosen
      ),
      None,
    )
    if other is None:
      raise ValueError(
        "loss.kind='kto' needs other responses to other prompts, but all rows"
        f" have the prompt {row.prompt!r:.80} or the same response"
      )
    name = preferences.content_id(row.id, str(row.label))
    labels[name] = row.label
    found.append(
      dataclasses.replace(row, id=name, rejected=other.chosen, label=None)
    )
  return tuple(found), labels


def _labeled(row: preferences.Comparison) -> list[preferences.Comparison]:
  """The row itself, or both responses of a pair, chosen first."""
  if row.label is not None:
    return [row]
  return [
    dataclasses.replace(row, chosen=text, rejected="", label=label)
    for text, label in ((row.chosen, True), (row.rejected, False))
  ]
