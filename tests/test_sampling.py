"""The sampler against transformers, NumPy's distributions, and itself moved."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import scripted
import torch
import transformers

from dpo_jax import decoding, hf, partitioning, sampling

PROMPTS = (
  "\n\nHuman: Hi!\n\nAssistant:",
  "\n\nHuman: Can you name a bird?\n\nAssistant:",
  "\n\nHuman: Which river is the longest?\n\nAssistant: The Nile.\n\nHuman: And"
  " which is the second longest of them?\n\nAssistant:",
  "\n\nHuman: ?\n\nAssistant:",
  "\n\nHuman: Bye!\n\nAssistant:",
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
  return scripted.small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def noisy(tok):
  # More rows than the tokenizer has tokens, as in Pythia.
  return scripted.noisy(tok.vocab_size + 16)


def engine(**changes):
  fields = {
    "batch_size": 8,
    "rows_per_prompt": 2,
    "length_multiple": 64,
    "max_new_tokens": 24,
    "chunk": 8,
    "seed": 3,
  }
  return sampling.Engine(**(fields | changes))


def requests_for(tok, texts=PROMPTS, temperatures=(0.0, 1.0), **changes):
  fields = {"sample_id": 0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
  return [
    sampling.Request(
      prompt=tuple(tok.encode(text)),
      stream=sampling.stream(text),
      temperature=temperature,
      **(fields | changes),
    )
    for text in texts
    for temperature in temperatures
  ]


def run(policy, tok, requests, how=None, mesh=None, lora=None):
  """Samples in the order of the requests."""
  config, base = policy
  out = {}
  for batch in sampling.generate(
    config, base, lora, tok, requests, how or engine(), mesh
  ):
    out.update(batch)
  assert sorted(out) == list(range(len(requests)))
  return [out[index] for index in range(len(requests))]


# Against transformers.


def test_greedy_equals_transformers_generate(tok, tmp_path):
  size = tok.vocab_size + 5
  config = transformers.GPTNeoXConfig(
    vocab_size=size,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=160,
    max_position_embeddings=256,
  )
  network = transformers.GPTNeoXForCausalLM(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in network.parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if weight.ndim == 1:
        weight.add_(0.3 * noise)
      else:
        weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)
  network.save_pretrained(tmp_path)
  policy = hf.load(
    tmp_path,
    dtype="float32",
    remat="none",
    lora=None,
    param_dtype="float32",
  )
  samples = run(policy, tok, requests_for(tok, temperatures=(0.0,)))
  lengths = set()
  for text, sample in zip(PROMPTS, samples):
    ids = torch.tensor([tok.encode(text)])
    expected = network.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=24,
      do_sample=False,
      eos_token_id=tok.eos_id,
      pad_token_id=tok.pad_id,
      suppress_tokens=list(range(tok.vocab_size, size)),
    )[0, ids.shape[1] :].tolist()
    assert list(sample.tokens) == expected
    lengths.add(len(set(expected)))
  # The weights do not make every answer a repetition of one token.
  assert max(lengths) > 5


# Distributions.

COUNT = 8 * 2500
LOGITS = np.array([2.0, 1.5, 1.4, 0.7, 0.1, -0.3, -1.0, -3.0, 9.0, 9.5])
EXISTING = 8  # The last two are phantom rows, and the likeliest.


def reference(temperature, top_k, top_p):
  """The distribution by sorting, in float64."""
  weights = np.exp(LOGITS[:EXISTING] / temperature)
  order = np.argsort(-weights, kind="stable")
  if top_k:
    weights[order[top_k:]] = 0
  weights /= weights.sum()
  total = 0.0
  for token in order:
    if total >= top_p:
      weights[token] = 0
    total += weights[token]
  return np.append(weights / weights.sum(), [0.0, 0.0])


DISTRIBUTIONS = (
  (1.0, 0, 1.0, 0),
  (0.7, 0, 1.0, 0),
  (1.6, 3, 1.0, 3),
  (1.6, 3, 1.0, EXISTING),
  (1.6, 0, 0.8, EXISTING),
  (0.7, 5, 0.9, 5),
  (0.7, 5, 0.9, EXISTING),
  (2.0, 50, 0.5, EXISTING),
)


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p", "candidates"), DISTRIBUTIONS
)
def test_drawn_tokens_follow_the_distribution(
  temperature, top_k, top_p, candidates
):
  count = COUNT
  tokens = draw(
    np.tile(LOGITS, (count, 1)),
    np.full(count, temperature),
    np.full(count, top_k),
    np.full(count, top_p),
    candidates,
  )
  expected = reference(temperature, top_k, top_p)
  seen = np.bincount(tokens, minlength=len(LOGITS))
  assert set(np.flatnonzero(seen)) == set(np.flatnonzero(expected))
  likely = expected > 0
  if likely.sum() > 1:
    # The seed is fixed: a right sampler fails one seed in a thousand.
    test = scipy.stats.chisquare(seen[likely], count * expected[likely])
    assert test.pvalue > 1e-3


JITTED_DRAW = jax.jit(
  decoding.draw, static_argnames=("vocab_size", "candidates")
)


def draw(logits, temperature, top_k, top_p, candidates):
  return np.asarray(
    JITTED_DRAW(
      jnp.asarray(logits, jnp.float32),
      jax.random.split(jax.random.key(11), len(logits)),
      jnp.asarray(temperature, jnp.float32),
      jnp.asarray(top_k, jnp.int32),
      jnp.asarray(top_p, jnp.float32),
      vocab_size=EXISTING,
      candidates=candidates,
    )
  )


def test_rows_of_a_mixed_batch_are_drawn_as_if_alone():
  rows = np.array(
    [row[:3] for row in DISTRIBUTIONS] * (COUNT // len(DISTRIBUTIONS))
  )
  logits = np.tile(LOGITS, (len(rows), 1))
  mixed = draw(logits, *rows.T, EXISTING)
  for at, (temperature, top_k, top_p, candidates) in enumerate(DISTRIBUTIONS):
    one = np.tile([temperature, top_k, top_p], (len(rows), 1))
    alone = draw(logits, *one.T, candidates)
    mine = slice(at, None, len(DISTRIBUTIONS))
    np.testing.assert_array_equal(mixed[mine], alone[mine])


def test_temperature_zero_is_greedy_and_the_lowest_too():
  count = COUNT
  for temperature in (0.0, sampling.LOWEST_TEMPERATURE):
    tokens = draw(
      np.tile(LOGITS, (count, 1)),
      np.full(count, temperature),
      np.zeros(count),
      np.ones(count),
      0,
    )
    assert set(tokens) == {0}


def test_first_token_of_the_engine_follows_softmax(noisy, tok):
  config, base = noisy
  temperature, count = 0.8, 2048
  (prompt,) = requests_for(tok, PROMPTS[1:2], (temperature,), max_new_tokens=1)
  requests = [
    dataclasses.replace(prompt, sample_id=index) for index in range(count)
  ]
  how = engine(batch_size=512, rows_per_prompt=512, max_new_tokens=1)
  tokens = [s.tokens[0] for s in run(noisy, tok, requests, how)]
  ids = jnp.asarray([prompt.prompt])
  length = ids.shape[1]
  hidden, _ = sampling.model.apply(
    config,
    base,
    None,
    ids,
    jnp.arange(length)[None],
    jnp.tril(jnp.ones((length, length), bool))[None],
  )
  logits = np.asarray(sampling.model.unembed(base, hidden[0, -1]), np.float64)
  weights = np.exp(logits[: tok.vocab_size] / temperature)
  expected = count * weights / weights.sum()
  seen = np.bincount(tokens, minlength=tok.vocab_size)
  # Chi-square wants cells that are not nearly empty: the rare ones are one.
  rare = expected < 5
  seen = np.append(seen[~rare], seen[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  assert len(seen) > 20
  assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3


# Where an answer ends.


def one_answer(tok, chain, limit=24, chunk=8):
  policy = scripted.scripted(tok, [chain])
  request = sampling.Request((chain[0],), 0, 0, 0.0, 0, 1.0, limit)
  (sample,) = run(policy, tok, [request], engine(chunk=chunk))
  return sample


def test_stops_at_eos(tok):
  a, b, c = (tok.encode(text)[0] for text in "?ab")
  sample = one_answer(tok, [a, b, c, tok.eos_id])
  assert sample == sampling.Sample((b, c, tok.eos_id), "ab", "eos")


def test_an_empty_answer_is_an_answer(tok):
  sample = one_answer(tok, [tok.encode("?")[0], tok.eos_id])
  assert sample == sampling.Sample((tok.eos_id,), "", "eos")


def test_stops_at_its_length(tok):
  a, b = (tok.encode(text)[0] for text in "?a")
  sample = one_answer(tok, [a, b], limit=5)
  assert sample == sampling.Sample((b,) * 5, "aaaaa", "length")


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_stops_at_a_human_turn_in_any_tokenisation(tok, chunk):
  vocabulary = tok.backend.get_vocab()
  double, human, colon = (vocabulary[piece] for piece in ("ĊĊ", "Human", ":"))
  letters = [vocabulary[letter] for letter in "Human"]
  start, first, after = (vocabulary[piece] for piece in "?!Z")
  for turn in ([double, human, colon], [double, *letters, colon]):
    assert tok.decode(turn) == "\n\nHuman:"
    sample = one_answer(tok, [start, first, *turn, after], chunk=chunk)
    # What was generated behind the turn in the same chunk is not counted.
    assert sample == sampling.Sample((first, *turn), "!", "turn")


def test_the_tokenizers_own_turn_is_found(tok):
  usual = tok.encode("\n\nHuman:")
  assert usual == tok.encode("\n") * 2 + tok.encode("Human") + tok.encode(":")
  tokens = [*tok.encode("!"), *usual, *tok.encode(" Hi!")]
  for checked in range(len(usual) + 1):
    assert sampling._turn_end(tok, tokens, checked) == 1 + len(usual)
  for fewer in range(len(usual) + 1):
    assert sampling._turn_end(tok, tokens[:fewer], 0) == 0


def test_a_colon_inside_a_longer_token_is_a_turn_too(tok):
  """The token that ends the turn may go on behind it."""

  class Fused:
    eos_id, vocab_size = 0, 4
    pieces = ("", "\n\nHu", "man: yes", "ok")

    def decode(self, ids):
      return "".join(self.pieces[token] for token in ids)

  fused = Fused()
  assert sampling._turn_end(fused, [3, 1, 2, 3], 0) == 3
  assert sampling._turn_end(fused, [3, 1, 3, 3], 0) == 0
  request = sampling.Request((1,), 0, 0, 0.0, 0, 1.0, 4)
  sample = sampling._finish(fused, request, np.array([3, 1, 2, 3]), 3)
  assert sample == sampling.Sample((3, 1, 2), "ok", "turn")


def test_a_turn_before_eos_is_a_turn(tok):
  start, first = tok.encode("?")[0], tok.encode("!")[0]
  vocabulary = tok.backend.get_vocab()
  turn = [vocabulary[piece] for piece in ("ĊĊ", "Human", ":")]
  sample = one_answer(tok, [start, first, *turn, tok.eos_id])
  assert sample == sampling.Sample((first, *turn), "!", "turn")


# What an answer does not depend on.


@pytest.fixture(scope="module")
def grid(tok):
  """Requests at several temperatures and sample ids, with all limits."""
  requests = []
  for sample_id, limit in ((0, 24), (7, 11)):
    requests += requests_for(
      tok,
      temperatures=(0.0, 0.7, 1.3),
      sample_id=sample_id,
      max_new_tokens=limit,
    )
  filtered = requests_for(tok, temperatures=(1.0,), top_k=9, top_p=0.9)
  return requests + filtered


@pytest.fixture(scope="module")
def told(noisy, tok, grid):
  return run(noisy, tok, grid)


def test_samples_differ_where_their_keys_do(tok, grid, told):
  drawn = {
    (r.prompt, r.sample_id): s.tokens[:11]
    for r, s in zip(grid, told)
    if r.temperature == 1.3
  }
  assert len(set(drawn.values())) == len(drawn) == 2 * len(PROMPTS)


@pytest.mark.parametrize(
  "changes",
  [
    {"batch_size": 24, "rows_per_prompt": 6, "max_new_tokens": 40},
    {"batch_size": 3, "rows_per_prompt": 1, "length_multiple": 48},
    {"chunk": 1},
  ],
  ids=str,
)
def test_tokens_do_not_depend_on_the_engine(noisy, tok, grid, told, changes):
  assert run(noisy, tok, grid, engine(**changes)) == told


def test_tokens_do_not_depend_on_order_or_neighbours(noisy, tok, grid, told):
  assert run(noisy, tok, grid[::-1]) == told[::-1]
  some = [1, 4, 17, 30]
  alone = run(noisy, tok, [grid[index] for index in some])
  assert alone == [told[index] for index in some]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_tokens_do_not_depend_on_the_mesh(noisy, tok, grid, told, sizes):
  config, base = noisy
  # The vocabulary is split over the tensor axis, so it must be even.
  assert config.vocab_size % sizes[2] == 0
  mesh = partitioning.make_mesh(*sizes)
  base = jax.device_put(base, partitioning.shardings(base, mesh))
  assert run((config, base), tok, grid, mesh=mesh) == told


def test_adapters_beside_the_base_change_answers(noisy, tok, grid, told):
  config, base = noisy
  config = dataclasses.replace(
    config,
    lora=sampling.model.LoraConfig(4, 8.0, 0.1, sampling.model.TARGETS),
  )
  zero = sampling.model.init_lora(config, jax.random.key(0))
  # A fresh adapter has B = 0, which gives the base.
  assert run((config, base), tok, grid, lora=zero) == told
  moved = jax.tree.map(lambda x: x + 0.05, zero)
  assert run((config, base), tok, grid, lora=moved) != told


def test_a_policy_of_the_same_shape_is_not_compiled_again(noisy, tok, grid):
  config, base = noisy
  run(noisy, tok, grid)
  before = decoding.prefill._cache_size(), decoding.decode._cache_size()
  other = jax.tree.map(lambda x: x * 1.1, base)
  run((config, other), tok, grid, engine(seed=4))
  after = decoding.prefill._cache_size(), decoding.decode._cache_size()
  assert after == before


# Plans and refusals.


def test_plan_groups_rows_of_a_prompt_and_puts_long_prompts_first():
  def request(length, sample_id):
    return sampling.Request((5,) * length, 0, sample_id, 1.0, 0, 1.0, 4)

  requests = [request(3, 0), request(17, 0), request(3, 1), request(4, 0)]
  batches = sampling.plan(
    requests,
    engine(batch_size=4, length_multiple=16),
    vocab_size=9,
    shards=1,
  )
  assert [(b.padded, b.slots) for b in batches] == [
    (32, ((1,),)),
    (16, ((0, 2), (3,))),
  ]
  # Two prompt slots do not split over four shards: the prompt is read twice.
  batches = sampling.plan(
    requests,
    engine(batch_size=4, length_multiple=16),
    vocab_size=9,
    shards=4,
  )
  assert [(b.padded, b.slots) for b in batches] == [
    (32, ((1,),)),
    (16, ((0,), (2,), (3,))),
  ]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"temperature": -0.1}, "temperature=-0.1 must be finite"),
    ({"temperature": math.nan}, "temperature=nan must be finite"),
    ({"temperature": math.inf}, "temperature=inf must be finite"),
    ({"temperature": 1e-9}, "use 0 for greedy"),
    ({"top_k": -1}, "top_k=-1 must be at least 0"),
    ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
    ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
    ({"top_p": math.nan}, r"top_p=nan must be in \(0, 1\]"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"prompt": ()}, "at least one token"),
    ({"stream": 2**32}, "stream=4294967296"),
  ],
)
def test_refuses_parameters(changes, message):
  fields = {
    "prompt": (5,),
    "stream": 0,
    "sample_id": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "max_new_tokens": 4,
  }
  with pytest.raises(ValueError, match=message):
    sampling.Request(**(fields | changes))


def test_refuses_what_does_not_fit(noisy, tok):
  config, base = noisy
  long = [sampling.Request((5,) * 240, 0, 0, 1.0, 0, 1.0, 24)]
  with pytest.raises(ValueError, match=r"240 prompt tokens .* 256 positions"):
    run(noisy, tok, long)
  short = requests_for(tok)
  with pytest.raises(ValueError, match="max_new_tokens=24 of a request"):
    run(noisy, tok, short, engine(max_new_tokens=8))
  with pytest.raises(ValueError, match="batch_size=6 must be a multiple"):
    run(
      noisy, tok, short, engine(batch_size=6), partitioning.make_mesh(8, 1, 1)
    )
  with pytest.raises(ValueError, match="do not belong together"):
    run(
      (dataclasses.replace(config, vocab_size=20), base), tok, requests_for(tok)
    )
