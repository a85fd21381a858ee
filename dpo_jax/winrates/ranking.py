"""A Bradley-Terry ranking of all models and temperatures, and chosen.

In the Bradley-Terry model player i beats j with the log-odds of a difference
in strength. Every comparison here is with the dataset's chosen answer, the
zero of the scale, and so the likelihood falls apart into one term for each
player, whose maximum is the log-odds of its own win rate. The ranking then
orders players as their rates do; what it adds is a scale on which differences
add up, and an interval of each rank, from prompts resampled for all players at
once.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from scipy import special

from dpo_jax.winrates import calls, intervals

CHOSEN = "chosen"


@dataclasses.dataclass(frozen=True)
class Player:
  """A player's strength in log-odds against chosen (0), and its rank (1 best).

  `n` prompts were judged. A player has one drawn comparison more than was
  made, so that one that always won has a finite strength. The interval is that
  of the win rate on this scale; that of the rank is the bootstrap's.
  """

  rank: int
  rank_low: int
  rank_high: int
  model: str
  step: int | None
  temperature: float | None
  n: int
  strength: float
  low: float
  high: float


def bradley_terry(
  verdicts: Iterable[calls.Call],
  *,
  seed: int,
  resamples: int = 2000,
  confidence: float = 0.95,
) -> list[Player]:
  """Players from the strongest to the weakest, chosen among them.

  Each prompt counts as one comparison with chosen, won by its score. Cells
  without any verdict are left out.

  References:
    Bradley and Terry, Rank analysis of incomplete block designs, Biometrika
    39, 1952.
  """
  intervals.check(resamples, confidence)
  settings = {"seed": seed, "resamples": resamples, "confidence": confidence}
  groups = calls.by_cell(calls.ordinary(verdicts))
  tables = {
    cell: units for cell, rows in groups.items() if (units := calls.units(rows))
  }
  if not tables:
    return []
  prompts = sorted(set().union(*tables.values()))
  scores = np.full((len(prompts), len(tables)), np.nan)
  for column, units in enumerate(tables.values()):
    scores[:, column] = [units.get(prompt, np.nan) for prompt in prompts]
  own = _ranks(_strengths(scores, np.ones((1, len(prompts)))))[0]
  low, high = _rank_ends(scores, **settings)
  players = []
  for index, (cell, units) in enumerate(tables.items()):
    single = len(groups[cell]) == len(calls.by_prompt(groups[cell]))
    values = np.asarray(list(units.values()))
    n = len(values)
    found = intervals.of_rate(values, single=single, **settings)
    ends = (float(values.mean()), found.low, found.high)
    odds = [float(special.logit((n * end + 0.5) / (n + 1))) for end in ends]
    ranks = (int(own[index]), int(low[index]), int(high[index]))
    players.append(Player(*ranks, *cell, n, *odds))
  ranks = (int(own[-1]), int(low[-1]), int(high[-1]))
  zero = (len(prompts), 0.0, 0.0, 0.0)
  players.append(Player(*ranks, CHOSEN, None, None, *zero))
  return sorted(players, key=lambda player: player.rank)


def _rank_ends(
  scores: np.ndarray, *, seed: int, resamples: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
  """Ends of every player's rank over resampled prompts, [P] each."""
  prompts = len(scores)
  generator = np.random.default_rng(seed)
  even = np.full(prompts, 1 / prompts)
  counts = generator.multinomial(prompts, even, size=resamples).astype(float)
  ranks = _ranks(_strengths(scores, counts))
  tail = (1 - confidence) / 2
  # A rank is whole: an end between two of them is drawn outwards.
  return (
    np.quantile(ranks, tail, axis=0, method="lower"),
    np.quantile(ranks, 1 - tail, axis=0, method="higher"),
  )


def _strengths(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Strengths [R, P] of resampled prompts, chosen being the last player.

  `scores` [n, P - 1] has NaN where a prompt was not judged; `counts` [R, n]
  says how often each prompt was drawn.
  """
  won = counts @ np.nan_to_num(scores)
  played = counts @ (~np.isnan(scores)).astype(float)
  odds = special.logit((won + 0.5) / (played + 1))
  return np.pad(odds, [(0, 0), (0, 1)])


def _ranks(strengths: np.ndarray) -> np.ndarray:
  """Ranks of rows [R, P], 1 for the strongest; equals share the better rank."""
  # Sums in another order differ in their last digits.
  rounded = np.round(strengths, 9)
  return np.stack(
    [
      1 + (rounded > rounded[:, [player]]).sum(axis=1)
      for player in range(rounded.shape[1])
    ],
    axis=1,
  )
