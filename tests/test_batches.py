"""Layouts against their definition, and against each other.

What a token may see is defined here by words: its own prompt and its own
response, up to itself. The three layouts must all give that, and so the same
log-probs, losses and gradients.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st

from dpo_jax import batches, losses, model, steps, tokenizer

LAYOUTS = ("padded", "packed", "shared")
PAD = 1


def how(layout="shared", **values):
  return batches.Packing(
    **(
      {
        "layout": layout,
        "row_length": 40,
        "row_multiple": 1,
        "microbatches": 1,
        "loss_on_prompt": False,
        "pad_id": PAD,
      }
      | values
    )
  )


def examples(count, seed=0):
  return [
    batches.Example(pair.id, pair.prompt, pair.chosen)
    for pair in tiny.pairs(count, seed)
  ]


def sequences_of(items):
  """(prompt, response) of every sequence, in the order of their owners."""
  for item in items:
    if isinstance(item, batches.Example):
      yield item.prompt, item.response
    else:
      yield item.prompt, item.chosen
      yield item.prompt, item.rejected


def walk(batch, m, r, at):
  """The sequence that ends at a token, by walking back through what it sees."""
  mask = np.asarray(
    batches.attention_mask(
      batch.pieces[m, r : r + 1], batch.parts[m, r : r + 1]
    )
  )[0]
  seen = np.flatnonzero(mask[at])
  return tuple(batch.tokens[m, r, seen]), tuple(batch.positions[m, r, seen])


def assert_definition(batch, items, microbatches, loss_on_prompt=False):
  """Every predicted token sees just its own sequence, at its own positions."""
  share = len(items) // microbatches
  found = []
  for m in range(microbatches):
    sequences = list(sequences_of(items[m * share : (m + 1) * share]))
    predicted = [[] for _ in sequences]
    rows, width = batch.owner.shape[1:]
    for r in range(rows):
      for c in range(width):
        owner = batch.owner[m, r, c]
        if owner < 0:
          continue
        tokens, positions = walk(batch, m, r, batch.source[m, r, c])
        prompt, response = sequences[owner]
        whole = prompt + response
        assert tokens == whole[: len(tokens)]
        assert positions == tuple(range(len(tokens)))
        assert batch.target[m, r, c] == whole[len(tokens)]
        predicted[owner].append(len(tokens))
    for (prompt, response), at in zip(sequences, predicted, strict=True):
      first = 1 if loss_on_prompt else len(prompt)
      assert sorted(at) == list(range(first, len(prompt) + len(response)))
    found.append(sequences)
  return found


# --- the definition


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_pairs_by_definition(layout, microbatches):
  items = tiny.pairs(6)
  batch, counts = batches.pack(items, how(layout, microbatches=microbatches))
  assert_definition(batch, items, microbatches)
  assert counts.ids == tuple(item.id for item in items)
  assert counts.completion_tokens == sum(
    len(item.chosen) + len(item.rejected) for item in items
  )
  prompts = {"shared": 1}.get(layout, 2)
  assert counts.tokens == counts.completion_tokens + prompts * sum(
    len(item.prompt) for item in items
  )


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_examples_by_definition(layout, loss_on_prompt):
  items = examples(6)
  batch, counts = batches.pack(
    items, how(layout, microbatches=2, loss_on_prompt=loss_on_prompt)
  )
  assert_definition(batch, items, 2, loss_on_prompt)
  # The first token of a text is predicted by nothing.
  extra = sum(len(item.prompt) - 1 for item in items) * loss_on_prompt
  assert counts.completion_tokens == extra + sum(
    len(item.response) for item in items
  )


def test_a_row_by_hand():
  pair = tokenizer.TokenizedPair("i", (5, 6), (7, 8, 0), (9, 0))
  batch, _ = batches.pack([pair], how(row_length=8, width=6))
  assert batch.tokens.tolist() == [[[5, 6, 7, 8, 0, 9, 0, PAD]]]
  assert batch.positions.tolist() == [[[0, 1, 2, 3, 4, 2, 3, 0]]]
  assert batch.pieces.tolist() == [[[1, 1, 1, 1, 1, 1, 1, 0]]]
  assert batch.parts.tolist() == [[[0, 0, 1, 1, 1, 2, 2, 0]]]
  # The prompt's last token predicts the first one of both responses.
  assert batch.source.tolist() == [[[1, 2, 3, 1, 5, 0]]]
  assert batch.target.tolist() == [[[7, 8, 0, 9, 0, 0]]]
  assert batch.owner.tolist() == [[[0, 0, 0, 1, 1, -1]]]
  mask = batches.attention_mask(batch.pieces[0], batch.parts[0])[0]
  assert np.asarray(mask).astype(int).tolist() == [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0, 0],
    [1, 1, 0, 0, 0, 1, 0, 0],
    [1, 1, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
  ]


ids = st.integers(2, 63)


@st.composite
def layouts(draw):
  text = st.lists(ids, min_size=1, max_size=12).map(tuple)
  pair = st.builds(tokenizer.TokenizedPair, st.uuids().map(str), *[text] * 3)
  microbatches = draw(st.integers(1, 3))
  share = draw(st.integers(1, 5))
  count = microbatches * share
  items = draw(st.lists(pair, min_size=count, max_size=count))
  packing = how(
    draw(st.sampled_from(LAYOUTS)),
    row_length=draw(st.integers(36, 60)),
    row_multiple=draw(st.integers(1, 4)),
    microbatches=microbatches,
    rows=draw(st.sampled_from([0, 12, 24])),
    width=draw(st.sampled_from([0, 40])),
  )
  return items, packing


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(layouts())
def test_every_token_is_written_once_and_predicted_once(case):
  items, packing = case
  batch, counts = batches.pack(items, packing)
  microbatches, rows, width = batch.tokens.shape
  assert (microbatches, width) == (packing.microbatches, packing.row_length)
  assert rows % packing.row_multiple == 0
  assert rows >= packing.rows
  assert batch.owner.shape == batch.source.shape == batch.target.shape
  # At most eight widths, the given one among them.
  eighth = -(-packing.row_length // 8)
  assert batch.owner.shape[2] in {
    max(i * eighth, packing.width) for i in range(1, 9)
  }
  # Tokens: as many as the texts have, in as many copies as the layout says.
  prompts = 1 if packing.layout == "shared" else 2
  wanted = sorted(
    token
    for item in items
    for text in (*[item.prompt] * prompts, item.chosen, item.rejected)
    for token in text
  )
  assert sorted(batch.tokens[batch.pieces > 0]) == wanted
  assert counts.tokens == len(wanted)
  assert (batch.tokens[batch.pieces == 0] == PAD).all()
  # Predictions: each sequence's own response, whole, under its own number.
  share = len(items) // microbatches
  for m in range(microbatches):
    owners, targets = batch.owner[m], batch.target[m]
    sequences = list(sequences_of(items[m * share : (m + 1) * share]))
    for number, (_, response) in enumerate(sequences):
      assert tuple(targets[owners == number]) == response
    assert owners.max() == len(sequences) - 1
    assert (owners >= 0).sum() == sum(len(r) for _, r in sequences)
  assert (batch.source >= 0).all()
  assert (batch.source < width).all()


def test_rows_come_in_few_sizes():
  counts = sorted({batches._rounded(n, 8, 1.1) for n in range(1, 400)})
  assert all(count % 8 == 0 for count in counts)
  assert len(counts) < 35
  assert all(batches._rounded(n, 8, 1.1) >= n for n in range(1, 400))
  # At most a tenth and one multiple of padding rows.
  assert all(batches._rounded(n, 8, 1.1) <= 1.1 * n + 8 for n in range(1, 400))


def test_a_run_settles_on_one_shape():
  items = tiny.pairs(120, prompt=(2, 20), response=(1, 10))
  free = how(microbatches=2, row_multiple=2)
  settle = functools.partial(batches.settled, items, free, batch_size=16)
  fixed = settle(seed=0)
  assert fixed == settle(seed=0)
  options = {"batch_size": 16, "epochs": 8}
  loose, tight = stream(items, free, **options), stream(items, fixed, **options)
  shapes = [[b.owner.shape[1:] for b, _ in batch] for batch in (loose, tight)]
  assert len(set(shapes[0])) > 2
  most = max(shapes[1].count(shape) for shape in set(shapes[1]))
  assert most >= 0.9 * len(shapes[1])
  # The same items, however much room they have.
  for (_, a), (_, b) in zip(loose, tight, strict=True):
    assert a == b
  # Fewer items than a batch, as in evaluation.
  few = batches.settled(items[:3], how(), batch_size=16, seed=0)
  assert batches.pack(items[:3], few)[0].tokens.shape[1] == few.rows


# --- refusals


@pytest.mark.parametrize(
  ("layout", "length"), [("shared", 21), ("packed", 14), ("padded", 14)]
)
def test_a_piece_longer_than_a_row_is_refused(layout, length):
  # 4 + 10 + 7 tokens.
  pair = tokenizer.TokenizedPair("long", (2,) * 4, (3,) * 10, (4,) * 7)
  assert batches.longest_piece([pair], layout) == length
  batches.pack([pair], how(layout, row_length=length))
  with pytest.raises(ValueError, match=f"long takes {length} tokens.*row_le"):
    batches.pack([pair], how(layout, row_length=length - 1))


def test_items_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="5 items do not divide into 2"):
    batches.pack(tiny.pairs(5), how(microbatches=2))


def test_an_empty_prompt_is_refused():
  # Nothing would predict the response's first token.
  pair = tokenizer.TokenizedPair("bare", (), (3,), (4,))
  for layout in LAYOUTS:
    with pytest.raises(ValueError, match="bare has an empty prompt"):
      batches.pack([pair], how(layout))


# --- the three layouts are one computation

LORA = dataclasses.replace(
  tiny.CONFIG, lora=model.LoraConfig(2, 4.0, 0.0, model.TARGETS)
)
SETTINGS = losses.LossSettings("sigmoid", 0.5, 0.0)
# One shape for all: 12 rows of 40 tokens.
ROWS = {"row_length": 40, "row_multiple": 12}


@functools.partial(jax.jit, static_argnums=3)
def loss_and_grads(base, adapters, batch, pairs):
  """Sums, losses and gradients of one micro-batch under the tiny model."""

  def total(adapters):
    sums, _ = steps.sequence_logps(LORA, base, adapters, batch, 2 * pairs)
    reference, _ = steps.sequence_logps(LORA, base, None, batch, 2 * pairs)
    margins = [x[::2] - x[1::2] for x in (sums, reference)]
    each = losses.dpo_loss(*margins, beta=SETTINGS.beta)
    return jnp.mean(each), (sums, reference, each)

  grads, values = jax.grad(total, has_aux=True)(adapters)
  return values, grads


@pytest.fixture(scope="module")
def weights():
  return tiny.weights(LORA), tiny.adapters(LORA)


def micro(batch):
  """The first micro-batch with completions padded to one width."""
  batch = jax.tree.map(lambda x: x[0], batch)
  missing = 40 - batch.owner.shape[1]
  padding = ((0, 0), (0, missing))
  return dataclasses.replace(
    batch,
    source=np.pad(batch.source, padding),
    target=np.pad(batch.target, padding),
    owner=np.pad(batch.owner, padding, constant_values=-1),
  )


def run(weights, items, layout):
  batch, _ = batches.pack(items, how(layout, **ROWS))
  assert batch.tokens.shape == (1, 12, 40)
  return loss_and_grads(*weights, micro(batch), len(items))


def test_layouts_give_the_same_numbers(weights):
  items = tiny.pairs(6, prompt=(2, 12), response=(1, 10))
  wanted, wanted_grads = run(weights, items, "padded")
  assert float(np.ptp(wanted[2])) > 0.1
  for layout in ("packed", "shared"):
    values, grads = run(weights, items, layout)
    # Float32 sums of up to 22 terms in another order.
    for a, b in zip(values, wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_log_probs_are_those_of_the_sequence_alone(weights):
  base, adapters = weights
  items = tiny.pairs(6, seed=5)
  (sums, _, _), _ = run(weights, items, "shared")
  for number, (prompt, response) in enumerate(sequences_of(items)):
    # One sequence, one row, a plain causal mask: padded behind, to one shape.
    whole = np.zeros((1, 24), np.int32)
    whole[0, : len(prompt + response)] = prompt + response
    hidden = alone(base, adapters, whole)
    logits = np.asarray(model.unembed(base, hidden))[0]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(prompt) - 1, len(prompt + response) - 1)
    np.testing.assert_allclose(
      sums[number], logits[at, list(response)].sum(), rtol=1e-5
    )


@jax.jit
def alone(base, adapters, tokens):
  size = tokens.shape[1]
  mask = jnp.tril(jnp.ones((1, size, size), bool))
  return model.apply(
    LORA, base, adapters, tokens, jnp.arange(size)[None], mask
  )[0]


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_neighbours_in_a_row_change_nothing(weights, layout):
  items = tiny.pairs(6, seed=2)
  other = [
    dataclasses.replace(
      item,
      prompt=tuple(65 - t for t in item.prompt),
      chosen=tuple(65 - t for t in item.chosen),
      rejected=tuple(65 - t for t in item.rejected),
    )
    for item in items
  ]
  mixed = [items[0], *other[1:]]
  rows, _ = batches.pack(items, how(layout, **ROWS))
  # The pair under test has company in its row.
  here = (rows.owner[0] == 0).any(axis=1)
  assert len(set(rows.owner[0][here].ravel()) - {-1, 0, 1}) > 0
  (before, _, _), _ = run(weights, items, layout)
  (after, _, _), _ = run(weights, mixed, layout)
  # Not a bit: a masked weight is exactly zero.
  np.testing.assert_array_equal(before[:2], after[:2])
  assert np.abs(before[2:] - after[2:]).min() > 1e-4


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_rejected_response_does_not_see_the_chosen_one(weights, layout):
  items = tiny.pairs(6, seed=3, response=(3, 7))
  changed = [
    dataclasses.replace(item, chosen=tuple(65 - t for t in item.chosen))
    for item in items
  ]
  (before, _, _), _ = run(weights, items, layout)
  (after, _, _), _ = run(weights, changed, layout)
  np.testing.assert_array_equal(before[1::2], after[1::2])
  assert np.abs(before[::2] - after[::2]).min() > 1e-4


# --- streams


def stream(items, packing=None, **values):
  options = {"batch_size": 4, "seed": 3, "epochs": 2, "start_step": 0} | values
  return list(batches.stream(items, packing or how(), **options))


def test_a_step_holds_batch_size_pairs_and_an_epoch_each_pair_once():
  items = tiny.pairs(14)
  found = [counts.ids for _, counts in stream(items)]
  # Three batches of four; the two left over wait for the next epoch.
  assert [len(i) for i in found] == [4] * 6
  for epoch in (found[:3], found[3:]):
    seen = [i for batch in epoch for i in batch]
    assert len(set(seen)) == 12
  assert found[:3] != found[3:]
  everything = {i for batch in found for i in batch}
  assert everything <= {item.id for item in items}


def test_order_depends_on_the_seed_and_on_nothing_else():
  items = tiny.pairs(13)
  order = [counts.ids for _, counts in stream(items)]
  for layout in LAYOUTS:
    for microbatches in (1, 2):
      packing = how(layout, microbatches=microbatches, row_multiple=8)
      found = [counts.ids for _, counts in stream(items, packing)]
      assert found == order
  assert [counts.ids for _, counts in stream(items, seed=4)] != order


@pytest.mark.parametrize("start", [1, 3, 4, 5, 6])
def test_a_stream_goes_on_where_it_was(start):
  items = tiny.pairs(13)
  whole, rest = stream(items), stream(items, start_step=start)
  assert len(rest) == 6 - start
  for (a, a_counts), (b, b_counts) in zip(rest, whole[start:], strict=True):
    assert a_counts == b_counts
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_more_epochs_do_not_change_the_first():
  items = tiny.pairs(9)
  short, long = stream(items, epochs=1), stream(items, epochs=3)
  assert [c.ids for _, c in long][:2] == [c.ids for _, c in short]


def test_fewer_items_than_a_batch_are_refused():
  with pytest.raises(ValueError, match="3 items are fewer than batch_size=4"):
    stream(tiny.pairs(3))


def test_a_bad_item_stops_the_stream():
  items = tiny.pairs(7, prompt=(30, 31), response=(9, 10))
  with pytest.raises(ValueError, match="takes 48 tokens"):
    stream(items)


def test_evaluation_keeps_order_and_the_last_few():
  items = tiny.pairs(10)
  found = list(batches.in_order(items, how(), batch_size=4))
  assert [len(counts.ids) for _, counts in found] == [4, 4, 2]
  assert sum((counts.ids for _, counts in found), ()) == tuple(
    item.id for item in items
  )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_settled_shape_holds_nearly_every_batch(layout):
  items = tiny.pairs(60, 5)
  settled = batches.settled(items, how(layout), batch_size=12, seed=0)
  shapes = []
  stream = batches.stream(
    items, settled, batch_size=12, seed=3, epochs=4, start_step=0
  )
  for batch, counts in stream:
    shapes.append((batch.tokens.shape, batch.target.shape))
    assert batch.tokens.shape[1] >= settled.rows
    assert batch.target.shape[2] >= settled.width
    rows = {row.id: row for row in items}
    assert_definition(batch, [rows[name] for name in counts.ids], 1)
  assert len(shapes) == 20
  usual = ((1, settled.rows, 40), (1, settled.rows, settled.width))
  assert shapes.count(usual) >= 18


def test_a_batch_beyond_the_settled_shape_is_still_whole():
  items = tiny.pairs(12, 5)
  small = dataclasses.replace(how(), rows=1, width=5)
  batch, _ = batches.pack(items, small)
  assert batch.tokens.shape[1] > 1
  assert_definition(batch, items, 1)
