"""Token log-probs against torch's log-softmax over all positions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.model import logprobs


def case(shards, length, completions, width=8, vocab=23):
  """Three rows a shard, so that a source says which row it means."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(0, 1, (3 * shards, length, width)).astype(np.float32),
    rng.normal(0, 1, (width, vocab)).astype(np.float32),
    rng.integers(0, 3 * length, (shards, completions)),
    rng.integers(0, vocab, (shards, completions)),
  )


def factors(shape):
  """d loss / d logps."""
  return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def ours(inputs, source, target, argnums, **options):
  """Statistics, and gradients of a random sum of log-probs."""

  def total(*inputs):
    found = logprobs.token_stats(*inputs, source, target, **options)
    return jnp.sum(found.logps * factors(source.shape)), found

  grad = jax.jit(jax.value_and_grad(total, argnums, has_aux=True))
  (_, found), grads = grad(*inputs)
  return found, grads


def torchs(inputs, source, target):
  """The same by all positions' log-softmax and a gather."""
  inputs = [
    torch.tensor(np.asarray(x, np.float32), requires_grad=True) for x in inputs
  ]
  logps = torch.log_softmax(inputs[0] @ inputs[1], dim=-1)
  entropy = -(logps.exp() * logps).sum(-1)
  row, at = np.divmod(source, inputs[0].shape[1])
  row = torch.as_tensor(row + 3 * np.arange(len(source))[:, None])
  at, target = torch.as_tensor(at), torch.as_tensor(target)
  top = logps.argmax(-1)[row, at]
  squares = (2 * logps.detach()).logsumexp(-1)[row, at]
  logps, entropy = logps[row, at, target], entropy[row, at]
  (logps * torch.tensor(factors(source.shape))).sum().backward()
  grads = [x.grad.numpy() for x in inputs]
  return (logps.detach(), entropy.detach(), squares, top), grads


def assert_close(found, wanted):
  # Sums of 23 exponentials in float32.
  stats = (found.logps, found.entropy, found.log_square_sum)
  for a, b in zip(stats, wanted[:3], strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert found.top.tolist() == wanted[3].tolist()


# The unembedding is frozen, trained, or trained alone. Less than a chunk of
# 128; two chunks, the second padded; three. Of 23 columns: one a tile; three
# tiles, the last overlapping the one before; two, of which the last adds one
# column; one of all.
@pytest.mark.parametrize(
  ("completions", "tile", "argnums"),
  [
    (5, 0, (0, 1)),
    (129, 30, (0,)),
    (300, 0, (0,)),
    (300, 0, (0, 1)),
    (300, 0, (1,)),
    (300, 1, (0,)),
    (300, 8, (0,)),
    (300, 8, (0, 1)),
    (300, 8, (1,)),
    (129, 22, (0, 1)),
  ],
)
def test_values_and_gradients_equal_torch(completions, tile, argnums):
  *inputs, source, target = case(2, 40, completions)
  found, grads = ours(
    inputs, source, target, argnums, chunk=128, vocab_tile=tile
  )
  wanted, wanted_grads = torchs(inputs, source, target)
  assert_close(found, wanted)
  for grad, number in zip(grads, argnums, strict=True):
    # Gradients are sums of up to 600 terms.
    scale = float(np.abs(wanted_grads[number]).max())
    np.testing.assert_allclose(
      grad, wanted_grads[number], rtol=1e-5, atol=1e-5 * scale
    )


@pytest.mark.parametrize(
  ("argnums", "tile"), [((0,), 0), ((0, 1), 0), ((0,), 1024)]
)
def test_bfloat16_hidden_states_give_a_float32_softmax(argnums, tile):
  *inputs, source, target = case(2, 16, 9, vocab=4096)
  half = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
  found, grads = ours(half, source, target, argnums, chunk=4, vocab_tile=tile)
  # Products of bfloat16 numbers are exact in float32; only sums are rounded. A
  # softmax in bfloat16 would be off by 1e-2.
  wanted, wanted_grads = torchs(half, source, target)
  assert_close(found, wanted)
  for grad, exact in zip(grads, wanted_grads):
    # Probabilities and gradients are rounded to 8 bits, once each.
    assert grad.dtype == jnp.bfloat16
    error = np.abs(np.asarray(grad, np.float32) - exact).max()
    assert error < 2**-7 * np.abs(exact).max()


def compiled(argnums, completions, vocab, chunk, width=8, tile=0):
  """The program of values and gradients for shapes alone."""
  inputs = (
    jax.ShapeDtypeStruct(x.shape, x.dtype)
    for x in case(1, 32, completions, width, vocab)
  )

  def total(*arguments):
    found = logprobs.token_stats(*arguments, chunk=chunk, vocab_tile=tile)
    return jnp.sum(jnp.tanh(found.logps))

  program = jax.grad(total, argnums) if argnums else total
  return jax.jit(program).lower(*inputs).compile()


@pytest.mark.parametrize("argnums", [(), (0,), (0, 1)])
def test_logits_of_all_tokens_never_exist(argnums):
  few, many, vocab = 512, 2048, 8192
  less, more = (
    compiled(argnums, tokens, vocab, chunk=32)
    .memory_analysis()
    .temp_size_in_bytes
    for tokens in (few, many)
  )
  # A chunk's logits are there, or the sizes would show nothing.
  assert less > 4 * 32 * vocab
  # A token adds its hidden state and gradients, of 8 numbers, and no logits.
  assert more - less < 0.01 * 4 * (many - few) * vocab


@pytest.mark.parametrize("argnums", [(0,), (0, 1)])
def test_logits_of_one_vocabulary_tile_exist(argnums):
  width, tokens, tile = 8, 512, 256
  few, many = (
    compiled(argnums, tokens, vocab, chunk=tokens, tile=tile)
    .memory_analysis()
    .temp_size_in_bytes
    for vocab in (4 * tile, 32 * tile)
  )
  assert few > 4 * tokens * tile
  # A gradient and what it is summed in; logits would be 60 times as much.
  assert many - few < 4 * 28 * tile * width * 2.1


# Products of [C, D] by [D, V]: one for the logits and one for each gradient; a
# trained unembedding computes the logits again if there is more than one chunk.
@pytest.mark.parametrize(
  ("argnums", "chunk", "tile", "products"),
  [
    ((), 64, 0, 1),
    ((0,), 64, 0, 2),
    ((0,), 32, 0, 2),
    ((0,), 64, 128, 2),
    ((0, 1), 32, 0, 4),
  ],
)
def test_a_frozen_unembedding_costs_two_products(
  argnums, chunk, tile, products
):
  program = compiled(argnums, 64, 512, chunk, width=256, tile=tile)
  # The analysis counts the body of a loop, one chunk or tile, once.
  one = 2 * chunk * 256 * (tile or 512)
  # Softmax and gather take some; one product more would be 1.
  assert 0 <= program.cost_analysis()["flops"] / one - products < 0.2


def test_unused_statistics_are_not_computed():
  inputs = case(1, 32, 64, vocab=512)

  def program(name):
    def values(*arguments):
      return getattr(logprobs.token_stats(*arguments, chunk=32), name)

    return jax.jit(values).lower(*inputs).compile().as_text()

  # The most likely token needs no exponential.
  assert "exponential" in program("logps")
  assert "exponential" not in program("top")
  # Argmax alone reduces pairs of a value and its index.
  pairs = re.compile(r"\(f32\[1,32\]\S*, s32\[1,32\]\S*\) reduce\(")
  assert pairs.search(program("top"))
  assert not pairs.search(program("logps"))


@pytest.mark.parametrize("tile", [0, 1])
def test_extreme_logits_keep_their_values_and_gradients(tile):
  stats = jax.jit(
    functools.partial(logprobs.token_stats, chunk=8, vocab_tile=tile)
  )
  hidden = jnp.full((1, 1, 1), 100.0)
  index = jnp.zeros((1, 2), int)
  found = stats(
    hidden, jnp.array([[100.0, -100.0]]), index, jnp.array([[0, 1]])
  )
  # Logits 1e4 and -1e4.
  assert found.logps.tolist() == [[0.0, -20000.0]]
  assert found.entropy.tolist() == [[0.0, 0.0]]
  assert found.top.tolist() == [[0, 0]]

  # In bfloat16 one token is e^8 times as likely as the other: 1 - p is 3e-4,
  # and the gradient that times the difference of the columns, 2.
  def logp(hidden):
    kernel = jnp.array([[1.0, -1.0]], jnp.bfloat16)
    return stats(hidden, kernel, index[:, :1], index[:, :1]).logps.sum()

  slope = jax.grad(logp)(jnp.full((1, 1, 1), 4.0, jnp.bfloat16))
  assert float(slope[0, 0, 0]) == pytest.approx(2 / (1 + np.exp(8)), rel=2**-7)


def test_sums_by_sequence():
  # Two rows; sequence 1 is in both, 2 is empty.
  values = jnp.array([[-1.0, -2.0, -4.0, -8.0], [-16.0, -32.0, -64.0, -128.0]])
  sequence_ids = jnp.array([[0, 0, 1, -1], [3, -1, 1, 3]])
  sums, lengths = logprobs.sequence_sums(values, sequence_ids, 4)
  assert sums.tolist() == [-3.0, -68.0, 0.0, -144.0]
  assert lengths.tolist() == [2.0, 2.0, 0.0, 2.0]
