"""Multi-process runs: initialization, shared errors and small collectives.

The same command runs on every host of a TPU slice, or as every task of a Slurm
or Open MPI job. Each process reads all data and computes on its own devices;
process 0 holds the run's lock and writes its files. An error in one process
must reach all of them before the next collective, which would otherwise hang.
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
  """Connects to the other processes, if the environment declares any.

  To be entered before any computation. If the block raises in one process, that
  process exits at once; the others then fail in a collective, or exit
  `heartbeat_s` after its last heartbeat.
  """
  arguments = initialize_arguments(os.environ)
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
      # Called first, being registered last: jax's own exit handler would wait
      # at a barrier for the other processes, which wait for this one.
      atexit.register(_exit, code)
    raise


def _exit(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def initialize_arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize; None for a single process.

  jax detects addresses and ranks under Slurm, Open MPI and on Cloud TPU, but
  not that there is a single process: it would wait in a shell of salloc, and
  fail without a launcher.
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
    count, rank = map(int, numbers)
    return {
      "coordinator_address": address,
      "num_processes": count,
      "process_id": rank,
    }
  # Tasks of the step, not of the job, of which a step may be a part.
  if environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
    return _gpus(environ, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1")
  if (tasks := environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
    return _gpus(environ, environ.get("SLURM_STEP_NUM_NODES") == tasks)
  # Set by jax on a Cloud TPU host. Unless the environment lists the workers,
  # only the metadata server knows their number.
  if environ.get("TPU_ML_PLATFORM") == "JAX":
    workers = environ.get("TPU_WORKER_HOSTNAMES", "")
    workers = environ.get("TPU_PROCESS_ADDRESSES", workers)
    unknown = not workers and not environ.get("TPU_SKIP_MDS_QUERY")
    return {} if unknown or "," in workers else None
  return None


def _gpus(environ: Mapping[str, str], alone: bool) -> dict[str, Any]:
  """The local_device_ids of a task, `alone` on its node or not.

  By default jax gives a task the one GPU of its local rank. An empty list, all
  visible GPUs, is right for a task alone on its node and for one that sees just
  its own GPUs.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environ:
    return {}
  visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
  # May begin with the type of GPU: "a100:2".
  own = environ.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2]
  all_own = visible != [""] and str(len(visible)) == own
  return {"local_device_ids": []} if alone or all_own else {}


def is_main() -> bool:
  """Whether this is process 0, which writes the run's files."""
  return jax.process_index() == 0


@contextlib.contextmanager
def raise_on_all(doing: str) -> Iterator[None]:
  """Raises in all processes if the block raises in any of them.

  The others raise errors.Stopped, naming what they were `doing`. The block must
  not contain collectives.
  """
  try:
    yield
  except BaseException:
    all_gather(False)
    raise
  failed = np.flatnonzero(~all_gather(True)).tolist()
  if failed:
    raise errors.Stopped(f"{doing}: failed in process {failed}, see its output")


@contextlib.contextmanager
def on_main(holder: contextlib.AbstractContextManager) -> Iterator[None]:
  """Enters a context in process 0 alone, before all processes proceed."""
  with contextlib.ExitStack() as stack:
    with raise_on_all("taking the lock"):
      if is_main():
        stack.enter_context(holder)
    yield


def require_shared(path: pathlib.Path) -> None:
  """Raises ValueError if a file of process 0 is not visible to this one."""
  if not path.exists():
    raise ValueError(
      f"{path} was written by process 0, but is missing on"
      f" {socket.gethostname()}: the working directory must be on a file system"
      " that all hosts of the run share"
    )


def all_gather(value: Any) -> np.ndarray:
  """Small values of all processes, stacked by rank, on each of them."""
  with jax.transfer_guard("allow"):
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def assert_equal(what: str, text: str) -> None:
  """Raises ValueError if a text, `what`, differs between processes."""
  digest = hashlib.sha256(text.encode()).digest()[:8]
  found = all_gather(np.frombuffer(digest, np.uint8))
  if (found != found[:1]).any():
    raise ValueError(
      f"{what} differs between the {len(found)} processes of this run: give"
      " all of them the same command and the same files"
    )


def barrier(name: str) -> None:
  """Waits for all processes."""
  with jax.transfer_guard("allow"):
    multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
  """Whole NumPy arrays of a tree, in every process, gathered one at a time."""

  def one(x):
    if not isinstance(x, jax.Array) or (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return jax.device_get(x)
    with jax.transfer_guard("allow"):
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(one, tree)
