"""Packing: batches by hand and by definition, and layouts as one computation.

The definition is that a token sees its own prompt and its own response, up to
itself. All layouts must give that, and so the same log-probs, losses and
gradients.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sourcing
import tiny
from hypothesis import strategies as st

from configs import models
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, token_table, tokenization, tokenizer
from dpo_jax.model import attention, gpt_neox
from dpo_jax.training import losses, step

LAYOUTS = ("padded", "packed", "shared")
PAD = 1


def layout_of(layout="shared", **values):
  return dataclasses.replace(
    packing.Packing(layout, 40, 1, 1, False, PAD), **values
  )


# --- by hand


def test_a_row_by_hand():
  pair = token_table.Pair("i", (5, 6), (7, 8, 0), (9, 0))
  batch, counts = batch_lib.pack([pair], layout_of(row_length=8))
  assert batch.tokens.tolist() == [[[5, 6, 7, 8, 0, 9, 0, PAD]]]
  assert batch.positions.tolist() == [[[0, 1, 2, 3, 4, 2, 3, 0]]]
  assert batch.segment_ids.tolist() == [[[1, 1, 1, 1, 1, 1, 1, 0]]]
  assert batch.part_ids.tolist() == [[[0, 0, 1, 1, 1, 2, 2, 0]]]
  assert batch.dropout_ids.tolist() == [[[1, 2, 3, 4, 5, 6, 7, 0]]]
  assert batch.reference is None
  assert counts == batch_lib.Counts(("i",), 7, 5, 8, 22)
  # Completions come in multiples of 128. The prompt's last token predicts the
  # first one of both responses.
  assert batch.sequence_ids.shape == (1, 1, 128)
  assert batch.source[..., :6].tolist() == [[[1, 2, 3, 1, 5, 0]]]
  assert batch.target[..., :6].tolist() == [[[7, 8, 0, 9, 0, 0]]]
  assert batch.sequence_ids[..., :6].tolist() == [[[0, 0, 0, 1, 1, -1]]]
  arrays = batch.segment_ids[0], batch.part_ids[0]
  mask = np.asarray(attention.Segments(*arrays).mask())
  np.testing.assert_array_equal(mask, visible_by_definition(*arrays))
  assert mask[0].astype(int).tolist() == [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 0, 0, 0, 1, 0, 0],
    [1, 1, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
  ]


def table_of(*sizes):
  """Examples of these many tokens, prompts of one."""
  return token_table.from_items(
    [
      token_table.Example(str(i), (10 + i,), (20 + i,) * (size - 1))
      for i, size in enumerate(sizes)
    ]
  )


def test_first_fit_decreasing_in_snake_order_by_hand():
  # Rows of 10: 9; 8 and 2; 6 and 3; 5 and 5. They predict 8, 8, 7 and 8.
  table = table_of(2, 5, 9, 3, 8, 6, 5)
  (plan,) = packing.plans(table, layout_of("packed", row_length=10))
  # Items 2; 4, 0; 5, 3; 1, 6.
  assert plan.offset.tolist() == [18, 30, 0, 26, 10, 20, 35]
  assert plan.shape == packing.Shape(4, 31)
  two = layout_of("packed", row_length=10, shards=2)
  (plan,) = packing.plans(table, two)
  # Most to predict first, rows 0, 1, 3, 2 go to shards 0, 1, 1, 0.
  assert plan.shard.tolist() == [1, 1, 0, 0, 1, 0, 1]
  assert plan.offset.tolist() == [8, 10, 0, 16, 0, 10, 15]
  assert plan.shape == packing.Shape(4, 16)
  (plan,) = packing.plans(table, dataclasses.replace(two, spans_rows=True))
  # 9, 8, 6, 5, 5, 3, 2 to the shard with fewer tokens: 9 5 5 and 8 6 3 2.
  assert plan.shard.tolist() == [1, 0, 0, 1, 1, 1, 0]
  assert plan.offset.tolist() == [0, 0, 5, 2, 5, 13, 14]
  assert plan.shape == packing.Shape(4, 16, 3)


def test_micro_batches_that_span_rows_are_balanced():
  table = table_of(9, 8, 2, 1)
  two = layout_of(
    "packed",
    row_length=10,
    microbatches=2,
    loss_on_prompt=True,
    spans_rows=True,
  )
  # 9, then 8 to the other, 2 to where 8 is, 1 where there is still room.
  assert packing.microbatch_order(table.lengths, two).tolist() == [0, 3, 1, 2]
  one = dataclasses.replace(two, microbatches=1)
  for other in (one, dataclasses.replace(two, spans_rows=False)):
    order = packing.microbatch_order(table.lengths, other)
    assert order.tolist() == [0, 1, 2, 3]
  batch, counts = batch_lib.pack(table, two)
  assert np.count_nonzero(batch.segment_ids, (1, 2)).tolist() == [10, 10]
  assert counts.ids == ("0", "1", "2", "3")


@pytest.mark.parametrize("count", [7, 13])
def test_padded_rows_are_as_many_as_sequences(count):
  batch, _ = batch_lib.pack(tiny.pairs(count), layout_of("padded"))
  assert batch.tokens.shape[1] == 2 * count


def test_rows_beyond_the_shapes_waste_at_most_a_fifth():
  # Each pair fills its row.
  items = tiny.pairs(40, 1, prompt=(20, 21), response=(10, 11))
  for count in range(1, 41):
    batch, _ = batch_lib.pack(items[:count], layout_of())
    assert count <= batch.tokens.shape[1] <= 1.2 * count + 1
  sizes = {packing._rounded(n, 8, 1.1) for n in range(1, 400)}
  assert all(size % 8 == 0 for size in sizes)
  assert len(sizes) < 35


# --- by definition

ids = st.integers(2, 63)


@st.composite
def cases(draw):
  """Items of any lengths, and any packing of them."""
  text = st.lists(ids, min_size=1, max_size=12).map(tuple)
  layout = draw(st.sampled_from(LAYOUTS))
  is_pair = layout == "shared" or draw(st.booleans())
  kind, parts = (token_table.Pair, 3) if is_pair else (token_table.Example, 2)
  item = st.builds(kind, st.uuids().map(str), *[text] * parts)
  microbatches = draw(st.integers(1, 3))
  count = microbatches * draw(st.integers(1, 5))
  shapes = draw(
    st.sampled_from([(), ((12, 256),), ((12, 128), (24, 384)), ((1, 1),)])
  )
  spans_rows = layout != "padded" and draw(st.booleans())
  return draw(st.lists(item, min_size=count, max_size=count)), layout_of(
    layout,
    row_length=draw(st.integers(5, 12) if spans_rows else st.integers(36, 60)),
    shards=draw(st.integers(1, 4)),
    microbatches=microbatches,
    loss_on_prompt=not is_pair and draw(st.booleans()),
    shapes=tuple(packing.Shape(*shape, 64) for shape in shapes),
    spans_rows=spans_rows,
  )


def sequences_of(item):
  """(prompt, response) and (number of its first token) of each."""
  if isinstance(item, token_table.Example):
    return [(item.prompt, item.response)]
  return [(item.prompt, item.chosen), (item.prompt, item.rejected)]


def visible_by_definition(segment, part):
  """[B, query, key]: of one segment, earlier, of the prompt or one response."""
  same = (segment[:, :, None] == segment[:, None]) & (segment > 0)[:, None]
  part = (part == 0)[:, None] | (part[:, :, None] == part[:, None])
  return np.tril(same & part)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(cases())
def test_any_packing_is_by_definition(case):
  """Each response token is predicted once, from its own sequence alone."""
  items, layout = case
  table = token_table.from_items(items)
  reference = np.arange(len(table.tokens), dtype=np.float32)
  batch, counts = batch_lib.pack(table, layout, reference)
  order = packing.microbatch_order(table.lengths, layout)
  size = len(items) // layout.microbatches
  # Rows, or where segments span them, the streams of shards.
  width = layout.row_length
  if layout.spans_rows:
    width *= batch.tokens.shape[1] // layout.shards
  rows_of = batch.tokens.shape[1] * layout.row_length // layout.shards // width
  visible = 0
  for m in range(layout.microbatches):
    rows = {
      name: getattr(batch, name)[m].reshape(-1, width)
      for name in (
        *("tokens", "positions", "segment_ids", "part_ids", "dropout_ids"),
      )
    }
    mask = visible_by_definition(rows["segment_ids"], rows["part_ids"])
    visible += mask.sum()
    empty = rows["segment_ids"] == 0
    assert (rows["tokens"][empty] == PAD).all()
    assert not rows["dropout_ids"][empty].any()
    # Dropout numbers the tokens of the table.
    numbers = rows["dropout_ids"][~empty] - 1
    assert (table.tokens[numbers] == rows["tokens"][~empty]).all()
    owners = [
      (i, p, *sequence)
      for i in order[m * size : (m + 1) * size]
      for p, sequence in enumerate(sequences_of(items[i]))
    ]
    predicted = [[] for _ in owners]
    there = np.argwhere(batch.sequence_ids[m] >= 0)
    for s, c in there:
      row, at = divmod(batch.source[m, s, c], width)
      assert row < rows_of
      row += s * rows_of
      number = batch.sequence_ids[m, s, c]
      item, part, prompt, response = owners[number]
      whole = prompt + response
      seen = np.flatnonzero(mask[row, at])
      assert tuple(rows["tokens"][row, seen]) == whole[: len(seen)]
      assert (rows["positions"][row, seen] == np.arange(len(seen))).all()
      assert batch.target[m, s, c] == whole[len(seen)]
      # Its own token of the table, and not an equal one.
      place = len(seen) - len(prompt)
      start = table.starts[item, 0] + len(seen)
      if place >= 0:
        start = table.starts[item, 1 + part] + place
      assert batch.reference[m, s, c] == start
      first = table.starts[item, 0]
      assert rows["dropout_ids"][row, seen[0]] == first + 1
      predicted[number].append(len(seen))
    for (_, _, prompt, response), found in zip(owners, predicted, strict=True):
      first = 1 if layout.loss_on_prompt else len(prompt)
      assert sorted(found) == list(range(first, len(prompt) + len(response)))
  assert counts == batch_lib.Counts(
    table.ids,
    (batch.segment_ids > 0).sum(),
    (batch.sequence_ids >= 0).sum(),
    batch.tokens.size,
    visible,
  )
  copies = 1 if layout.layout == "shared" else table.parts - 1
  prompts = table.lengths[:, 0].sum()
  assert counts.tokens == len(table.tokens) + (copies - 1) * prompts
  # The first shape that holds all, or a larger one.
  plans = packing.plans(table.take(order), layout)
  least = packing.least_shape(plans)
  found = packing.Shape(
    batch.tokens.shape[1],
    batch.sequence_ids.shape[2],
    batch.block_pairs.shape[2] if layout.spans_rows else 64,
  )
  assert found.holds(least)
  fits = [shape for shape in layout.shapes if shape.holds(least)]
  assert not fits or found == fits[0]
  assert batch.sequence_ids.shape[1] == layout.shards


# --- refusals

LONG = token_table.Pair("long", (2,) * 4, (3,) * 10, (4,) * 7)


@pytest.mark.parametrize(
  ("layout", "length"), [("shared", 21), ("packed", 14), ("padded", 14)]
)
def test_a_segment_longer_than_a_row_is_refused(layout, length):
  assert packing.longest_segment([LONG], layout) == length
  batch_lib.pack([LONG], layout_of(layout, row_length=length))
  with pytest.raises(ValueError, match=f"long takes {length} tokens.*row_le"):
    batch_lib.pack([LONG], layout_of(layout, row_length=length - 1))


def test_items_that_do_not_divide_and_empty_prompts_are_refused():
  with pytest.raises(ValueError, match="5 items do not divide into 2"):
    batch_lib.pack(tiny.pairs(5), layout_of(microbatches=2))
  # Nothing would predict the response's first token.
  pair = token_table.Pair("bare", (), (3,), (4,))
  with pytest.raises(ValueError, match="bare has an empty prompt"):
    batch_lib.pack([pair], layout_of())


# --- the three layouts are one computation

LORA = gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
TINY = dataclasses.replace(tiny.CONFIG, lora=LORA)
PYTHIA = gpt_neox.ModelConfig(**models.pythia("14m").to_dict())


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, base, adapters, batch):
  """Log-prob sums and losses of six pairs, and gradients of the adapters."""

  def total(adapters):
    sums, _ = step.sequence_logps(config, base, adapters, batch, 12)
    reference, _ = step.sequence_logps(config, base, None, batch, 12)
    margins = [x[::2] - x[1::2] for x in (sums, reference)]
    each = losses.dpo_loss(*margins, beta=0.5)
    # The chosen responses' log-probs, too: SFT on a packed batch of pairs.
    return jnp.mean(each), (sums, reference, each)

  def chosen(adapters):
    sums, _ = step.sequence_logps(config, base, adapters, batch, 12)
    return sums[::2].sum()

  grads, values = jax.grad(total, has_aux=True)(adapters)
  return values, grads, jax.grad(chosen)(adapters)


@functools.cache
def weights_of(config):
  return tiny.weights(config), tiny.adapters(config)


def run(items, layout, config=TINY, row_length=40, width=128):
  """Of one shape for all layouts: twelve rows."""
  how = layout_of(
    layout, row_length=row_length, shapes=(packing.Shape(12, width),)
  )
  batch, _ = batch_lib.pack(items, how)
  assert batch.tokens.shape == (1, 12, row_length)
  micro = jax.tree.map(lambda x: x[0], batch)
  return loss_and_grads(config, *weights_of(config), micro)


def assert_close(found, wanted, tolerance):
  """By the greatest value of each array, or 1."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


texts = st.lists(ids, min_size=1, max_size=12).map(tuple)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  st.lists(
    st.builds(token_table.Pair, st.uuids().map(str), texts, texts, texts),
    min_size=6,
    max_size=6,
  )
)
def test_layouts_give_the_same_numbers(items):
  wanted = run(items, "padded")
  for layout in ("packed", "shared"):
    # Float32 sums of up to 24 terms in another order.
    assert_close(run(items, layout), wanted, 2e-5)


@pytest.mark.slow
def test_layouts_agree_on_real_rows(shared):
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  table = tokenization.tokenize(
    words,
    sourcing.harmless(shared, limit=42),
    rules="paper",
    max_length=96,
    max_prompt_length=40,
  ).table
  items = table.take(np.arange(6) * 7)
  config = dataclasses.replace(PYTHIA, lora=LORA)
  found = {layout: run(items, layout, config, 256, 1024) for layout in LAYOUTS}
  (sums, _, each), grads, _ = found["padded"]
  assert float(jnp.abs(sums).min()) > 1
  assert float(jnp.ptp(each)) > 1e-2
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
  for layout in ("packed", "shared"):
    # Float32; sums of up to 1,000 nats are compared by their own size.
    assert_close(found[layout], found["padded"], 1e-4)


def test_log_probs_are_those_of_the_sequence_alone():
  items = tiny.pairs(6, seed=5)
  base, adapters = weights_of(TINY)
  (sums, _, _), _, _ = run(items, "shared")
  # One sequence a row, a plain causal mask.
  sequences = [s for item in items for s in sequences_of(item)]
  tokens = np.zeros((12, 24), np.int32)
  for row, (prompt, response) in zip(tokens, sequences):
    row[: len(prompt + response)] = prompt + response
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((24, 24), bool)), (12, 24, 24))
  positions = jnp.broadcast_to(jnp.arange(24), (12, 24))
  apply = jax.jit(gpt_neox.apply, static_argnums=0)
  hidden = apply(TINY, base, adapters, tokens, positions, mask)[0]
  logits = np.asarray(gpt_neox.unembed(base, hidden))
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row, total, (prompt, response) in zip(logps, sums, sequences):
    at = np.arange(len(prompt) - 1, len(prompt + response) - 1)
    np.testing.assert_allclose(total, row[at, list(response)].sum(), rtol=1e-5)


def mirrored(item, *names):
  """The item with other tokens in some parts."""
  changed = {n: tuple(65 - t for t in getattr(item, n)) for n in names}
  return dataclasses.replace(item, **changed)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_neighbors_in_a_row_change_nothing(layout):
  items = tiny.pairs(6, seed=2)
  other = [mirrored(item, "prompt", "chosen", "rejected") for item in items]
  batch, _ = batch_lib.pack(items, layout_of(layout))
  # The pair under test shares its row.
  source, sequences = batch.source[0, 0], batch.sequence_ids[0, 0]
  (row,) = np.unique(source[sequences == 0] // 40)
  assert {*sequences[source // 40 == row]} - {-1, 0, 1}
  (before, _, _), _, _ = run(items, layout)
  (after, _, _), _, _ = run([items[0], *other[1:]], layout)
  # Not a bit: a masked weight is exactly zero.
  np.testing.assert_array_equal(before[:2], after[:2])
  assert np.abs(before[2:] - after[2:]).min() > 1e-4


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("changed", ["chosen", "rejected"])
def test_a_response_does_not_see_the_other(layout, changed):
  items = tiny.pairs(6, seed=3, response=(3, 7))
  before, _, grads = run(items, layout)
  after, _, other = run([mirrored(item, changed) for item in items], layout)
  kept, moved = (1, 0) if changed == "chosen" else (0, 1)
  np.testing.assert_array_equal(before[0][kept::2], after[0][kept::2])
  assert np.abs(before[0][moved::2] - after[0][moved::2]).min() > 1e-4
  if changed == "rejected":
    # Its tokens are in the sums with weights of exactly zero.
    for a, b in zip(*map(jax.tree.leaves, (grads, other)), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
      assert float(jnp.abs(a).max()) > 1e-5
