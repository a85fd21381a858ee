"""The processes of one run: how they find each other and stay together.

The same command is started on every host of a TPU slice, or as every task of a
Slurm or Open MPI job. Each process reads all data and computes with its own
devices; the first one holds the run's lock and writes its files. What one
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
from jax.experimental import multihost_utils

from dpo_jax.core import errors


@contextlib.contextmanager
def initialized(heartbeat_s: int = 100) -> Iterator[None]:
  """Joins the other processes if the environment says that there are some.

  To be entered before anything is computed. When the block fails, but for a
  signal that stopped all, the process ends without the barrier at which jax
  would wait for the others, who wait for this one. When another is gone, the
  operation that waits for it fails, or this process is ended `heartbeat_s`
  after that one was last heard of.

  Raises:
    ValueError: there are several processes, but no way to reach them.
  """
  arguments = arguments_of(os.environ)
  if arguments is not None:
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
  try:
    yield
  except BaseException as error:
    if jax.process_count() > 1 and not getattr(error, "everywhere", False):
      code = 2 if isinstance(error, ValueError) else getattr(error, "code", 1)
      # Registered last and so called first: the error is printed by then, and
      # jax has not yet begun to wait.
      atexit.register(_leave, code)
    raise


def _leave(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def arguments_of(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """How to call jax.distributed.initialize; None for one process alone.

  jax finds addresses and numbers by itself under Slurm, Open MPI and on Cloud
  TPU. What it does not do is to see that there is but one process, for which it
  would wait in a shell of salloc and fail where there is no launcher.

  Raises:
    ValueError: just some of the explicit variables are set, or not to numbers.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: environ[name] for name in names if environ.get(name)}
  if given:
    address, *numbers = (given.get(name, "") for name in names)
    if not address or not all(number.isdecimal() for number in numbers):
      raise ValueError(
        f"{given}: several processes need all of {', '.join(names)}, the last"
        " two as numbers"
      )
    count, number = map(int, numbers)
    return {
      "coordinator_address": address,
      "num_processes": count,
      "process_id": number,
    }
  # Of the step, not of the job: mpirun and srun start in one of several tasks.
  if (tasks := environ.get("OMPI_COMM_WORLD_SIZE", "1")) != "1":
    return _gpus(environ, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1")
  if (tasks := environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
    return _gpus(environ, environ.get("SLURM_STEP_NUM_NODES") == tasks)
  # As jax has marked a Cloud TPU host. Without its workers' names in the
  # environment, only the metadata server knows how many there are.
  if environ.get("TPU_ML_PLATFORM") == "JAX":
    workers = environ.get("TPU_WORKER_HOSTNAMES", "")
    workers = environ.get("TPU_PROCESS_ADDRESSES", workers)
    asks = not workers and not environ.get("TPU_SKIP_MDS_QUERY")
    return {} if asks or "," in workers else None
  return None


def _gpus(environ: Mapping[str, str], only: bool) -> dict[str, Any]:
  """Which GPUs a launcher's task takes, of those that it sees.

  jax takes the one of the task's number on its node. No restriction, which is
  an empty list, is right for the `only` task of a node, or one that sees just
  its own.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environ:
    return {}
  seen = [x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
  # With the kind of GPU before it: "a100:2".
  own = environ.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2]
  return {"local_device_ids": []} if only or str(len(seen)) == own else {}


def is_main() -> bool:
  """Whether this process owns the run's files."""
  return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all(doing: str) -> Iterator[None]:
  """Leaves a block on all processes, or raises on all.

  Nothing within it may wait for the other processes.

  Args:
    doing: what the block does, for the message of those that did it.

  Raises:
    errors.Stopped: another process failed; it tells why.
  """
  try:
    yield
  except BaseException:
    all_gather(False)
    raise
  failed = np.flatnonzero(~all_gather(True)).tolist()
  if failed:
    raise errors.Stopped(
      f"{doing}: stopped with process {failed}, which tells why"
    )


@contextlib.contextmanager
def on_main(holder: contextlib.AbstractContextManager) -> Iterator[None]:
  """Holds something in the first process; the others go on when it is held."""
  with contextlib.ExitStack() as stack:
    with raise_on_all("taking the lock"):
      if is_main():
        stack.enter_context(holder)
    yield


def require_shared(path: pathlib.Path) -> None:
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


def all_gather(value: Any) -> np.ndarray:
  """A small value of each process, stacked in their order, on all of them."""
  with jax.transfer_guard("allow"):
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def assert_equal(what: str, text: str) -> None:
  """Checks that a text is the same on all processes.

  Raises:
    ValueError: it is not; `what` names it.
  """
  digest = hashlib.sha256(text.encode()).digest()[:8]
  found = all_gather(np.frombuffer(digest, np.uint8))
  if (found != found[:1]).any():
    raise ValueError(
      f"{what} differs between the {len(found)} processes of this run: give"
      " all of them the same command and the same files"
    )


def barrier(name: str) -> None:
  """Goes on when all processes have come here."""
  with jax.transfer_guard("allow"):
    multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
  """A tree's arrays as NumPy's, whole, on every process.

  All processes must call it: what is on devices of others is gathered, an array
  at a time.
  """

  def one(x):
    if not isinstance(x, jax.Array) or (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return jax.device_get(x)
    with jax.transfer_guard("allow"):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(one, tree)
