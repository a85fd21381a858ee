"""The processes of one run: who they are, and how they stay together.

The same command is started on every host of a TPU slice, or as every task of a
Slurm or Open MPI job. Each process reads all data and computes with its own
devices; the first one owns the run's lock and writes its files. What one
process alone finds out, all of them must learn before the next collective
operation, or the others would wait in it for ever.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dpo_jax.core import errors

# jax's own default.
HEARTBEAT_S = 100

# Those that jax's own detection of a Slurm step needs.
_SLURM = (
  "SLURM_JOB_ID",
  "SLURM_STEP_NODELIST",
  "SLURM_NTASKS",
  "SLURM_PROCID",
  "SLURM_LOCALID",
)


@contextlib.contextmanager
def joined(heartbeat_s: int = HEARTBEAT_S) -> Iterator[None]:
  """Joins the other processes if the environment says that there are some.

  To be entered before anything is computed. One process alone is left as it
  is. When the block fails, the process ends without taking leave of the others:
  they would wait for each other, instead of seeing that one is gone. When one
  is gone without a word, the operation that waits for it fails, or, where
  nothing tells, the process is ended `heartbeat_s` after it was last heard of.

  Args:
    heartbeat_s: how long another process may be silent.

  Raises:
    ValueError: the environment says that there are several processes, but not
      how to reach them.
  """
  _start(heartbeat_s)
  try:
    yield
  except BaseException as error:
    if jax.process_count() > 1:
      # Of all handlers the last to be registered, so the first to run: after
      # the error was printed, before jax waits for the others.
      refused = isinstance(error, ValueError)
      code = 2 if refused else getattr(error, "code", 1)
      atexit.register(_leave, code)
    raise


def _leave(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _start(heartbeat_s: int) -> None:
  if jax.distributed.is_initialized():
    return
  arguments = arguments_of(os.environ)
  if arguments is None:
    return
  try:
    jax.distributed.initialize(
      **arguments, heartbeat_timeout_seconds=heartbeat_s
    )
  except (ValueError, OSError) as error:
    raise ValueError(
      f"the other processes of this job were not found ({error}); set"
      " JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and"
      " JAX_PROCESS_ID in each of them, or on a single TPU host"
      " TPU_SKIP_MDS_QUERY=1"
    ) from error


def arguments_of(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """How to call jax.distributed.initialize; None for one process alone.

  Explicit variables come first; where there are none, jax finds addresses and
  numbers out by itself for Slurm, Open MPI and Cloud TPU.

  Raises:
    ValueError: just some of the explicit variables are set, or not to numbers.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: environ[name] for name in names if environ.get(name)}
  if given:
    if len(given) < len(names) or not all(
      given[name].isdecimal() for name in names[1:]
    ):
      raise ValueError(
        f"{given}: several processes need all of {', '.join(names)}, the last"
        " two as numbers"
      )
    return {
      "coordinator_address": given[names[0]],
      "num_processes": int(given[names[1]]),
      "process_id": int(given[names[2]]),
    }
  if all(name in environ for name in _SLURM):
    tasks = environ["SLURM_NTASKS"]
    nodes = environ.get("SLURM_STEP_NUM_NODES")
    return _gpus(environ, nodes == tasks) if int(tasks) > 1 else None
  if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return _gpus(environ, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1")
  # Importing jax marks a Cloud TPU host so. Without its workers' names in the
  # environment, only the metadata server knows how many there are.
  if environ.get("TPU_ML_PLATFORM") == "JAX":
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
      "TPU_WORKER_HOSTNAMES"
    )
    if workers:
      return {} if "," in workers else None
    return None if environ.get("TPU_SKIP_MDS_QUERY") else {}
  return None


def _gpus(environ: Mapping[str, str], only: bool) -> dict[str, Any]:
  """Which of the GPUs that it sees a task of a launcher takes.

  jax would have it take one, by the task's number on its node: right where all
  tasks of a node see all of its GPUs. No restriction, which is an empty list,
  is right where it is the `only` task there, or sees just its own.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environ:
    return {}
  seen = [x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
  # With the kind of GPU before it: "a100:2".
  own = environ.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2]
  return {"local_device_ids": []} if only or str(len(seen)) == own else {}


def first() -> bool:
  """Whether this process owns the run's files."""
  return jax.process_index() == 0


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
  """Leaves a block on all processes, or raises on all.

  Nothing within it may wait for the other processes.

  Args:
    doing: what the block does, for the message of those that did it.

  Raises:
    errors.Stopped: another process failed; it tells why.
  """
  if jax.process_count() == 1:
    yield
    return
  try:
    yield
  except BaseException:
    everywhere(False)
    raise
  done = everywhere(True)
  if not done.all():
    failed = np.flatnonzero(~done).tolist()
    raise errors.Stopped(
      f"{doing}: stopped with process {failed}, which tells why"
    )


@contextlib.contextmanager
def owned(holder: contextlib.AbstractContextManager) -> Iterator[None]:
  """Holds something in the first process; the others go on when it is held."""
  with contextlib.ExitStack() as stack:
    with together("taking the lock"):
      if first():
        stack.enter_context(holder)
    yield


def shared(path: pathlib.Path) -> None:
  """Checks that a file of the first process is one of every process.

  Raises:
    ValueError: it is not there.
  """
  if not path.exists():
    raise ValueError(
      f"{path} was made by the first process, but is not here, on"
      f" {socket.gethostname()}: the working directory must be on a file system"
      " that all hosts of the run share"
    )


def everywhere(value: Any) -> np.ndarray:
  """A small value of each process, stacked in their order, on all of them."""
  if jax.process_count() == 1:
    return np.asarray(value)[None]
  from jax.experimental import multihost_utils

  with jax.transfer_guard("allow"):
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def agree(what: str, text: str) -> None:
  """Checks that a text is the same on all processes.

  Raises:
    ValueError: it is not; `what` names it.
  """
  digest = hashlib.sha256(text.encode()).digest()[:8]
  found = everywhere(np.frombuffer(digest, np.uint8))
  if (found != found[:1]).any():
    raise ValueError(
      f"{what} differs between the {len(found)} processes of this run: give"
      " all of them the same command and the same files"
    )


def wait(name: str) -> None:
  """Goes on when all processes have come here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    with jax.transfer_guard("allow"):
      multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
  """A tree's arrays as NumPy's, whole, on every process.

  All processes must call it: what lies on devices of others is gathered, an
  array at a time.
  """

  def one(x):
    if not isinstance(x, jax.Array) or (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return jax.device_get(x)
    from jax.experimental import multihost_utils

    with jax.transfer_guard("allow"):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(one, tree)
