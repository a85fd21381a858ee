"""Products of float32 that are float32 on every device.

Left to itself a TPU rounds the operands of a float32 product to bfloat16, and
an NVIDIA GPU to TF32, whose ten bits of mantissa are as few as float16's: what
was asked for as float32 would be as exact as that, and nothing would say so.

References:
  jax.lax.Precision: what its members mean on which device.
"""

import contextlib

import jax


def matmul_precision(dtype: str) -> contextlib.AbstractContextManager:
  """Within it, what is computed in float32 is multiplied in float32.

  To be held while a program is traced, its backward pass included. What JAX was
  told stays (JAX_DEFAULT_MATMUL_PRECISION), and so does what is computed in
  bfloat16, whose products lose nothing.

  Args:
    dtype: what a model computes in, `model.ModelConfig.dtype`.
  """
  if dtype != "float32" or jax.config.jax_default_matmul_precision is not None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision("highest")


def matmul_dtype(dtype: str) -> str:
  """What products are rounded to in a model that computes in `dtype`.

  Those of float32 are rounded on TPUs and GPUs where jax was told so.
  """
  told = jax.config.jax_default_matmul_precision
  exact = told in (None, "highest", "float32")
  return dtype if exact or jax.default_backend() == "cpu" else "bfloat16"
