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
from dpo_jax.model import hf, kv_cache, lora
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
  # The weights do not make every response a repetition of one token.
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


# Where a response ends.


def one_response(tok, chain, chunk=8):
  policy = scripted.scripted(tok, [chain])
  request = sampler.Request((chain[0],), 0, 0, 0.0, 0, 1.0, 24)
  (sample,) = run(policy, tok, [request], engine(chunk=chunk))
  return sample


def test_stops_at_eos(tok):
  a, b, c = (tok.encode(text)[0] for text in "?ab")
  sample = one_response(tok, [a, b, c, tok.eos_id])
  assert sample == sampler.Sample((b, c, tok.eos_id), "ab", "eos")


def test_an_empty_response_is_a_response(tok):
  sample = one_response(tok, [tok.encode("?")[0], tok.eos_id])
  assert sample == sampler.Sample((tok.eos_id,), "", "eos")


def test_each_response_stops_at_its_own_length(tok):
  a, b = (tok.encode(text)[0] for text in "?a")
  requests = [
    sampler.Request((a,), row, 0, 0.0, 0, 1.0, limit)
    for row, limit in enumerate((5, 9))
  ]
  samples = run(scripted.scripted(tok, [[a, b]]), tok, requests, engine())
  assert samples == [
    sampler.Sample((b,) * count, "a" * count, "length") for count in (5, 9)
  ]


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_stops_at_a_human_turn_in_any_tokenisation(tok, chunk):
  vocabulary = tok.backend.get_vocab()
  double, human, colon = (vocabulary[piece] for piece in ("ĊĊ", "Human", ":"))
  letters = [vocabulary[letter] for letter in "Human"]
  start, first, after = (vocabulary[piece] for piece in "?!Z")
  for turn in ([double, human, colon], [double, *letters, colon]):
    assert tok.decode(turn) == "\n\nHuman:"
    sample = one_response(tok, [start, first, *turn, after], chunk=chunk)
    # What was generated behind the turn in the same chunk is not counted.
    assert sample == sampler.Sample((first, *turn), "!", "turn")


def test_a_turn_before_eos_is_a_turn(tok):
  start, first = tok.encode("?")[0], tok.encode("!")[0]
  vocabulary = tok.backend.get_vocab()
  turn = [vocabulary[piece] for piece in ("ĊĊ", "Human", ":")]
  sample = one_response(tok, [start, first, *turn, tok.eos_id])
  assert sample == sampler.Sample((first, *turn), "!", "turn")


# What a response does not depend on.


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
def reference(noisy, tok, grid):
  return run(noisy, tok, grid)


def test_samples_differ_where_their_keys_do(tok, grid, reference):
  drawn = {
    (r.prompt, r.sample_id): s.tokens[:11]
    for r, s in zip(grid, reference)
    if r.temperature == 1.3
  }
  assert len(set(drawn.values())) == len(drawn) == 2 * len(PROMPTS)


@pytest.mark.parametrize(
  "changes",
  [
    {"batch_size": 24, "length_multiple": 48, "prefill_tokens": 1024},
    {"batch_size": 3, "chunk": 1, "prefill_tokens": 1},
    # A call adds more tokens than a span has slots.
    {"batch_size": 64, "span": 5, "chunk": 12},
  ],
  ids=str,
)
def test_tokens_do_not_depend_on_the_engine(
  noisy, tok, grid, reference, changes
):
  assert run(noisy, tok, grid, engine(**changes)) == reference


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_rows_that_share_prompts_sample_as_rows_with_their_own(
  noisy, tok, grid, monkeypatch, kind
):
  """Responses of uneven lengths; with too few prompt entries rows wait."""
  settings = engine(cache=kind, chunk=4)
  uneven = [
    dataclasses.replace(request, max_new_tokens=1 + 5 * index % 23)
    for index, request in enumerate(grid)
  ]
  # Fewer than two rows of a prompt on average: no prompts are shared.
  alone = [
    sampler.Request((5,) * length, 0, 0, 0.0, 0, 1.0, 1)
    for length in range(1, len(grid))
  ]
  own = run(noisy, tok, [*uneven, *alone], settings)[: len(grid)]
  assert len({len(sample.tokens) for sample in own}) > 9
  assigned = []
  assign = scheduler.PrefixTable.assign

  def watched(self, *arguments):
    assigned.append(assign(self, *arguments))
    return assigned[-1]

  monkeypatch.setattr(scheduler.PrefixTable, "assign", watched)
  monkeypatch.setattr(capacity, "_PROMPT_ENTRIES", 1 / 2)
  shared = run(noisy, tok, uneven, settings)
  assert None in assigned
  # Five prompts of seven rows: most rows join a prompt that is there.
  assert 5 <= sum(one[2] for one in assigned if one) < len(uneven) / 2
  assert shared == own
  # In eight bits, a key may be rounded to the next step.
  atol = 1e-5 if kind == "float32" else 1e-3
  for a, b in zip(shared, own, strict=True):
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
    found = capacity.shapes(
      config, tok, requests, engine(), None, range(len(requests))
    )
    shared = found.program.shared
    assert (shared and shared.rows) == places


@pytest.mark.parametrize("unstacked", [True, False])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_cache_holds_what_was_written(kind, unstacked):
  """Rows at slots of their own; int8 within half a step of each vector."""
  keys = jax.random.split(jax.random.key(0), 2)
  k, v = (jax.random.normal(key, (5, 2, 1, 16)) for key in keys)
  cache = kv_cache.init(3, 5, 2, 6, 16, kind, unstacked)
  index = jnp.array([0, 4, 2, 2, 5])
  layer, number = (cache[1], None) if unstacked else (cache, jnp.int32(1))
  written = kv_cache.write(layer, number, index, k, v)
  keys, values = kv_cache.read(written, number, 6, jnp.float32)
  if unstacked:
    keys, values = (
      jnp.moveaxis(x, axis, 1).reshape(5, 6, 32)
      for x, axis in ((keys, 3), (values, 2))
    )
  for found, wanted in ((keys, k), (values, v)):
    wanted = np.asarray(wanted[:, :, 0]).reshape(5, 32)
    rows = np.asarray(found)[np.arange(5), index]
    step = np.abs(wanted).reshape(5, 2, 16).max(-1).repeat(16, 1) / 127
    limit = step / 2 + 1e-6 if kind == "int8" else np.zeros_like(step)
    assert (np.abs(rows - wanted) <= limit).all()
    # Nothing else was written.
    assert np.count_nonzero(np.abs(found).sum(-1)) == 5
  if unstacked:
    longer = kv_cache.resize(written, 9)
    assert longer["k"].shape == (5, 2, 16, 9)
    jax.tree.map(
      np.testing.assert_array_equal, kv_cache.resize(longer, 6), written
    )
  else:
    assert not any(leaf[::2].any() for leaf in written.values())
    for one in kv_cache.read(written, number, 3, jnp.float32):
      assert one.shape == (5, 3, 32)


def tpus(**axes):
  """A mesh of devices that are described only."""
  sizes = [axes.get(name, 1) for name in ("data", "fsdp", "tensor")]
  device = types.SimpleNamespace(platform="tpu")
  devices = np.full(sizes, device, object)
  return types.SimpleNamespace(devices=devices, shape=axes)


def test_the_cache_is_unstacked_on_cpus_only():
  assert capacity.platform(None) == "cpu"
  assert capacity.platform(sharding.make_mesh(8, 1, 1)) == "cpu"
  assert capacity.platform(tpus(data=2)) == "tpu"


@pytest.mark.parametrize(
  ("kind", "size"),
  [("float32", (2, 2, 2)), ("int8", None)],
  ids=str,
)
def test_both_layouts_of_the_cache_sample_alike(
  noisy, tok, grid, monkeypatch, kind, size
):
  """The folded one of accelerators too, whole and by spans, with its copies."""
  config, base = noisy
  mesh = None
  if size is not None:
    mesh = sharding.make_mesh(*size)
    base = jax.device_put(base, sharding.shardings(base, mesh))
  how = engine(cache=kind, span=32)
  requests = grid[:9] if kind == "int8" else grid
  unstacked = run((config, base), tok, requests, how, mesh=mesh)
  monkeypatch.setattr(capacity, "platform", lambda mesh: "tpu")
  folded = run((config, base), tok, requests, how, mesh=mesh)
  assert folded == unstacked
  for a, b in zip(folded, unstacked, strict=True):
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


@pytest.mark.parametrize("places", [0, 4])
def test_a_step_copies_no_cache(noisy, tok, places):
  """Keys and values are written in place, and read in place."""
  config, base = noisy
  together = decode.SharedPrompts(12, places, 72) if places else None
  program = decode.Program(
    config=config,
    slots=96,
    max_new_tokens=8,
    eos_id=tok.eos_id,
    vocab_size=tok.vocab_size,
    paths=draw.Paths(64, False, False),
    cache="float32",
    unstacked=True,
    shared=together,
  )
  state = jax.eval_shape(lambda: decode.empty(program, 32, 96, 72))
  number = jax.ShapeDtypeStruct((), jnp.int32)
  table = jax.ShapeDtypeStruct((tok.vocab_size, stop.TURN + 1), jnp.int8)
  weights = jax.eval_shape(decode.unstack, base, None)
  prefixes = None
  if together is not None:
    prefixes = scheduler.PrefixTable(together, 32).arrays()
  arguments = (*weights, state, table, number, number, prefixes)
  compiled = decode.advance.lower(program, (96, 72), *arguments).compile()
  text = compiled.as_text()
  # Rows or prompts, slots and head dimensions in either order, as a result.
  shapes = [r"32,HEADS,(96,DIM|DIM,96)"]
  shapes += [r"12,HEADS,(72,DIM|DIM,72)"] * bool(places)
  shapes = [
    one.replace("HEADS", str(config.heads)).replace("DIM", str(config.head_dim))
    for one in shapes
  ]
  wholes = [rf"= f32\[{shape}\]\S* " for shape in shapes]
  for whole in wholes:
    assert len(re.findall(whole + "parameter", text)) >= 4
    assert not re.findall(whole + "(copy|select|slice)", text)
  # No product is computed with the sum over values that it reads.
  for body in re.findall(r"^%fused_computation\S* .*?^}", text, re.M | re.S):
    if re.search(r" dot\(", body):
      assert not any(re.search(whole, body) for whole in wholes)
      assert " erf(" not in body or body.count(" dot(") == 1


def test_tokens_do_not_depend_on_order_or_neighbours(
  noisy, tok, grid, reference
):
  assert run(noisy, tok, grid[::-1]) == reference[::-1]
  some = [1, 4, 17, 30]
  alone = run(noisy, tok, [grid[index] for index in some])
  assert alone == [reference[index] for index in some]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_tokens_do_not_depend_on_the_mesh(noisy, tok, grid, reference, sizes):
  config, base = noisy
  # The vocabulary is split over the tensor axis, so it must be even.
  assert config.vocab_size % sizes[2] == 0
  mesh = sharding.make_mesh(*sizes)
  base = jax.device_put(base, sharding.shardings(base, mesh))
  assert run((config, base), tok, grid, mesh=mesh) == reference


def test_adapters_beside_the_base_change_responses(noisy, tok, grid, reference):
  config, base = noisy
  config = dataclasses.replace(
    config,
    lora=sampler.gpt_neox.LoraConfig(4, 8.0, 0.1, sampler.gpt_neox.TARGETS),
  )
  zero = sampler.gpt_neox.init_lora(config, jax.random.key(0))
  # A fresh adapter has B = 0, which gives the base.
  assert run((config, base), tok, grid, adapters=zero) == reference
  moved = jax.tree.map(lambda x: x + 0.05, zero)
  assert run((config, base), tok, grid, adapters=moved) != reference


def test_a_stack_samples_as_its_adapters_do_one_by_one(
  noisy, tok, grid, reference
):
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
  assert together[1::3] == reference
  for at, adapter in ((0, 2), (2, 0)):
    alone = run((config, base), tok, grid, adapters=own[adapter])
    assert together[at::3] == alone != reference


def test_log_probs_equal_scoring_the_response_afterwards(noisy, tok, tmp_path):
  """A file of responses, scored as a user would: python -m dpo_jax score."""
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
    # Behind a response that reached its length score adds EOS.
    found = row["chosen_token_logps"][: len(logps)]
    np.testing.assert_allclose(logps, found, atol=1e-4)


def test_the_cache_may_be_smaller(noisy, tok, grid, reference):
  """int8 and bfloat16 keys and values give nearly the same log-probs."""
  greedy = [at for at, request in enumerate(grid) if not request.temperature]
  whole = [reference[at] for at in greedy]
  requests = [grid[at] for at in greedy]
  for kind, tolerance in (("bfloat16", 0.05), ("int8", 0.1)):
    small = run(noisy, tok, requests, engine(cache=kind))
    for a, b in zip(whole, small, strict=True):
      assert a.logps[0] == pytest.approx(b.logps[0], abs=tolerance)
    same = sum(a.tokens[:4] == b.tokens[:4] for a, b in zip(whole, small))
    assert same >= 0.8 * len(greedy)


def test_logs_the_slots_and_their_reason(noisy, tok, capsys):
  capacity._say_once.cache_clear()
  requests = requests_for(tok, temperatures=(0.0,), max_new_tokens=2)
  for settings in (engine(), engine(batch_size=0), engine(batch_size=0)):
    run(noisy, tok, requests, settings)
  # 2 layers, 2 heads, 16 dimensions of k and v, 64 slots: 32 KiB a row.
  rest = "up to 64 tokens each: 0.000244 GiB of cache in float32"
  lines = capsys.readouterr().err.splitlines()
  lines = [line.split("; ")[0] for line in lines if "at once" in line]
  assert lines == [
    f"8 responses at once (as batch_size says), {rest}",
    f"8 responses at once (5 are wanted), {rest}",
  ]


def test_slots_fit_the_memory(noisy, tok):
  """Two of k and v, 2 layers, 2 heads, 16 dimensions: 512 B a slot."""
  config, _ = noisy
  requests = [
    sampler.Request((5,) * 60, at, 0, 0.0, 0, 1.0, 4) for at in range(2000)
  ]
  requests = [
    dataclasses.replace(one, prompt=(*one.prompt[1:], at))
    for at, one in enumerate(requests)
  ]
  row = 512 * 64 / 2**30

  def rows(gib, mesh=None, many=requests):
    settings = engine(batch_size=0, cache_gib=gib)
    return capacity.shapes(config, tok, many, settings, mesh, []).size

  assert rows(9 * row) == 8
  assert rows(3 * row) == 3
  assert rows(1e3 * row) == 512
  assert rows(1e3 * row, many=requests[:20]) == 24
  # On each of two shards; of one of two heads a device.
  assert rows(9 * row, sharding.make_mesh(2, 1, 1, jax.devices()[:2])) == 16
  assert rows(9 * row, sharding.make_mesh(1, 1, 2, jax.devices()[:2])) == 16
  with pytest.raises(ValueError, match="raise cache_gib"):
    rows(row * 63 / 64)


def test_a_policy_of_the_same_shape_is_not_compiled_again(noisy, tok, grid):
  config, base = noisy
  run(noisy, tok, grid)
  before = decode.prefill._cache_size(), decode.advance._cache_size()
  other = jax.tree.map(lambda x: x * 1.1, base)
  run((config, other), tok, grid, engine(seed=4))
  after = decode.prefill._cache_size(), decode.advance._cache_size()
  assert after == before


# Plans and refusals.


def test_plan_groups_rows_of_a_prompt_and_puts_long_prompts_first():
  def request(length, sample_id, adapter=-1):
    return sampler.Request((5,) * length, 0, sample_id, 1.0, 0, 1.0, 4, adapter)

  requests = [request(3, 0), request(17, 0), request(3, 1), request(4, 0)]
  requests += [request(3, 0, adapter=2), request(4, 9), request(16, 3)]
  how = engine(length_multiple=16, prefill_tokens=48)
  everything = range(len(requests))
  plans = capacity.prefill_batches(requests, how, 1, everything)
  assert [(r.padded, r.size, r.groups) for r in plans] == [
    (32, 1, ((1,),)),
    (16, 3, ((0, 2), (3, 5), (4,))),
    (16, 3, ((6,),)),
  ]
  # What is left has the shapes of the whole.
  plans = capacity.prefill_batches(requests, how, 1, [6, 2])
  assert [(r.padded, r.size, r.groups) for r in plans] == [
    (16, 3, ((2,), (6,))),
  ]
  # On two shards an even number of prompts is read.
  plans = capacity.prefill_batches(requests, how, 2, everything)
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
