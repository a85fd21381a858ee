"""The sampler against transformers, NumPy's distributions, and itself moved."""

import dataclasses
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import scripted
import tiny
import torch
import transformers

from dpo_jax.core import sharding
from dpo_jax.data import sources, tokenizer
from dpo_jax.model import attention, hf, kv_cache, lora
from dpo_jax.sampling import capacity, decode, draw, sampler, scheduler, stop
from dpo_jax.training import score

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
    "length_multiple": 64,
    "prefill_tokens": 256,
    "chunk": 8,
    "span": 0,
    "cache": "float32",
    "cache_gib": 0.5,
    "seed": 3,
  }
  return sampler.Engine(**(fields | changes))


def requests_for(tok, texts=PROMPTS, temperatures=(0.0, 1.0), **changes):
  fields = {"sample_id": 0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}
  return [
    sampler.Request(
      prompt=tuple(tok.encode(text)),
      stream=sampler.stream(text),
      temperature=temperature,
      **(fields | changes),
    )
    for text in texts
    for temperature in temperatures
  ]


def run(policy, tok, requests, how=None, mesh=None, adapters=None):
  """Samples in the order of the requests."""
  config, base = policy
  out = {}
  for batch in sampler.generate(
    config, base, adapters, tok, requests, how or engine(), mesh
  ):
    out.update(batch)
  assert sorted(out) == list(range(len(requests)))
  return [out[index] for index in range(len(requests))]


# Against transformers.


def network_and_policy(directory, **shape):
  """A network of transformers, and the same as (config, base)."""
  network = transformers.GPTNeoXForCausalLM(
    transformers.GPTNeoXConfig(**shape)
  ).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in network.parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if weight.ndim == 1:
        weight.add_(0.3 * noise)
      else:
        weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)
  network.save_pretrained(directory)
  policy = hf.load(
    directory, dtype="float32", remat="none", lora=None, param_dtype="float32"
  )
  return network, policy


def greedy(network, tok, prompt, new):
  """New tokens of transformers' generate."""
  ids = torch.tensor([prompt])

  # Its own suppress_tokens looks each id up in a list at every step.
  def existing(_, scores):
    scores[:, tok.vocab_size :] = -math.inf
    return scores

  return network.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=new,
    do_sample=False,
    eos_token_id=tok.eos_id,
    pad_token_id=tok.pad_id,
    logits_processor=[existing],
  )[0, ids.shape[1] :].tolist()


def test_greedy_equals_transformers_generate(tok, tmp_path):
  """Deeper and wider than other tests' models."""
  network, policy = network_and_policy(
    tmp_path,
    vocab_size=tok.vocab_size + 5,
    hidden_size=96,
    num_hidden_layers=12,
    num_attention_heads=6,
    intermediate_size=160,
    max_position_embeddings=256,
  )
  requests = requests_for(tok, temperatures=(0.0,))
  samples = run(policy, tok, requests)
  lengths = set()
  for request, sample in zip(requests, samples, strict=True):
    expected = greedy(network, tok, request.prompt, 24)
    assert list(sample.tokens) == expected
    lengths.add(len(set(expected)))
  # The weights do not make every answer a repetition of one token.
  assert max(lengths) > 5


@pytest.mark.slow
def test_greedy_equals_generate_on_real_prompts(shared, tmp_path):
  """Pythia-14m's shape, tokenizer and phantom rows; prompts of HH."""
  tok = tokenizer.load(shared / "tokenizer" / "pythia")
  network, policy = network_and_policy(
    tmp_path,
    vocab_size=50304,
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=512,
    max_position_embeddings=2048,
  )
  (path,) = (shared / "data").rglob("harmless-base/test.jsonl.gz")
  texts = [row.prompt for row in sources.read_file(str(path)).rows[:12]]
  requests = requests_for(tok, texts, (0.0,), max_new_tokens=48)
  samples = run(policy, tok, requests, engine(prefill_tokens=1024, span=128))
  for request, sample in zip(requests, samples, strict=True):
    expected = greedy(network, tok, request.prompt, 48)
    assert list(sample.tokens) == expected[: len(sample.tokens)]
    assert len(sample.tokens) == 48 or sample.finish_reason != "length"
  assert max(len(set(sample.tokens)) for sample in samples) > 20


# Distributions.


def test_first_token_of_the_engine_follows_softmax(noisy, tok):
  config, base = noisy
  temperature, count = 0.8, 2048
  (prompt,) = requests_for(tok, PROMPTS[1:2], (temperature,), max_new_tokens=1)
  requests = [
    dataclasses.replace(prompt, sample_id=index) for index in range(count)
  ]
  how = engine(batch_size=512)
  tokens = [s.tokens[0] for s in run(noisy, tok, requests, how)]
  ids = jnp.asarray([prompt.prompt])
  length = ids.shape[1]
  hidden, _ = sampler.gpt_neox.apply(
    config,
    base,
    None,
    ids,
    jnp.arange(length)[None],
    jnp.tril(jnp.ones((length, length), bool))[None],
  )
  logits = np.asarray(sampler.gpt_neox.unembed(base, hidden[0, -1]), np.float64)
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
  request = sampler.Request((chain[0],), 0, 0, 0.0, 0, 1.0, limit)
  (sample,) = run(policy, tok, [request], engine(chunk=chunk))
  return sample


def test_stops_at_eos(tok):
  a, b, c = (tok.encode(text)[0] for text in "?ab")
  sample = one_answer(tok, [a, b, c, tok.eos_id])
  assert sample == sampler.Sample((b, c, tok.eos_id), "ab", "eos")


def test_an_empty_answer_is_an_answer(tok):
  sample = one_answer(tok, [tok.encode("?")[0], tok.eos_id])
  assert sample == sampler.Sample((tok.eos_id,), "", "eos")


def test_stops_at_its_length(tok):
  a, b = (tok.encode(text)[0] for text in "?a")
  sample = one_answer(tok, [a, b], limit=5)
  assert sample == sampler.Sample((b,) * 5, "aaaaa", "length")


def test_each_response_stops_at_its_own_length(tok):
  a, b = (tok.encode(text)[0] for text in "?a")
  requests = [
    sampler.Request((a,), row, 0, 0.0, 0, 1.0, limit)
    for row, limit in enumerate((5, 9))
  ]
  samples = run(scripted.scripted(tok, [[a, b]]), tok, requests, engine())
  assert [sample.tokens for sample in samples] == [(b,) * 5, (b,) * 9]


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
    assert sample == sampler.Sample((first, *turn), "!", "turn")


def test_a_turn_before_eos_is_a_turn(tok):
  start, first = tok.encode("?")[0], tok.encode("!")[0]
  vocabulary = tok.backend.get_vocab()
  turn = [vocabulary[piece] for piece in ("ĊĊ", "Human", ":")]
  sample = one_answer(tok, [start, first, *turn, tok.eos_id])
  assert sample == sampler.Sample((first, *turn), "!", "turn")


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
    {"batch_size": 24, "length_multiple": 48, "prefill_tokens": 1024},
    {"batch_size": 3, "chunk": 1, "prefill_tokens": 1},
    {"batch_size": 64, "span": 32},
  ],
  ids=str,
)
def test_tokens_do_not_depend_on_the_engine(noisy, tok, grid, told, changes):
  assert run(noisy, tok, grid, engine(**changes)) == told


@pytest.mark.parametrize("layout", ["stacked", "folded"])
def test_layers_apart_are_layers_of_a_stack(
  noisy, tok, grid, told, monkeypatch, layout
):
  """What is done on a CPU, and what elsewhere; int8 has scales beside."""
  small = run(noisy, tok, grid[:9], engine(cache="int8", span=32))
  monkeypatch.setattr(capacity, "_cache_layout", lambda *_: layout)
  for ours, how, requests in (
    (told, engine(), grid),
    (small, engine(cache="int8", span=32), grid[:9]),
  ):
    stacked = run(noisy, tok, requests, how)
    assert stacked == ours
    for a, b in zip(stacked, ours, strict=True):
      np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


@pytest.mark.parametrize(
  ("layout", "kind"),
  [("apart", "float32"), ("stacked", "float32"), ("folded", "int8")],
)
def test_rows_that_share_prompts_answer_as_rows_with_their_own(
  noisy, tok, grid, monkeypatch, layout, kind
):
  """Answers of uneven lengths; with one place for prompts rows wait."""
  monkeypatch.setattr(capacity, "_cache_layout", lambda *_: layout)
  how = engine(cache=kind, chunk=4)
  uneven = [
    dataclasses.replace(request, max_new_tokens=1 + 5 * index % 23)
    for index, request in enumerate(grid)
  ]
  places = capacity._places
  monkeypatch.setattr(capacity, "_places", lambda _: (0, 5))
  own = run(noisy, tok, uneven, how)
  assert len({len(sample.tokens) for sample in own}) > 9
  seated = []
  take = scheduler.Seating.take

  def watched(self, *arguments):
    seated.append(take(self, *arguments))
    return seated[-1]

  monkeypatch.setattr(scheduler.Seating, "take", watched)
  monkeypatch.setattr(capacity, "_places", places)
  monkeypatch.setattr(capacity, "_PROMPTS", 1 / 2)
  told = run(noisy, tok, uneven, how)
  # Five prompts of seven rows: more rows sit down than prompts are laid.
  assert 5 <= sum(new for *_, new in seated) < len(uneven) / 2
  assert (-1, -1, False) in seated
  assert told == own
  # In eight bits, a key may be rounded to the next step.
  atol = 1e-5 if kind == "float32" else 1e-3
  for a, b in zip(told, own, strict=True):
    np.testing.assert_allclose(a.logps, b.logps, atol=atol)


def test_prompts_are_shared_where_most_are_asked_for_again(noisy, tok):
  """Not for the sake of one that is there twice."""
  config, _ = noisy
  for temperatures, doubled, places in (
    ((1.0,), 1, None),
    ((1.0,), 5, 2),
    ((0.5, 1.0), 0, 2),
    ((0.5, 1.0), 5, 3),
  ):
    requests = requests_for(tok, temperatures=temperatures)
    requests += requests_for(tok, PROMPTS[:doubled], (1.0,), sample_id=1)
    found = capacity.layout(
      config, tok, requests, engine(), None, range(len(requests))
    )
    shared = found.program.shared
    assert (shared and shared.places) == places


def test_layers_are_apart_on_one_device_only(noisy):
  """Over several of a CPU, their collectives could wait for each other."""
  config, _ = noisy
  one, eight = (
    sharding.make_mesh(n, 1, 1, devices=jax.devices()[:n]) for n in (1, 8)
  )
  found = [capacity._cache_layout(config, mesh) for mesh in (None, one, eight)]
  assert found == ["apart", "apart", "stacked"]


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("rows", [6, 24])
def test_a_layers_own_cache_holds_and_sees_what_the_stack_does(kind, rows):
  """Keys as columns, by few rows' products and by many rows' sums."""
  keys = iter(jax.random.split(jax.random.key(0), 5))
  shape = (rows, 2, 3, 16)
  old = [jax.random.normal(next(keys), shape) for _ in range(2)]
  new = [jax.random.normal(next(keys), (rows, 2, 1, 16)) for _ in range(2)]
  q = jax.random.normal(next(keys), (rows, 1, 2, 16))
  index = jnp.arange(rows) % 5
  mask = (jnp.arange(5)[None] <= index[:, None])[:, None]
  stack = kv_cache.init(1, rows, 2, 6, 16, kind)
  (own,) = kv_cache.unstack(stack)
  _, _, stack = kv_cache.remember(stack, 0, 0, *old, span=6)
  _, _, own = kv_cache.remember(own, None, 0, *old, span=6)
  *seen, stack = kv_cache.remember(stack, 0, index, *new, span=5)
  *columns, own = kv_cache.remember(own, None, index, *new, span=5)
  assert own["k"].shape == (rows, 2, 16, 6)
  (split,) = kv_cache.unstack(stack)
  jax.tree.map(np.testing.assert_array_equal, own, split)
  # Row 4 wrote at 4, which nobody had.
  assert own["v"][4, :, 4].any()
  assert not own["v"][0, :, 4].any()
  np.testing.assert_allclose(
    attention.dense(q, *columns, mask),
    attention.dense(q, *seen, mask),
    atol=1e-6,
  )
  longer = kv_cache.resize(own, 9)
  assert longer["k"].shape == (rows, 2, 16, 9)
  jax.tree.map(np.testing.assert_array_equal, kv_cache.resize(longer, 6), own)


def tpus(**axes):
  """A mesh of TPUs as far as the choice of shapes looks at one."""
  sizes = {"data": 1, "fsdp": 1, "tensor": 1} | axes
  device = types.SimpleNamespace(platform="tpu")
  count = math.prod(sizes.values())
  return types.SimpleNamespace(
    shape=sizes, size=count, devices=np.array([device] * count)
  )


def test_a_cache_that_a_tpu_would_pad_is_folded_or_counted(noisy):
  """Head dim 16 is padded to 128; two layers, two heads, k and v in float32."""
  config, _ = noisy
  assert capacity._cache_layout(config, tpus(data=2)) == "folded"
  assert capacity._cache_layout(config, tpus(tensor=2)) == "stacked"
  how = engine(batch_size=0, cache_gib=24 * 512 * 64 / 2**30)
  assert capacity.batch_size(config, how, 64, tpus()) == 24
  # Of one head a device: 256 B a slot, and 2048 B of its padded copy.
  how = engine(batch_size=0, cache_gib=8 * 2304 * 64 / 2**30)
  assert capacity.batch_size(config, how, 64, tpus(tensor=2)) == 8
  wide = dataclasses.replace(config, width=256)
  assert capacity._cache_layout(wide, tpus()) == "stacked"


@pytest.mark.parametrize("places", [0, 4])
def test_a_step_copies_no_cache(noisy, tok, places):
  """Keys and values are written in place, and read where they lie."""
  config, base = noisy
  together = decode.Shared(12, places, 72) if places else None
  program = decode.Program(
    config=config,
    slots=96,
    room=8,
    eos_id=tok.eos_id,
    vocab_size=tok.vocab_size,
    ways=draw.Ways(64, False, False),
    cache="float32",
    layout="apart",
    shared=together,
  )
  state = jax.eval_shape(lambda: decode.empty(program, 32, 96, 72))
  number = jax.ShapeDtypeStruct((), jnp.int32)
  table = jax.ShapeDtypeStruct((tok.vocab_size, stop.TURN + 1), jnp.int8)
  apart = jax.eval_shape(decode.apart, base, None)
  seats = None
  if together is not None:
    seats = scheduler.Seating(together, 32).seats(72)
  arguments = (*apart, state, table, number, number, seats)
  compiled = decode.advance.lower(program, 96, *arguments).compile()
  text = compiled.as_text()
  # Rows or prompts, heads, and slots and head dim in either order, as a result.
  shapes = [r"32,2,(96,16|16,96)"] + [r"12,2,(72,16|16,72)"] * bool(places)
  wholes = [rf"= f32\[{shape}\]\S* " for shape in shapes]
  for whole in wholes:
    assert len(re.findall(whole + "parameter", text)) >= 4
    assert not re.findall(whole + "(copy|select|slice)", text)
  # No product is computed with the sum over values that it reads.
  for body in re.findall(r"^%fused_computation\S* .*?^}", text, re.M | re.S):
    if re.search(r" dot\(", body):
      assert not any(re.search(whole, body) for whole in wholes)
      assert " erf(" not in body or body.count(" dot(") == 1


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
  mesh = sharding.make_mesh(*sizes)
  base = jax.device_put(base, sharding.shardings(base, mesh))
  assert run((config, base), tok, grid, mesh=mesh) == told


def test_adapters_beside_the_base_change_answers(noisy, tok, grid, told):
  config, base = noisy
  config = dataclasses.replace(
    config,
    lora=sampler.gpt_neox.LoraConfig(4, 8.0, 0.1, sampler.gpt_neox.TARGETS),
  )
  zero = sampler.gpt_neox.init_lora(config, jax.random.key(0))
  # A fresh adapter has B = 0, which gives the base.
  assert run((config, base), tok, grid, adapters=zero) == told
  moved = jax.tree.map(lambda x: x + 0.05, zero)
  assert run((config, base), tok, grid, adapters=moved) != told


def test_a_stack_answers_as_its_adapters_do_one_by_one(noisy, tok, grid, told):
  """Each row takes its own adapter, and -1 gives exactly the base's tokens."""
  config, base = noisy
  config = dataclasses.replace(
    config,
    lora=sampler.gpt_neox.LoraConfig(4, 8.0, 0.1, sampler.gpt_neox.TARGETS),
  )
  own = [tiny.adapters(config, seed) for seed in (1, 2, 3)]
  stack = lora.stack(config, own)
  mixed = [
    dataclasses.replace(request, adapter=adapter)
    for request in grid
    for adapter in (2, -1, 0)
  ]
  before = decode.advance._cache_size()
  together = run(
    (config, base), tok, mixed, engine(batch_size=16), adapters=stack
  )
  assert decode.advance._cache_size() == before + 1
  assert together[1::3] == told
  for at, adapter in ((0, 2), (2, 0)):
    alone = run((config, base), tok, grid, adapters=own[adapter])
    assert together[at::3] == alone != told


def test_log_probs_equal_scoring_the_answer_afterwards(noisy, tok, tmp_path):
  """A file of answers, scored as a user would: python -m dpo_jax score."""
  config, base = noisy
  hf.export(tmp_path / "model", config, base, tok)
  requests = [
    dataclasses.replace(request, sample_id=index)
    for index in range(40)
    for request in requests_for(tok, temperatures=(1.0,), max_new_tokens=5)
  ]
  texts = [text for _ in range(40) for text in PROMPTS]
  rows, expected = [], []
  for text, sample in zip(texts, run(noisy, tok, requests), strict=True):
    ended = sample.finish_reason == "eos"
    if sample.finish_reason == "turn" or tok.special_in(sample.text):
      continue
    # What a random model spells is seldom how the tokenizer would.
    respelt = (*tok.encode(sample.text), *[tok.eos_id][:ended])
    if not sample.text or respelt != sample.tokens:
      continue
    rows.append({"prompt": text, "chosen": sample.text, "rejected": "other"})
    expected.append(sample.logps)
  assert len(rows) >= 8
  assert len({row["prompt"] for row in rows}) >= 3
  (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  scored = score.run(
    score.parse(
      [
        f"--model={tmp_path / 'model'}",
        f"--pairs={tmp_path / 'pairs.jsonl'}",
        f"--output={tmp_path / 'scored.jsonl'}",
      ]
    )
  )
  for logps, row in zip(expected, scored, strict=True):
    # Behind an answer that reached its length score adds EOS.
    found = row["chosen_token_logps"][: len(logps)]
    np.testing.assert_allclose(logps, found, atol=1e-4)


def test_the_cache_may_be_smaller(noisy, tok):
  """int8 and bfloat16 keys and values give nearly the same log-probs."""
  requests = requests_for(tok, temperatures=(0.0,), max_new_tokens=1)
  whole = run(noisy, tok, requests)
  for kind, tolerance in (("bfloat16", 0.05), ("int8", 0.1)):
    small = run(noisy, tok, requests, engine(cache=kind))
    for a, b in zip(whole, small, strict=True):
      assert a.logps[0] == pytest.approx(b.logps[0], abs=tolerance)
  long = requests_for(tok, temperatures=(0.0,))
  whole, small = (
    run(noisy, tok, long, engine(cache=kind)) for kind in ("float32", "int8")
  )
  assert sum(a.tokens[:4] == b.tokens[:4] for a, b in zip(whole, small)) >= 4


def test_says_how_many_slots_and_why(noisy, tok, capsys):
  capacity._say_once.cache_clear()
  requests = requests_for(tok, temperatures=(0.0,), max_new_tokens=2)
  for how in (engine(), engine(batch_size=0), engine(batch_size=0)):
    run(noisy, tok, requests, how)
  # 2 layers, 2 heads, 16 dimensions of k and v, 64 slots: 32 KiB a row.
  rest = "up to 64 tokens each: 0.000244 GiB of cache in float32"
  lines = capsys.readouterr().err.splitlines()
  lines = [line.split("; ")[0] for line in lines if "at once" in line]
  assert lines == [
    f"8 answers at once (batch_size says so), {rest}",
    f"8 answers at once (5 are asked for), {rest}",
  ]


def test_slots_fit_the_memory(noisy):
  """Two of k and v, 2 layers, 2 heads, 16 dimensions: 512 B a slot."""
  config, _ = noisy
  for gib, rows in ((512 * 64 * 9 / 2**30, 8), (512 * 64 * 3 / 2**30, 3)):
    how = engine(batch_size=0, cache_gib=gib)
    assert capacity.batch_size(config, how, 64, None) == rows
  with pytest.raises(ValueError, match="raise cache_gib"):
    capacity.batch_size(
      config, engine(batch_size=0, cache_gib=512 * 63 / 2**30), 64, None
    )


def test_a_policy_of_the_same_shape_is_not_compiled_again(noisy, tok, grid):
  config, base = noisy
  run(noisy, tok, grid)
  before = decode.read._cache_size(), decode.advance._cache_size()
  other = jax.tree.map(lambda x: x * 1.1, base)
  run((config, other), tok, grid, engine(seed=4))
  after = decode.read._cache_size(), decode.advance._cache_size()
  assert after == before


# Plans and refusals.


def test_plan_groups_rows_of_a_prompt_and_puts_long_prompts_first():
  def request(length, sample_id, adapter=-1):
    return sampler.Request((5,) * length, 0, sample_id, 1.0, 0, 1.0, 4, adapter)

  requests = [request(3, 0), request(17, 0), request(3, 1), request(4, 0)]
  requests += [request(3, 0, adapter=2), request(4, 9), request(16, 3)]
  how = engine(length_multiple=16, prefill_tokens=48)
  everything = range(len(requests))
  plans = capacity.plan(requests, how, 1, everything)
  assert [(r.padded, r.size, r.groups) for r in plans] == [
    (32, 1, ((1,),)),
    (16, 3, ((0, 2), (3, 5), (4,))),
    (16, 3, ((6,),)),
  ]
  # What is left has the shapes of the whole.
  plans = capacity.plan(requests, how, 1, [6, 2])
  assert [(r.padded, r.size, r.groups) for r in plans] == [
    (16, 3, ((2,), (6,))),
  ]
  # On two shards an even number of prompts is read.
  plans = capacity.plan(requests, how, 2, everything)
  assert [(r.padded, r.size) for r in plans] == [(32, 2), (16, 2), (16, 2)]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"temperature": 1e-9}, "temperature=1e-09 must .* or 0 for greedy"),
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
    sampler.Request(**(fields | changes))


def test_refuses_what_does_not_fit(noisy, tok):
  config, base = noisy
  long = [sampler.Request((5,) * 240, 0, 0, 1.0, 0, 1.0, 24)]
  with pytest.raises(ValueError, match=r"240 prompt tokens .* 256 positions"):
    run(noisy, tok, long)
  short = requests_for(tok)
  with pytest.raises(ValueError, match="name adapter 2, but"):
    run(noisy, tok, [dataclasses.replace(short[0], adapter=2)])
  with pytest.raises(ValueError, match="batch_size=6 must be a multiple"):
    run(noisy, tok, short, engine(batch_size=6), sharding.make_mesh(8, 1, 1))
  with pytest.raises(ValueError, match="do not belong together"):
    run(
      (dataclasses.replace(config, vocab_size=20), base), tok, requests_for(tok)
    )
