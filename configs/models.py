"""The shapes of every Pythia, for random initialization and planning.

Source: the config.json of each EleutherAI/pythia-* model; for 70m and up also
Biderman et al., 2023 (arXiv 2304.01373), Table 1. Vocabulary rows are padded to
50,304 (6.9b: 50,432; 12b: 50,688); the tokenizer has 50,277 tokens.
"""

from ml_collections import config_dict

# size: (layers, width, heads, vocabulary rows)
PYTHIA = {
  "14m": (6, 128, 4, 50304),
  "31m": (6, 256, 8, 50304),
  "70m": (6, 512, 8, 50304),
  "160m": (12, 768, 12, 50304),
  "410m": (24, 1024, 16, 50304),
  "1b": (16, 2048, 8, 50304),
  "1.4b": (24, 2048, 16, 50304),
  "2.8b": (32, 2560, 32, 50304),
  "6.9b": (32, 4096, 32, 50432),
  "12b": (36, 5120, 40, 50688),
}


def pythia(size: str) -> config_dict.ConfigDict:
  """The shape of a Pythia by its size, such as "2.8b"."""
  if size not in PYTHIA:
    raise ValueError(f"no Pythia {size!r}; sizes: {', '.join(PYTHIA)}")
  layers, width, heads, vocab_size = PYTHIA[size]
  c = config_dict.ConfigDict()
  # Rows of the embedding, at least the tokenizer's size.
  c.vocab_size = vocab_size
  # Of the residual stream.
  c.width = width
  # Blocks.
  c.layers = layers
  # Attention heads; each has width / heads dimensions.
  c.heads = heads
  # Hidden width of each MLP.
  c.mlp_width = 4 * width
  # Share of each head's dimensions with rotary embedding.
  c.rotary_fraction = 0.25
  # The slowest wavelength in tokens is about 2 pi times this.
  c.rotary_base = 10000.0
  # Added to the variance in layer norm.
  c.norm_eps = 1e-5
  # Most tokens of a sequence.
  c.max_positions = 2048
  return c


def get_config(variant: str = "2.8b"):
  """For `python -m dpo_jax plan`, which needs a shape only."""
  return pythia(variant.removeprefix("pythia-"))
