"""Which attention runs: by its name, refused early where it cannot run."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from dpo_jax.core import sharding
from dpo_jax.model import attention
from dpo_jax.model.attention import decode
from dpo_jax.training import setup, train


def device(platform="gpu", kind="NVIDIA H100", capability="9.0"):
  return types.SimpleNamespace(
    platform=platform, device_kind=kind, compute_capability=capability
  )


FITS = {"device": device(), "dtype": "bfloat16", "head_dim": 80}
FITS["row_length"] = 1024


@pytest.mark.parametrize(
  ("name", "changed", "words"),
  [
    ("cudnn", {"device": device("cpu", "cpu")}, "cpu.*attention=dense"),
    ("cudnn", {"device": device("tpu", "TPU v5e")}, "TPU v5e.*attention=dense"),
    ("cudnn", {"dtype": "float32"}, "='float32'; set model.dtype=bfloat16 or"),
    ("cudnn", {"head_dim": 84}, "multiples of 8.*has 84"),
    ("cudnn", {"head_dim": 264}, "up to 256.*has 264"),
    (
      "cudnn",
      {"head_dim": 136, "device": device(capability="8.0")},
      "up to 128.*has 136",
    ),
    ("cudnn", {"row_length": 1023}, "even data.row_length, not 1023"),
    ("flash", {"device": device("cpu", "cpu")}, "cpu.*attention=dense"),
    ("flash", {"device": device(kind="AMD Instinct")}, "AMD.*attention=dense"),
    ("flash", {"head_dim": 320}, "up to 256.*has 320.*attention=dense"),
  ],
)
def test_what_the_devices_cannot_run_is_refused(name, changed, words):
  attention.check(name, **FITS)
  attention.check("flash", **FITS | {"device": device("tpu", "TPU v5 lite")})
  attention.check("dense", **FITS | changed)
  attention.check("flash_interpreted", **FITS | changed)
  with pytest.raises(ValueError, match=words):
    attention.check(name, **FITS | changed)


def test_a_run_is_refused_before_it_compiles(tmp_path, monkeypatch):
  files = running.make_files(tmp_path)
  config = running.configs(files)(**{"model.attention": "cudnn"})
  monkeypatch.setattr(setup, "jit_steps", pytest.fail)
  with pytest.raises(ValueError, match=r"cudnn.*cpu.*attention=dense"):
    train.run(config, tmp_path / "run")


def test_cudnn_gets_the_mask_and_head_dim_80(monkeypatch):
  """Lowered for CUDA from here; it cannot run here."""
  from jax._src.cudnn import fused_attention_stablehlo

  # Which cuDNN is installed is asked while tracing: here there is none.
  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91002
  )
  rows, length, heads, dim = 2, 256, 4, 80
  q = jax.ShapeDtypeStruct((rows, length, heads, dim), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((rows, heads, length, dim), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

  def loss(q, k, v, *ids):
    attend = attention.bind("cudnn", attention.Segments(*ids))
    return jnp.sum(attend(q, k, v).astype(jnp.float32))

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, ids, ids)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  for way in ("Forward", "Backward"):
    (call,) = (
      line
      for line in text.splitlines()
      if "__cudnn$fmhaScaleBias" in line
      and (way == "Backward") == ("Backward" in line)
    )
    # Queries without padding of the head dim, and the mask as a bias.
    assert f"tensor<{rows}x{length}x{heads}x{dim}xbf16>" in call
    assert f"tensor<{rows}x1x{length}x{length}xbf16>" in call


def cached(k, v, unstacked=True):
  """Keys and values [B, N, S, H] as a layer of the cache stores them."""
  if unstacked:
    return jnp.swapaxes(k, 2, 3), v
  rows, _, slots, _ = k.shape
  return [jnp.swapaxes(x, 1, 2).reshape(rows, slots, -1) for x in (k, v)]


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_a_rows_bits_do_not_depend_on_its_place_or_its_neighbours(rows):
  """Of attention to a cache, by products and by sums."""
  shape = (rows, 4, 96, 32)
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (rows, 1, 4, 32))
  k, v = (jax.random.normal(key, shape) for key in keys[1:3])
  seen = jnp.arange(rows) * 7 % 96
  mask = (jnp.arange(96)[None] <= seen[:, None])[:, None]
  attend = jax.jit(lambda q, k, v, mask: decode.bind(mask)(q, *cached(k, v)))
  found = attend(q, k, v, mask)
  np.testing.assert_allclose(
    found, attention.dense(q, k, v, mask), atol=1e-6, rtol=0
  )
  order = jax.random.permutation(keys[3], rows)
  moved = attend(q[order], k[order], v[order], mask[order])
  np.testing.assert_array_equal(moved, found[order])
  # Row 0 beside others than before.
  others = attend(*(x.at[1:].set(jnp.flip(x[1:], 0)) for x in (q, k, v, mask)))
  np.testing.assert_array_equal(others[0], found[0])


# XLA for CPUs does not run the folded products of bfloat16.
@pytest.mark.parametrize(
  ("unstacked", "dtype"),
  [(True, "float32"), (True, "bfloat16"), (False, "float32")],
)
def test_rows_that_share_prompts_see_what_rows_with_their_own_do(
  unstacked, dtype
):
  """Twenty rows of five prompts, some places empty, rows in any order."""
  keys = iter(jax.random.split(jax.random.key(0), 8))
  rows, prompts, places, heads, dim = 20, 8, 6, 2, 16
  # Prompts 2, 5 and 7 are not there; a prompt may have up to six rows.
  there = jnp.array([0, 1, 3, 4, 6])
  prompt = there[jnp.arange(rows) % 5]
  place = prompt * places + (jnp.arange(rows) // 5 + prompt) % places
  place = jax.random.permutation(next(keys), place)
  members = jnp.full((prompts * places,), 3).at[place].set(jnp.arange(rows))
  length = jnp.zeros((prompts,), int).at[there].set(jnp.array([9, 1, 4, 7, 8]))
  count = jnp.arange(rows) % 6 + 1

  def draw(*shape):
    # Large, so that a peak of the wrong row would overflow.
    return (4 * jax.random.normal(next(keys), shape)).astype(dtype)

  q = draw(rows, 1, heads, dim)
  read = [draw(prompts, heads, 9, dim) for _ in range(2)]
  own = [draw(rows, heads, 6, dim) for _ in range(2)]
  seen = jnp.arange(6)[None] < count[:, None]
  of_prompt = jnp.arange(9)[None] < length[:, None]
  wanted = attention.dense(
    q,
    *(
      jnp.concatenate([whole[place // places], mine], axis=2)
      for whole, mine in zip(read, own, strict=True)
    ),
    jnp.concatenate([of_prompt[place // places], seen], axis=1)[:, None],
  )

  sharing = decode.Sharing(
    mask=seen[:, None],
    prompt_mask=of_prompt[:, None],
    prefix_to_rows=members.reshape(prompts, places),
    row_to_prefix=place,
  )
  parts = [cached(*both, unstacked) for both in (own, read)]
  k, v = (decode.Parts(*both) for both in zip(*parts, strict=True))
  found = decode.bind(sharing)(q, k, v)
  assert found.dtype == dtype
  assert found.shape == q.shape
  tolerance = 1e-4 if dtype == "float32" else 0.3
  np.testing.assert_allclose(
    found.astype(jnp.float32),
    wanted.astype(jnp.float32),
    atol=tolerance,
    rtol=0,
  )
  # Rows of another shard, at prompts of their own, and heads on two devices.
  mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), sharing)
  moved = [jax.tree.map(lambda x: -x, one) for one in (k, v)]
  pairs = [
    jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other)
    for one, other in zip((k, v), moved, strict=True)
  ]
  with jax.set_mesh(mesh):
    both = jax.jit(lambda q, k, v, sharing: decode.bind(sharing)(q, k, v))(
      jnp.concatenate([q, q]), *pairs, twice
    )
  first, second = jnp.split(both, 2)
  np.testing.assert_allclose(first, found, atol=tolerance)
  np.testing.assert_allclose(
    second,
    decode.bind(sharing)(q, *moved),
    atol=tolerance,
  )
  assert not np.allclose(first, second, atol=1)
