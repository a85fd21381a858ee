"""Full float32 matrix products on TPUs and GPUs.

By default a TPU rounds the operands of a float32 product to bfloat16, and an
NVIDIA GPU to TF32, which has float16's 10 bits of mantissa.

References:
  jax.lax.Precision: the meaning of each precision by device.
"""

import contextlib

import jax


def matmul_precision(dtype: str) -> contextlib.AbstractContextManager:
  """Context for tracing a program and its gradient with exact products.

  It sets "highest" for a model that computes in float32. Products of bfloat16
  are exact anyway, and JAX_DEFAULT_MATMUL_PRECISION takes precedence.
  """
  if dtype != "float32" or jax.config.jax_default_matmul_precision is not None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision("highest")


def matmul_dtype(dtype: str) -> str:
  """Effective dtype of the operands of products in a model of `dtype`."""
  setting = jax.config.jax_default_matmul_precision
  exact = setting in (None, "highest", "float32")
  return dtype if exact or jax.default_backend() == "cpu" else "bfloat16"
