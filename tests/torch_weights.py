"""Weights of torch models that hide nothing: no zero bias, no unit norm."""

import torch


def randomise(network, seed, only=""):
  """Kernels that keep the scale of their input, biases and norms off rest."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in network.named_parameters():
      if only not in name:
        continue
      noise = torch.randn(weight.shape, generator=generator)
      if weight.ndim == 1:
        weight.copy_(0.3 * noise + ("norm.weight" in name))
      else:
        fan_in = 1 if "embed_in" in name else weight.shape[1]
        weight.copy_(noise * 1.5 / fan_in**0.5)
