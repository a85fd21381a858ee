"""Token log-probs against torch's log-softmax over all positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.model import logprobs


def case(shards, length, completions, width=8, vocab=23, seed=0):
  """Three rows a shard, so that a source says which row it means."""
  rng = np.random.default_rng(seed)
  return (
    rng.normal(0, 1, (3 * shards, length, width)).astype(np.float32),
    rng.normal(0, 1, (width, vocab)).astype(np.float32),
    rng.integers(0, 3 * length, (shards, completions)),
    rng.integers(0, vocab, (shards, completions)),
  )


def torch_stats(hidden, kernel, source, target):
  """All positions' log-softmax, then the gather: what we must not build."""
  logps = torch.log_softmax(hidden @ kernel, dim=-1)
  entropy = -(logps.exp() * logps).sum(-1)
  row, at = np.divmod(source, hidden.shape[1])
  row = torch.as_tensor(row + 3 * np.arange(len(source))[:, None])
  at, target = torch.as_tensor(at), torch.as_tensor(target)
  top = logps.argmax(-1)
  return logps[row, at, target], entropy[row, at], top[row, at]


def random_weights(shape, seed=9):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(stats, inputs, index, argnums, of_entropy=True):
  """Statistics, and gradients of a random sum of log-probs and entropies."""

  def total(*inputs):
    found = stats(*inputs, *index)
    value = jnp.sum(found.logps * random_weights(index[0].shape))
    if of_entropy:
      value += jnp.sum(found.entropy * random_weights(index[0].shape, 8))
    return value, found

  def both(*inputs):
    return jax.value_and_grad(total, argnums, has_aux=True)(*inputs)

  (_, found), grads = jax.jit(both)(*inputs)
  return found, grads


def chunked(chunk, words=0):
  return functools.partial(logprobs.token_stats, chunk=chunk, words=words)


# Fewer than a chunk, just one, one more, several with an incomplete last one.
@pytest.mark.parametrize("completions", [5, 128, 129, 300])
# The unembedding is frozen, trained, or trained alone.
@pytest.mark.parametrize("argnums", [(0,), (0, 1), (1,)])
def test_values_and_gradients_equal_torch(completions, argnums):
  compare_with_torch(chunked(128), completions, argnums)


# Of 23 words: one a tile; three tiles, the last of which shares a word with the
# one before; two of which the last has one word more; all and more.
@pytest.mark.parametrize("words", [1, 8, 22, 30])
@pytest.mark.parametrize("argnums", [(0,), (0, 1), (1,)])
def test_tiles_of_words_equal_torch(words, argnums):
  compare_with_torch(chunked(128, words), 300, argnums)


def compare_with_torch(stats, completions, argnums):
  *inputs, source, target = case(2, 40, completions)
  found, grads = run(stats, inputs, (source, target), argnums)
  theirs = [torch.tensor(x, requires_grad=True) for x in inputs]
  wanted, entropy, top = torch_stats(*theirs, source, target)
  (
    (wanted * torch.tensor(random_weights(source.shape))).sum()
    + (entropy * torch.tensor(random_weights(source.shape, 8))).sum()
  ).backward()
  assert found.logps.dtype == found.entropy.dtype == jnp.float32
  # Sums of 23 exponentials, gradients of up to 600 terms, in float32.
  for ours, other in ((found.logps, wanted), (found.entropy, entropy)):
    np.testing.assert_allclose(ours, other.detach(), rtol=1e-5, atol=1e-5)
  assert found.top.tolist() == top.tolist()
  for grad, number in zip(grads, argnums, strict=True):
    scale = float(theirs[number].grad.abs().max())
    np.testing.assert_allclose(
      grad, theirs[number].grad.numpy(), rtol=1e-5, atol=1e-5 * scale
    )


@pytest.mark.parametrize("argnums", [(0,), (0, 1)])
def test_chunks_change_nothing(argnums):
  """Against the plain form, whose gradients JAX derives by itself."""
  *inputs, source, target = case(3, 30, 21)
  wanted = run(logprobs.plain, inputs, (source, target), argnums)
  # One chunk; six of four with three too many; three whole ones.
  for chunk in (64, 4, 7):
    found = run(chunked(chunk), inputs, (source, target), argnums)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def compiled(
  argnums, completions, vocab, chunk, of_entropy=False, width=8, words=0
):
  """The program of values and gradients for shapes alone."""
  *inputs, source, target = (
    jax.ShapeDtypeStruct(x.shape, x.dtype)
    for x in case(1, 32, completions, width, vocab)
  )

  def total(*arguments):
    found = logprobs.token_stats(*arguments, chunk=chunk, words=words)
    value = jnp.sum(jnp.tanh(found.logps))
    return value + jnp.sum(found.entropy) if of_entropy else value

  program = jax.grad(total, argnums) if argnums else total
  return jax.jit(program).lower(*inputs, source, target).compile()


@pytest.mark.parametrize("argnums", [(), (0,), (0, 1)])
def test_memory_is_free_of_tokens_times_words(argnums):
  few, many, words, more = 512, 2048, 4096, 8192
  temp = {
    (tokens, vocab): compiled(argnums, tokens, vocab, chunk=32)
    .memory_analysis()
    .temp_size_in_bytes
    for tokens in (few, many)
    for vocab in (words, more)
  }
  # A chunk's logits are there, or the sizes would show nothing.
  assert temp[many, more] > 4 * 32 * more
  # a + b tokens + c words has no second difference; a float32 array of tokens
  # by words would make one of its size.
  mixed = temp[many, more] - temp[many, words] - temp[few, more]
  mixed += temp[few, words]
  assert abs(mixed) < 0.01 * 4 * (many - few) * (more - words)
  # Nor is it the size of all logits.
  assert temp[many, more] < 0.2 * 4 * many * more


@pytest.mark.parametrize("argnums", [(0,), (0, 1)])
def test_a_tile_of_words_is_all_that_exists(argnums):
  """However many words there are, beyond the gradient of their columns."""
  width, tokens, tile = 8, 512, 256
  few, many = (
    compiled(argnums, tokens, vocab, chunk=tokens, words=tile)
    .memory_analysis()
    .temp_size_in_bytes
    for vocab in (4 * tile, 32 * tile)
  )
  assert few > 4 * tokens * tile
  # A gradient and what it is summed in; logits would be 60 times as much.
  assert many - few < 4 * 28 * tile * width * 2.1


def test_tiles_of_a_frozen_unembedding_cost_two_products():
  program = compiled((0,), 64, 512, 64, width=256, words=128)
  # The analysis counts the loop's body, one tile, once.
  products = program.cost_analysis()["flops"] / (2 * 64 * 256 * 128)
  assert 2 <= products < 2.2


@pytest.mark.parametrize("chunk", [64, 32])
def test_a_frozen_unembedding_costs_two_products(chunk):
  """Flops of the programs, in products of [C, D] by [D, V]."""

  def products(argnums, of_entropy=False):
    program = compiled(argnums, 64, 512, chunk, of_entropy, width=256)
    # The analysis counts the body of a loop once.
    return program.cost_analysis()["flops"] / (2 * chunk * 256 * 512)

  # Softmax and gather take some; a product more would be 1.
  assert 1 <= products(()) < 1.1
  assert 2 <= products((0,)) < 2.1
  # A product for each of two gradients, and the logits again, but where there
  # is one chunk they are still there.
  assert 0 <= products((0, 1)) - (3 if chunk == 64 else 4) < 0.1
  assert 3 <= products((0,), of_entropy=True) < 3.1


def test_what_nobody_reads_is_not_computed():
  *inputs, source, target = case(1, 32, 64, vocab=512)

  def program(name):
    def values(*arguments):
      return getattr(logprobs.token_stats(*arguments, chunk=32), name)

    return jax.jit(values).lower(*inputs, source, target).compile()

  transcendentals = {
    name: program(name).cost_analysis().get("transcendentals", 0)
    for name in ("logps", "top")
  }
  # The likeliest word needs no exponential.
  assert transcendentals["logps"] > 32 * 512 / 2 > transcendentals["top"]
  assert "exponential" not in program("top").as_text()
  # Argmax alone reduces pairs of a value and its place.
  assert "(f32[], s32[], f32[], s32[])" not in program("logps").as_text()


def test_a_chunk_must_hold_a_token():
  with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
    logprobs.token_stats(*case(1, 4, 3), chunk=0)
  with pytest.raises(ValueError, match="words=-1 must not be negative"):
    logprobs.token_stats(*case(1, 4, 3), chunk=4, words=-1)


@pytest.mark.parametrize("words", [0, 1024])
@pytest.mark.parametrize("argnums", [(0,), (0, 1)])
def test_bfloat16_hidden_states_give_a_float32_softmax(argnums, words):
  hidden, kernel, *index = case(2, 16, 9, vocab=4096)
  half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
  found, grads = run(chunked(4, words), half, index, argnums)
  exact = [
    torch.tensor(np.asarray(x.astype(jnp.float32)), requires_grad=True)
    for x in half
  ]
  wanted, entropy, _ = torch_stats(*exact, *index)
  assert found.logps.dtype == jnp.float32
  # Products of bfloat16 numbers are exact in float32; only sums are rounded. A
  # softmax in bfloat16 would be off by 1e-2.
  for ours, other in ((found.logps, wanted), (found.entropy, entropy)):
    np.testing.assert_allclose(ours, other.detach(), rtol=1e-5, atol=1e-5)
  (
    (wanted * torch.tensor(random_weights(wanted.shape))).sum()
    + (entropy * torch.tensor(random_weights(wanted.shape, 8))).sum()
  ).backward()
  for grad, leaf in zip(grads, exact):
    # Probabilities and gradients are rounded to 8 bits, once each.
    assert grad.dtype == jnp.bfloat16
    scale = float(leaf.grad.abs().max())
    error = np.abs(np.asarray(grad, np.float32) - leaf.grad.numpy()).max()
    assert error < 2**-7 * scale


@pytest.mark.parametrize("words", [0, 1])
def test_a_sure_prediction_keeps_its_gradient_in_bfloat16(words):
  # One word is e^8 times as likely as the other: 1 - p is 3e-4, and the
  # gradient that times the difference of the columns, 2.
  hidden = jnp.full((1, 1, 1), 4.0, jnp.bfloat16)
  kernel = jnp.array([[1.0, -1.0]], jnp.bfloat16)
  index = jnp.zeros((1, 1), int)

  def value(hidden):
    found = chunked(8, words)(hidden, kernel, index, index)
    return found.logps.sum()

  found = float(jax.jit(jax.grad(value))(hidden)[0, 0, 0])
  assert found == pytest.approx(2 / (1 + np.exp(8)), rel=2**-7)


@pytest.mark.parametrize("words", [0, 1])
def test_large_logits_stay_finite(words):
  hidden = jnp.full((1, 1, 1), 100.0)
  kernel = jnp.array([[100.0, -100.0]])
  index = jnp.zeros((1, 2), int)
  found = chunked(8, words)(hidden, kernel, index, jnp.array([[0, 1]]))
  # Logits 1e4 and -1e4.
  assert found.logps.tolist() == [[0.0, -20000.0]]
  assert found.entropy.tolist() == [[0.0, 0.0]]
  assert found.top.tolist() == [[0, 0]]


def test_sums_by_owner():
  # Two rows; sequence 1 is spread over both, 2 owns nothing.
  values = jnp.array([[-1.0, -2.0, -4.0, -8.0], [-16.0, -32.0, -64.0, -128.0]])
  sequence_ids = jnp.array([[0, 0, 1, -1], [3, -1, 1, 3]])
  sums, lengths = logprobs.sequence_sums(values, sequence_ids, 4)
  assert sums.tolist() == [-3.0, -68.0, 0.0, -144.0]
  assert lengths.tolist() == [2.0, 2.0, 0.0, 2.0]
