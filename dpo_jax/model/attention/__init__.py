"""Attention by the name in the config.

Training passes `packing_mask.Segments`, from which an implementation can tell
what is fully masked and skip it. Prefill passes a boolean mask and is always
attended densely; decoding has an attention of its own (`decode`).

Implementations; `check` refuses one that the devices cannot run:
  dense: scores of all T x T in float32. Runs everywhere.
  blocks: `blockwise`, for rows that segments cross; made for CPUs.
  cudnn: the fused kernels of NVIDIA's cuDNN, in bfloat16. The mask is a bias of
    T x T, and masked scores are computed. Has run on no device yet.
  flash: our own kernels (`flash`) for TPUs and NVIDIA GPUs, which skip fully
    masked blocks and hold no array of T x T. Has run on no device yet.
  flash_interpreted: the same kernels, interpreted on any device for tests.

Letters: B rows, T queries, S keys, N heads, H head dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.core import sharding
from dpo_jax.model.attention import blockwise, flash, packing_mask

Segments = packing_mask.Segments

Name = Literal["dense", "blocks", "cudnn", "flash", "flash_interpreted"]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def bind(name: Name, visible: jax.Array | Segments) -> Attend:
  """The attention of one model call, (q, k, v) -> [B, T, N, H] as `v` is.

  Its arguments are queries [B, T, N, H], and keys and values [B, N, S, H].
  Masks are computed here, once for all layers. The output of a token that sees
  nothing (padding) is finite.

  Args:
    name: how segments are attended; a mask is always attended densely.
    visible: segments, for which S is T; or a mask, bool [B, T, S].

  Raises:
    ValueError: segments cross rows and `name` is not "blocks", or vice versa.
  """
  if not isinstance(visible, Segments):
    return functools.partial(dense, mask=visible)
  if (name == "blocks") != (visible.block_pairs is not None):
    packed = "without" if visible.block_pairs is None else "with"
    raise ValueError(
      f"attention={name!r} of rows that were packed {packed} block_pairs;"
      " 'blocks', and no other, takes rows that segments cross"
    )
  if visible.block_pairs is not None:
    mask = blockwise.mask(
      visible.segment_ids, visible.part_ids, visible.block_pairs
    )
    return functools.partial(
      blockwise.attend, visible=mask, block_pairs=visible.block_pairs
    )
  mask = visible.mask()
  if name in ("dense", "cudnn"):
    return functools.partial({"dense": dense, "cudnn": cudnn}[name], mask=mask)
  lowering = {"flash": "device", "flash_interpreted": "interpret"}[name]
  rows = flash.plan(visible.segment_ids, visible.part_ids, mask, lowering)
  return functools.partial(_flash, rows=rows, lowering=lowering)


def check(
  name: Name, device: jax.Device, *, dtype: str, head_dim: int, row_length: int
) -> None:
  """Refuses an implementation that `device` cannot run, before compiling.

  Raises:
    ValueError: the reason, and what to set instead.
  """
  nvidia = "NVIDIA" in device.device_kind
  runs = {"cudnn": nvidia, "flash": nvidia or device.platform == "tpu"}
  if name not in runs:
    return
  # cuDNN takes larger heads from Hopper on.
  hopper = float(getattr(device, "compute_capability", "8.0")) >= 9
  largest = 256 if name == "flash" or hopper else 128
  multiple = 8 if name == "cudnn" else 1
  reason, fix = "", "model.attention=dense"
  if not runs[name]:
    reason = f"does not run on {device.platform} ({device.device_kind})"
  elif name == "cudnn" and dtype != "bfloat16":
    reason = f"computes in bfloat16, but model.dtype={dtype!r}"
    fix = f"model.dtype=bfloat16 or {fix}"
  elif name == "cudnn" and row_length % 2:
    reason = f"needs an even data.row_length, not {row_length}"
  elif head_dim > largest or head_dim % multiple:
    reason = (
      f"takes head dims up to {largest} that are multiples of {multiple} on"
      f" {device.device_kind}, and the model has {head_dim}"
    )
  if reason:
    raise ValueError(f"model.attention={name!r} {reason}; set {fix}")


def dense(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """`attend` by a mask, bool [B, T, S]; scores and softmax in float32."""
  scores = jnp.einsum(
    "BTNH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32
  )
  scores = scores / math.sqrt(q.shape[-1])
  # A finite floor: a row that sees nothing (padding) stays free of NaN.
  scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("BNTS,BNSH->BTNH", weights, v)


def cudnn(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """`dense` by cuDNN's fused attention, on the devices that `check` allows."""
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask[:, None], implementation="cudnn"
  )


def _flash(q, k, v, *, rows: flash.Plan, lowering: flash.Lowering):
  """`flash.attend`; on a mesh each device computes its own rows and heads."""

  def attend(q, k, v, rows):
    return flash.attend(q, k, v, rows, lowering)

  if not jax.sharding.get_abstract_mesh().empty:
    # The partitioner cannot split a kernel.
    batch, heads = (sharding.RULES[name] for name in ("batch", "heads"))
    token = PartitionSpec(batch, heads)
    attend = jax.shard_map(
      attend,
      in_specs=(token, token, token, PartitionSpec(batch)),
      out_specs=token,
      check_vma=False,
    )
  return jnp.swapaxes(attend(jnp.swapaxes(q, 1, 2), k, v, rows), 1, 2)
