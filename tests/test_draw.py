"""Drawn tokens against distributions by NumPy, and against slower ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpo_jax.core import settings
from dpo_jax.sampling import draw

COUNT = 8 * 2500
LOGITS = np.array([2.0, 1.5, 1.4, 0.7, 0.1, -0.3, -1.0, -3.0, 9.0, 9.5])
EXISTING = 8  # The last two are phantom rows, and the likeliest.
# temperature, top_k, top_p
PARAMETERS = (
  (1.0, 0, 1.0),
  (0.7, 0, 1.0),
  (1.6, 3, 1.0),
  (1.6, 0, 0.8),
  (0.7, 5, 0.9),
  (0.7, 0, 0.5),
  (2.0, 50, 0.5),
  (0.0, 0, 0.8),
)
ALL = draw.Paths(candidates=EXISTING, whole=True, nucleus=True)


def reference(logits, temperature, top_k, top_p):
  """The distribution by sorting, in float64."""
  weights = np.exp((logits - logits.max()) / temperature)
  order = np.argsort(-weights, kind="stable")
  if top_k:
    weights[order[top_k:]] = 0
  weights /= weights.sum()
  total = 0.0
  for token in order:
    if total >= top_p:
      weights[token] = 0
    total += weights[token]
  return weights / weights.sum()


DRAW = jax.jit(draw.draw, static_argnames=("vocab_size", "paths"))


def keys_of(count):
  return jax.random.split(jax.random.key(11), count)


def drawn(
  logits, temperature, top_k, top_p, paths, vocab_size=EXISTING, keys=None
):
  tokens, _ = DRAW(
    jnp.asarray(logits, jnp.float32),
    keys_of(len(logits)) if keys is None else keys,
    jnp.asarray(temperature, jnp.float32),
    jnp.asarray(top_k, jnp.int32),
    jnp.asarray(top_p, jnp.float32),
    vocab_size=vocab_size,
    paths=paths,
  )
  return np.asarray(tokens)


def alike(count, *values):
  return [np.full(count, value) for value in values]


def chi_square(tokens, expected):
  """The p-value of tokens against a distribution, rare cells as one."""
  seen = np.bincount(tokens, minlength=len(expected))
  assert set(np.flatnonzero(seen)) <= set(np.flatnonzero(expected))
  expected = expected * len(tokens)
  rare = expected < 8
  seen = np.append(seen[~rare], seen[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  cells = expected > 0
  if cells.sum() < 2:
    return 1.0
  return scipy.stats.chisquare(seen[cells], expected[cells]).pvalue


@pytest.mark.parametrize("parameters", PARAMETERS[:-1])
def test_drawn_tokens_follow_the_distribution(parameters):
  logits = np.tile(LOGITS, (COUNT, 1))
  paths = draw.paths([parameters], EXISTING)
  tokens = drawn(logits, *alike(COUNT, *parameters), paths)
  # The seed is fixed: a right sampler fails one seed in a thousand.
  expected = reference(LOGITS[:EXISTING], *parameters)
  assert chi_square(tokens, expected) > 1e-3


@pytest.mark.parametrize(
  "parameters", [(1.0, 0, 1.0), (0.8, 0, 0.9), (1.2, 70, 0.95), (1.0, 9, 1.0)]
)
def test_many_blocks_follow_the_distribution(parameters):
  """Blocks of every weight, the last of them cut by the vocabulary's end."""
  rng = np.random.default_rng(5)
  size, existing = 1000, 930
  logits = rng.normal(0, 2, size)
  logits[existing:] = 50
  count = 12_000
  paths = draw.paths([parameters], existing)
  tokens = drawn(
    np.tile(logits, (count, 1)), *alike(count, *parameters), paths, existing
  )
  expected = reference(logits[:existing], *parameters)
  assert chi_square(tokens, expected) > 1e-3


def test_rows_of_a_mixed_batch_are_drawn_as_if_alone():
  rows = np.array(PARAMETERS * (COUNT // len(PARAMETERS)))
  logits = np.tile(LOGITS, (len(rows), 1))
  keys = keys_of(len(rows))
  mixed = drawn(logits, *rows.T, ALL, keys=keys)
  for at, parameters in enumerate(PARAMETERS):
    paths = draw.paths([parameters], EXISTING)
    mine = slice(at, None, len(PARAMETERS))
    alone = drawn(logits[mine], *rows[mine].T, paths, keys=keys[mine])
    np.testing.assert_array_equal(mixed[mine], alone)


@pytest.mark.parametrize("top_k", [EXISTING, EXISTING + 1, 10**6])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_top_k_of_the_whole_vocabulary_is_off(top_k, top_p):
  paths = draw.paths([(1.0, top_k, top_p)], EXISTING)
  assert paths == draw.paths([(1.0, 0, top_p)], EXISTING)
  logits = np.tile(LOGITS, (64, 1))
  np.testing.assert_array_equal(
    drawn(logits, *alike(64, 1.0, top_k, top_p), paths),
    drawn(logits, *alike(64, 1.0, 0, top_p), paths),
  )


def test_temperature_zero_is_greedy_and_the_lowest_too():
  rows = np.array(
    [
      (temperature, top_k, top_p)
      for temperature in (0.0, settings.LOWEST_TEMPERATURE)
      for top_k, top_p in ((0, 1.0), (0, 0.9), (3, 0.9))
    ]
    * (COUNT // 6)
  )
  assert set(drawn(np.tile(LOGITS, (len(rows), 1)), *rows.T, ALL)) == {0}


def test_of_equals_the_smaller_ids_are_kept():
  logits = np.zeros((4000, 400))
  logits[:, [7, 131, 260, 399]] = 3.0
  paths = draw.paths([(1.0, 3, 1.0)], 400)
  tokens = drawn(logits, *alike(4000, 1.0, 3, 1.0), paths, 400)
  assert set(tokens) == {7, 131, 260}
  assert set(drawn(logits, *alike(4000, 0.0, 0, 1.0), ALL, 400)) == {7}
  # Four equals of weight 1/4: top_p of a half keeps all of them.
  logits[:] = -np.inf
  logits[:, [7, 131, 260, 399]] = 3.0
  tokens = drawn(logits, *alike(4000, 1.0, 0, 0.5), ALL, 400)
  assert set(tokens) == {7, 131, 260, 399}


def test_the_likeliest_are_those_of_a_full_sort():
  rng = np.random.default_rng(2)
  # Whole numbers tie often, and some blocks hold many of the likeliest.
  logits = rng.integers(0, 40, (50, 3000)).astype(np.float32)
  logits[:, 500:560] += 100
  # Tokens that do not exist, and would be the likeliest.
  logits[:, 2990:] = 1000
  blocks = draw._blocks(jnp.asarray(logits))
  maxima = draw._existing_maxima(blocks, jnp.max(blocks, -1), 2990)
  values, ids = draw._likeliest(blocks, maxima, 90, 2990)
  order = np.argsort(-logits[:, :2990], axis=1, kind="stable")[:, :90]
  np.testing.assert_array_equal(ids, order)
  np.testing.assert_array_equal(values, np.take_along_axis(logits, order, 1))


def test_top_k_draws_what_a_full_sort_would():
  """The real vocabulary, with the same noise for every token."""
  rng = np.random.default_rng(6)
  rows, size, existing = 48, 50_304, 50_277
  logits = rng.normal(0, 2, (rows, size)).astype(np.float32)
  logits[:, existing:] = 60
  parameters = [
    (t, k, p)
    for t in (0.25, 0.7, 1.0)
    for k in (1, 9, 50, 64)
    for p in (1.0, 0.9, 0.4, 0.05)
  ]
  tokens = drawn(
    logits, *np.array(parameters).T, draw.paths(parameters, existing), existing
  )
  ids = jnp.broadcast_to(jnp.arange(existing)[None], (rows, existing))
  keys = jax.random.split(jax.random.key(11), rows)
  noise = np.asarray(draw._noise(keys, ids))
  for row, of, token, own in zip(
    logits[:, :existing], parameters, tokens, noise, strict=True
  ):
    kept = reference(row.astype(np.float64), *of) > 0
    perturbed = np.where(kept, row / np.float32(of[0]) + own, -np.inf)
    assert token == np.argmax(perturbed), of


def test_the_nucleus_is_that_of_a_full_sort():
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 3, (40, 1000)).astype(np.float32)
  blocks = draw._blocks(jnp.asarray(logits))
  weights = jnp.exp(blocks - jnp.max(blocks, (1, 2), keepdims=True))
  assert (draw._nucleus(weights, jnp.ones(40, jnp.float32)) == 0).all()
  for top_p in (1e-6, 0.3, 0.9, 0.999):
    lowest = draw._nucleus(weights, jnp.full(40, top_p, jnp.float32))
    kept = np.asarray(weights >= lowest[:, None, None]).reshape(40, -1)[
      :, :1000
    ]
    for row, chosen in zip(logits.astype(np.float64), kept):
      expected = reference(row, 1.0, 0, top_p) > 0
      assert abs(int(chosen.sum()) - int(expected.sum())) <= 1
      # They may differ in the one token at which the sum is top_p, rounded.
      assert (chosen ^ expected).sum() <= 1


def test_log_probs_are_of_the_model_itself():
  rng = np.random.default_rng(4)
  logits = rng.normal(0, 3, (6, 300))
  tokens, logps = DRAW(
    jnp.asarray(logits, jnp.float32),
    jax.random.split(jax.random.key(0), 6),
    *(jnp.asarray(x) for x in ([0.0, 0.5, 1, 2, 3, 1.0], [0, 3, 0, 4, 0, 0])),
    jnp.full(6, 0.9),
    vocab_size=290,
    paths=draw.Paths(64, True, True),
  )
  shifted = logits - logits.max(1, keepdims=True)
  expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
  expected = expected[np.arange(6), np.asarray(tokens)]
  np.testing.assert_allclose(logps, expected, atol=1e-5)
