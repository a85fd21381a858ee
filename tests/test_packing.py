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

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, token_table
from dpo_jax.model import attention, gpt_neox
from dpo_jax.training import losses, step

LAYOUTS = ("padded", "packed", "shared")
PAD = 1


def how(layout="shared", **values):
  return packing.Packing(
    **(
      {
        "layout": layout,
        "row_length": 40,
        "shards": 1,
        "microbatches": 1,
        "loss_on_prompt": False,
        "pad_id": PAD,
      }
      | values
    )
  )


def examples(count, seed=0):
  return [
    token_table.Example(pair.id, pair.prompt, pair.chosen)
    for pair in tiny.pairs(count, seed)
  ]


def sequences_of(items):
  """(prompt, response) of every sequence, in the order of their owners."""
  for item in items:
    if isinstance(item, token_table.Example):
      yield item.prompt, item.response
    else:
      yield item.prompt, item.chosen
      yield item.prompt, item.rejected


def walk(batch, m, r, at):
  """The sequence that ends at a token, by walking back through what it sees."""
  mask = np.asarray(
    attention.Segments(
      batch.segment_ids[m, r : r + 1], batch.part_ids[m, r : r + 1]
    ).mask()
  )[0]
  seen = np.flatnonzero(mask[at])
  return tuple(batch.tokens[m, r, seen]), tuple(batch.positions[m, r, seen])


def assert_definition(batch, items, microbatches, loss_on_prompt=False):
  """Every predicted token sees just its own sequence, at its own positions."""
  share = len(items) // microbatches
  rows, length = batch.tokens.shape[1:]
  shards, width = batch.sequence_ids.shape[1:]
  for m in range(microbatches):
    sequences = list(sequences_of(items[m * share : (m + 1) * share]))
    predicted = [[] for _ in sequences]
    for s, c in np.ndindex(shards, width):
      sequence_ids = batch.sequence_ids[m, s, c]
      if sequence_ids < 0:
        continue
      row, at = divmod(batch.source[m, s, c], length)
      assert row < rows // shards
      tokens, positions = walk(batch, m, s * (rows // shards) + row, at)
      prompt, response = sequences[sequence_ids]
      whole = prompt + response
      assert tokens == whole[: len(tokens)]
      assert positions == tuple(range(len(tokens)))
      assert batch.target[m, s, c] == whole[len(tokens)]
      predicted[sequence_ids].append(len(tokens))
    for (prompt, response), at in zip(sequences, predicted, strict=True):
      first = 1 if loss_on_prompt else len(prompt)
      assert sorted(at) == list(range(first, len(prompt) + len(response)))


# --- the definition


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_pairs_by_definition(layout, microbatches):
  items = tiny.pairs(6)
  batch, counts = batch_lib.pack(items, how(layout, microbatches=microbatches))
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
  batch, counts = batch_lib.pack(
    items, how(layout, microbatches=2, loss_on_prompt=loss_on_prompt)
  )
  assert_definition(batch, items, 2, loss_on_prompt)
  # The first token of a text is predicted by nothing.
  extra = sum(len(item.prompt) - 1 for item in items) * loss_on_prompt
  assert counts.completion_tokens == extra + sum(
    len(item.response) for item in items
  )


def test_a_row_by_hand():
  pair = token_table.Pair("i", (5, 6), (7, 8, 0), (9, 0))
  batch, counts = batch_lib.pack([pair], how(row_length=8))
  assert batch.sequence_ids.shape == (1, 1, 128)
  # Completions come in multiples of 128: here six are looked at.
  batch = dataclasses.replace(
    batch,
    **{
      k: getattr(batch, k)[..., :6]
      for k in ("source", "target", "sequence_ids")
    },
  )
  assert batch.tokens.tolist() == [[[5, 6, 7, 8, 0, 9, 0, PAD]]]
  assert batch.positions.tolist() == [[[0, 1, 2, 3, 4, 2, 3, 0]]]
  assert batch.segment_ids.tolist() == [[[1, 1, 1, 1, 1, 1, 1, 0]]]
  assert batch.part_ids.tolist() == [[[0, 0, 1, 1, 1, 2, 2, 0]]]
  assert batch.dropout_ids.tolist() == [[[1, 2, 3, 4, 5, 6, 7, 0]]]
  assert batch.reference is None
  assert counts == batch_lib.Counts(("i",), 7, 5, 8, 22)
  # The prompt's last token predicts the first one of both responses.
  assert batch.source.tolist() == [[[1, 2, 3, 1, 5, 0]]]
  assert batch.target.tolist() == [[[7, 8, 0, 9, 0, 0]]]
  assert batch.sequence_ids.tolist() == [[[0, 0, 0, 1, 1, -1]]]
  mask = attention.Segments(batch.segment_ids[0], batch.part_ids[0]).mask()[0]
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
def cases(draw):
  """Items of any lengths, and a way to lay them out."""
  text = st.lists(ids, min_size=1, max_size=12).map(tuple)
  layout = draw(st.sampled_from(LAYOUTS))
  is_pair = layout == "shared" or draw(st.booleans())
  kind, parts = (token_table.Pair, 3) if is_pair else (token_table.Example, 2)
  item = st.builds(kind, st.uuids().map(str), *[text] * parts)
  microbatches = draw(st.integers(1, 3))
  share = draw(st.integers(1, 5))
  count = microbatches * share
  items = draw(st.lists(item, min_size=count, max_size=count))
  layout = how(
    layout,
    row_length=draw(st.integers(36, 60)),
    shards=draw(st.integers(1, 4)),
    microbatches=microbatches,
    loss_on_prompt=not is_pair and draw(st.booleans()),
    shapes=draw(
      st.sampled_from([(), ((12, 256),), ((12, 128), (24, 384)), ((1, 1),)])
    ),
  )
  shapes = tuple(packing.Shape(*shape) for shape in layout.shapes)
  return items, dataclasses.replace(layout, shapes=shapes)


def plain_pack(items, layout):
  """The same batch by loops over tokens: the slow twin of `pack`."""
  share = len(items) // layout.microbatches
  seat = 1
  micros = []
  for m in range(layout.microbatches):
    pieces = []
    for number, item in enumerate(items[m * share : (m + 1) * share]):
      # (token, position, part, seat, sequence_ids or None, index that predicts
      # it)
      prompt = [
        (
          t,
          i,
          0,
          seat + i,
          number if layout.loss_on_prompt and i else None,
          i - 1,
        )
        for i, t in enumerate(item.prompt)
      ]
      seat += len(prompt)
      responses = []
      if isinstance(item, token_table.Example):
        texts = [(item.response, number)]
      else:
        texts = [(item.chosen, 2 * number), (item.rejected, 2 * number + 1)]
      for text, sequence_ids in texts:
        responses.append((text, sequence_ids, seat))
        seat += len(text)
      if layout.layout == "shared":
        piece = list(prompt)
        for part, (text, sequence_ids, first) in enumerate(responses, 1):
          before = len(piece) - 1
          for i, t in enumerate(text):
            origin = before + i if i else len(prompt) - 1
            at = len(prompt) + i
            piece.append((t, at, part, first + i, sequence_ids, origin))
        pieces.append(piece)
      else:
        for text, sequence_ids, first in responses:
          pieces.append(
            prompt
            + [
              (
                t,
                len(prompt) + i,
                1,
                first + i,
                sequence_ids,
                len(prompt) + i - 1,
              )
              for i, t in enumerate(text)
            ]
          )
    rows = []
    if layout.layout == "padded":
      rows = [[piece] for piece in pieces]
    else:
      for piece in sorted(pieces, key=lambda piece: -len(piece)):
        for row in rows:
          if sum(map(len, row)) + len(piece) <= layout.row_length:
            row.append(piece)
            break
        else:
          rows.append([piece])

    def predicted(row):
      return sum(token[4] is not None for piece in row for token in piece)

    shards = [[] for _ in range(layout.shards)]
    if layout.shards == 1:
      shards = [rows]
    else:
      rows = sorted(rows, key=lambda row: -predicted(row))
      to_and_fro = [*range(layout.shards), *reversed(range(layout.shards))]
      for i, row in enumerate(rows):
        shards[to_and_fro[i % len(to_and_fro)]].append(row)
    micros.append(shards)
  return micros


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(cases())
def test_packing_equals_its_slow_twin(case):
  items, layout = case
  reference = np.arange(sum(map(len, flat_texts(items))), dtype=np.float32)
  batch, counts = batch_lib.pack(
    token_table.from_items(items), layout, reference
  )
  micros = plain_pack(items, layout)
  m, rows, length = batch.tokens.shape
  assert (m, length) == (layout.microbatches, layout.row_length)
  assert rows % layout.shards == 0
  assert batch.sequence_ids.shape[1] == layout.shards
  per_shard = rows // layout.shards
  flat = [token for text in flat_texts(items) for token in text]
  for m, shards in enumerate(micros):
    for s, shard in enumerate(shards):
      seen, c = set(), 0
      for r, row in enumerate(shard):
        at = 0
        for number, piece in enumerate(row, 1):
          first = at
          for token, position, part, seat, sequence_ids, origin in piece:
            here = (m, s * per_shard + r, at)
            seen.add(here[1:])
            assert batch.tokens[here] == token
            assert batch.positions[here] == position
            assert batch.segment_ids[here] == number
            assert batch.part_ids[here] == part
            assert batch.dropout_ids[here] == seat
            # Seats number the tokens of all items, one after the other.
            assert flat[seat - 1] == token
            if sequence_ids is not None:
              there = (m, s, c)
              assert batch.source[there] == r * length + first + origin
              assert batch.target[there] == token
              assert batch.sequence_ids[there] == sequence_ids
              assert batch.reference[there] == reference[seat - 1]
              c += 1
            at += 1
      assert (batch.sequence_ids[m, s, c:] == -1).all()
      for r in range(s * per_shard, (s + 1) * per_shard):
        empty = [t for t in range(length) if (r, t) not in seen]
        assert not batch.segment_ids[m, r, empty].any()
        assert not batch.dropout_ids[m, r, empty].any()
        assert (batch.tokens[m, r, empty] == PAD).all()
  assert counts.ids == tuple(item.id for item in items)
  assert counts.tokens == (batch.segment_ids > 0).sum()
  assert counts.completion_tokens == (batch.sequence_ids >= 0).sum()
  assert counts.slots == batch.tokens.size
  piece, part = batch.segment_ids, batch.part_ids
  sees = (piece[..., None, :] == piece[..., None]) & (piece > 0)[..., None]
  sees &= (part[..., None, :] == 0) | (part[..., None, :] == part[..., None])
  assert counts.visible == np.tril(sees).sum()
  # The shape is the first of those given that holds all, if one does.
  needed = max(len(shard) for shards in micros for shard in shards)
  widest = int((batch.sequence_ids >= 0).sum(-1).max())
  found = packing.Shape(rows, batch.sequence_ids.shape[2])
  fits = [
    shape
    for shape in layout.shapes
    if shape.rows >= rows_needed(micros, layout) and shape.width >= widest
  ]
  if fits:
    assert found == fits[0]
  else:
    assert found.rows >= needed * layout.shards
    assert found.width == -(-widest // 128) * 128


def rows_needed(micros, layout):
  return max(sum(len(shard) for shard in shards) for shards in micros)


def flat_texts(items):
  """All parts of all items, in the order of a table's tokens."""
  for item in items:
    yield item.prompt
    if isinstance(item, token_table.Example):
      yield item.response
    else:
      yield item.chosen
      yield item.rejected


# --- refusals


@pytest.mark.parametrize(
  ("layout", "length"), [("shared", 21), ("packed", 14), ("padded", 14)]
)
def test_a_piece_longer_than_a_row_is_refused(layout, length):
  # 4 + 10 + 7 tokens.
  pair = token_table.Pair("long", (2,) * 4, (3,) * 10, (4,) * 7)
  assert packing.longest_segment([pair], layout) == length
  batch_lib.pack([pair], how(layout, row_length=length))
  with pytest.raises(ValueError, match=f"long takes {length} tokens.*row_le"):
    batch_lib.pack([pair], how(layout, row_length=length - 1))


def test_items_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="5 items do not divide into 2"):
    batch_lib.pack(tiny.pairs(5), how(microbatches=2))


def test_an_empty_prompt_is_refused():
  # Nothing would predict the response's first token.
  pair = token_table.Pair("bare", (), (3,), (4,))
  for layout in LAYOUTS:
    with pytest.raises(ValueError, match="bare has an empty prompt"):
      batch_lib.pack([pair], how(layout))


# --- the three layouts are one computation

LORA = dataclasses.replace(
  tiny.CONFIG, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)
SETTINGS = losses.LossSettings("sigmoid", 0.5, 0.0)
# One shape for all: 12 rows of 40 tokens.
ROWS = {"row_length": 40, "shapes": (packing.Shape(12, 128),)}


@functools.partial(jax.jit, static_argnums=3)
def loss_and_grads(base, adapters, batch, pairs):
  """Sums, losses and gradients of one micro-batch under the tiny model."""

  def total(adapters):
    sums, _ = step.sequence_logps(LORA, base, adapters, batch, 2 * pairs)
    reference, _ = step.sequence_logps(LORA, base, None, batch, 2 * pairs)
    margins = [x[::2] - x[1::2] for x in (sums, reference)]
    each = losses.dpo_loss(*margins, beta=SETTINGS.beta)
    return jnp.mean(each), (sums, reference, each)

  grads, values = jax.grad(total, has_aux=True)(adapters)
  return values, grads


@functools.cache
def both_weights():
  return tiny.weights(LORA), tiny.adapters(LORA)


@pytest.fixture
def weights():
  return both_weights()


def micro(batch):
  """The only micro-batch."""
  return jax.tree.map(lambda x: x[0], batch)


def run(weights, items, layout):
  batch, _ = batch_lib.pack(items, how(layout, **ROWS))
  assert batch.tokens.shape == (1, 12, 40)
  return loss_and_grads(*weights, micro(batch), len(items))


texts = st.lists(ids, min_size=1, max_size=12).map(tuple)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  st.lists(
    st.builds(token_table.Pair, st.uuids().map(str), texts, texts, texts),
    min_size=6,
    max_size=6,
  )
)
def test_layouts_give_the_same_numbers(items):
  weights = both_weights()
  wanted, wanted_grads = run(weights, items, "padded")
  for layout in ("packed", "shared"):
    values, grads = run(weights, items, layout)
    # Float32 sums of up to 24 terms in another order.
    for a, b in zip(values, wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_log_probs_are_those_of_the_sequence_alone(weights):
  base, adapters = weights
  items = tiny.pairs(6, seed=5)
  (sums, _, _), _ = run(weights, items, "shared")
  for number, (prompt, response) in enumerate(sequences_of(items)):
    # One sequence, one row, a plain causal mask: padded behind, to one shape.
    whole = np.zeros((1, 24), np.int32)
    whole[0, : len(prompt + response)] = prompt + response
    hidden = alone(base, adapters, whole)
    logits = np.asarray(gpt_neox.unembed(base, hidden))[0]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(prompt) - 1, len(prompt + response) - 1)
    np.testing.assert_allclose(
      sums[number], logits[at, list(response)].sum(), rtol=1e-5
    )


@jax.jit
def alone(base, adapters, tokens):
  size = tokens.shape[1]
  mask = jnp.tril(jnp.ones((1, size, size), bool))
  return gpt_neox.apply(
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
  rows, _ = batch_lib.pack(items, how(layout, **ROWS))
  # The pair under test has company in its row.
  (at,) = np.unique(rows.source[0, 0][rows.sequence_ids[0, 0] == 0] // 40)
  here = rows.source[0, 0] // 40 == at
  assert len(set(rows.sequence_ids[0, 0][here]) - {-1, 0, 1}) > 0
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
