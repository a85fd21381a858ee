"""Settings of a training run, checked before anything is read."""

import dataclasses
import math
from typing import Literal

from dpo_jax.core import settings, sharding
from dpo_jax.data import dataset
from dpo_jax.hub import push as push_lib
from dpo_jax.io import bucket, remote
from dpo_jax.model import attention, gpt_neox
from dpo_jax.training import guards, losses, step, trackers
from dpo_jax.training import optimizer as optimizer_lib

# Fields that do not affect a run's results, and may change when it is resumed.
FREE = (
  "grace_s",
  "heartbeat_s",
  "allow_changes",
  "trackers",
  "push_to_hub",
  "push_public",
  "push_license",
  "push_dry_run",
  "checkpoint_bucket",
)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """Source of the base weights, their precision, and the forward pass."""

  path: str
  dtype: Literal["float32", "bfloat16"]
  param_dtype: Literal["float32", "bfloat16", "int8"]
  remat: gpt_neox.Remat
  attention: attention.Name
  attention_block: int
  logit_chunk: int
  vocab_tile: int

  def __post_init__(self):
    settings.check(self, "model.")


@dataclasses.dataclass(frozen=True)
class LoraSettings:
  """Adapters; `rank` 0 trains all weights instead."""

  rank: int
  alpha: float
  dropout: float
  targets: tuple[str, ...]
  scaling: Literal["lora", "rslora"]
  path: str

  def __post_init__(self):
    settings.check(self, "lora.")
    if self.path and not self.rank:
      raise ValueError(
        f"lora.path={self.path!r} with lora.rank=0, which trains all weights:"
        " set lora.rank to the adapter's"
      )

  def config(self) -> gpt_neox.LoraConfig | None:
    if not self.rank:
      return None
    # Kalajdzievski, rsLoRA, 2023 (arXiv 2312.03732): alpha / sqrt(rank).
    root = math.sqrt(self.rank) if self.scaling == "rslora" else 1
    return gpt_neox.LoraConfig(
      self.rank, self.alpha * root, self.dropout, self.targets
    )


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """Responses to held-out prompts during training; none if `prompts` is 0."""

  prompts: int
  every: int
  temperature: float
  max_new_tokens: int
  max_prompt_tokens: int

  def __post_init__(self):
    settings.check(self, "samples.")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """One training run; every field is explained in configs/common.py."""

  objective: Literal["sft", "dpo"]
  seed: int
  tokenizer: str
  model: ModelSettings
  lora: LoraSettings
  data: dataset.DataSettings
  loss: losses.LossSettings
  optimizer: optimizer_lib.OptimizerSettings
  mesh: sharding.MeshSettings
  guards: guards.GuardSettings
  samples: SampleSettings
  batch_size: int
  microbatches: int
  epochs: int
  max_steps: int
  eval_every: int
  eval_batch_size: int
  checkpoint_every: int
  keep_checkpoints: int
  checkpoint_bucket: str
  export_adapters: bool
  precompute_reference: bool
  reference_cache: str
  grace_s: float
  heartbeat_s: int
  allow_changes: tuple[str, ...]
  trackers: trackers.TrackerSettings
  push_to_hub: str
  push_public: bool
  push_license: str
  push_dry_run: bool

  def __post_init__(self):
    self.lora.config()
    settings.check(self)
    if self.batch_size % self.microbatches:
      raise ValueError(
        f"batch_size={self.batch_size} must be a multiple of"
        f" microbatches={self.microbatches}"
      )
    if self.spans_rows and self.data.layout == "padded":
      raise ValueError(
        "model.attention='blocks' with data.layout='padded', one sequence a"
        " row: set data.layout to 'packed' or 'shared'"
      )
    if self.model.param_dtype != "float32" and not self.lora.rank:
      raise ValueError(
        f"model.param_dtype={self.model.param_dtype!r} with lora.rank=0: all"
        " weights are trained, and updates need float32 weights"
      )
    if self.model.param_dtype == "int8" and self.model.remat == "none":
      raise ValueError(
        "model.param_dtype='int8' with model.remat='none', which would keep"
        " dequantized kernels for the backward pass: set model.remat='full'"
      )
    objective = self.step_objective()
    if self.precompute_reference and not objective.has_reference:
      raise ValueError(
        f"precompute_reference=True with objective={self.objective!r} and"
        f" loss.kind={self.loss.kind!r}, which has no reference; set it to"
        " False"
      )
    live = objective.has_reference and not self.precompute_reference
    if self.lora.path and live:
      raise ValueError(
        f"lora.path={self.lora.path!r}: the reference is the model with this"
        " adapter, as it begins: set precompute_reference to True"
      )
    is_split = self.objective == "dpo" and self.microbatches > 1
    if is_split and self.loss.whole_batch:
      raise ValueError(
        f"microbatches={self.microbatches} with loss.kind={self.loss.kind!r},"
        " which compares all pairs of an update: set microbatches to 1"
      )
    remote.refuse_address("reference_cache", self.reference_cache)
    if self.checkpoint_bucket:
      try:
        bucket.check(self.checkpoint_bucket)
      except ValueError as error:
        raise ValueError(f"checkpoint_bucket: {error}") from None
    if self.export_adapters and not self.lora.rank:
      raise ValueError(
        "export_adapters=True needs adapters, but lora.rank=0; set it to False"
      )
    self.push()

  def push(self) -> push_lib.PushSettings | None:
    """Where the run's models are pushed; None without `push_to_hub`."""
    if not self.push_to_hub:
      return None
    return push_lib.PushSettings(
      repo=self.push_to_hub,
      public=self.push_public,
      license=self.push_license,
      dry_run=self.push_dry_run,
    )

  def computing(self, shape: gpt_neox.ModelConfig) -> gpt_neox.ModelConfig:
    """A model of this shape with the run's precision, adapters and kernels.

    Called once the mesh is made, as a mesh without its devices is the first
    thing to correct.

    Raises:
      ValueError: the kernels do not work on the mesh.
    """
    if self.model.vocab_tile and self.mesh.tensor != 1:
      raise ValueError(
        f"model.vocab_tile={self.model.vocab_tile} with"
        f" mesh.tensor={self.mesh.tensor}, which splits the vocabulary: set"
        " model.vocab_tile to 0"
      )
    return dataclasses.replace(
      shape,
      dtype=self.model.dtype,
      remat=self.model.remat,
      lora=self.lora.config(),
      attention=self.model.attention,
      logit_chunk=self.model.logit_chunk,
      vocab_tile=self.model.vocab_tile,
    )

  def step_objective(self) -> step.Objective:
    """What a training step minimizes."""
    loss = self.loss if self.objective == "dpo" else None
    items = self.batch_size // self.microbatches
    return step.Objective(self.objective, loss, items)

  @property
  def spans_rows(self) -> bool:
    """Whether segments span rows, which are blocks of attention."""
    return self.model.attention == "blocks"

  @property
  def row_length(self) -> int:
    """Tokens in a row."""
    return (
      self.model.attention_block if self.spans_rows else self.data.row_length
    )

  @property
  def changeable(self) -> tuple[str, ...]:
    """Fields that may change when the run is resumed."""
    return (*self.allow_changes, *FREE)

  @property
  def keeps_reference(self) -> bool:
    """Whether the reference is a second tree of weights."""
    return (
      self.step_objective().has_reference
      and not self.lora.rank
      and not self.precompute_reference
    )
