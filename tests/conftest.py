"""Eight CPU devices, a compilation cache shared by all tests, real data."""

import functools
import importlib.metadata
import os
import pathlib
import signal

# Ignored in the background of a shell or under nohup, where tests that send
# them would hang.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
  signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Tiny shapes cost more to compile than to run: skip LLVM's optimizations, and
# the MLIR fusion emitters, half of the compile time. An unknown flag aborts; a
# later jaxlib may not know the second.
os.environ.setdefault("XLA_FLAGS", "")
if "--xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
  os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Shared with subprocesses and later runs, for short compilations too: there are
# thousands, most of 0.1 s.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
  pathlib.Path.home() / ".cache" / "dpo_jax" / "xla"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# torch's threads would contend with those of other tests.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Read as gcsfs is imported: it would query buckets over gRPC, and wait a minute
# for servers that speak only HTTP.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest
from jax.experimental import topologies

from dpo_jax.plan import compile_training

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_numpy_rank_promotion", "raise")

# On two loaded cores a device may be late to a collective: XLA aborts after a
# minute by default. It reads its flags once, with the first device; flags that
# stay set are part of the compilation cache's key.
with pytest.MonkeyPatch.context() as patch:
  longer = " --xla_cpu_collective_call_terminate_timeout_seconds=180"
  patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + longer)
  jax.devices()


def _for_libtpu(describe):
  """Hides flags that libtpu does not know, and would abort for.

  libtpu reads them as it is loaded, and once more as it first compiles.
  """
  has_read = []

  @functools.wraps(describe)
  def call(*arguments, **options):
    if has_read:
      return describe(*arguments, **options)
    flags = os.environ["XLA_FLAGS"].split()
    known = [flag for flag in flags if "fusion_emitters" not in flag]
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("XLA_FLAGS", " ".join(known))
      found = describe(*arguments, **options)
      mesh = jax.sharding.Mesh(found.devices[:1], "x")
      here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      number = jax.ShapeDtypeStruct((), "float32", sharding=here)
      with compile_training.uncached(mesh):
        jax.jit(jax.numpy.negative).lower(number).compile()
    has_read.append(True)
    return found

  return call


topologies.get_topology_desc = _for_libtpu(topologies.get_topology_desc)


@pytest.fixture(scope="session")
def run_files(tmp_path_factory) -> pathlib.Path:
  """Model, tokenizer and pairs of tiny runs; tests must not change them."""
  import running

  return running.make_files(tmp_path_factory.mktemp("run_files"))


@pytest.fixture(scope="session")
def config(run_files):
  """config(**{"loss.beta": 1.0}): settings of a tiny run on those files."""
  import running

  return running.configs(run_files)


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory) -> pathlib.Path:
  """The directory of an uninterrupted tiny run, not to be changed either."""
  from dpo_jax.training import train

  workdir = tmp_path_factory.mktemp("whole") / "run"
  train.run(config(), workdir)
  return workdir


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Directory of real rows, a real tokenizer and real judged results."""
  path = ROOT.parent / "shared"
  if not (path / "data").is_dir():
    pytest.fail(f"{path} is missing: the tests on real data need it")
  return path
