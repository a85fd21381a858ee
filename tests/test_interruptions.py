"""Runs that are stopped, killed or out of disk, and resumed: real faults.

In the end each leaves bit for bit what an uninterrupted run leaves.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import jax
import pytest
import running

from dpo_jax.core import preemption, sharding, versions
from dpo_jax.data import dataset
from dpo_jax.io import metrics, step_files
from dpo_jax.model import hf
from dpo_jax.training import checkpoints, input_pipeline, loop, setup, train


def assert_same(workdir, whole):
  assert running.read(workdir) == running.read(whole)
  assert running.weights(workdir) == running.weights(whole)
  directory = workdir / "checkpoints"
  for step in step_files.steps(directory):
    assert step_files.problem(directory, step) == ""


# --- signals


def signalled(patch, owner, name, number, times=1):
  """Sends this process a signal as `owner.name` is called the nth time."""
  original = getattr(owner, name)
  left = [times]

  def call(*arguments, **options):
    left[0] -= 1
    if left[0] == 0:
      os.kill(os.getpid(), number)
    return original(*arguments, **options)

  patch.setattr(owner, name, call)


PHASES = [
  # Where the signal comes, what the run then says, and the newest checkpoint.
  (input_pipeline, "make", 1, "before or after training", None),
  (hf, "load", 1, "before or after training", None),
  # Compilation is not interrupted; the first evaluation then asks.
  (setup, "compile_ahead", 1, "in the evaluation at step 0", None),
  (loop, "_evaluate", 1, "in the evaluation at step 0", None),
  # After the evaluation comes step 1, fetched at once; one more is under way
  # when the signal is seen.
  (metrics.Writer, "write", 2, "after step 2, which is saved", 2),
  # The evaluation after step 3 is abandoned, and made up for at the next start.
  (loop, "_evaluate", 1, "after step 3, which is saved", 3),
  (checkpoints.Checkpoints, "save", 1, "after step 5, which is saved", 5),
  (checkpoints.Checkpoints, "close", 1, "at the end of training", 7),
  (hf, "export", 1, "before or after training", 7),
]


def test_a_signal_in_any_phase_loses_nothing(
  whole, config, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
  for turn, (owner, name, times, where, saved) in enumerate(PHASES):
    number = preemption.SIGNALS[turn % 3]
    with monkeypatch.context() as patch:
      signalled(patch, owner, name, number, times)
      with pytest.raises(preemption.Interrupted) as stopped:
        train.run(config(), workdir)
    assert f"{number.name} {where}" in str(stopped.value), name
    assert stopped.value.code == 128 + number
    found = step_files.steps(workdir / "checkpoints")
    assert (found[-1] if found else None) == saved, name
    assert not (workdir / "finished.json").exists()
  assert [signal.getsignal(number) for number in preemption.SIGNALS] == handlers
  train.run(config(), workdir)
  assert_same(workdir, whole)


# --- kill -9


def test_killed_in_a_save_it_ends_where_it_would_have(whole, config, tmp_path):
  workdir = tmp_path / "run"
  directory = workdir / "checkpoints"
  # The only checkpoint to resume from, once those before it are deleted.
  one = config(keep_checkpoints=1, export_adapters=False)

  def found():
    return {path.name for path in directory.iterdir()}

  for call, left, start in (
    # A step is renamed and about to be deleted.
    (("shutil:rmtree", "1"), {"2.deleting", "4"}, 4),
    # The arrays are committed, but not their manifest.
    (("dpo_jax.io.step_files:complete", "2"), {"6", "7"}, 6),
  ):
    command = ("tests/signalled.py", "train.py", *call, "SIGKILL", "0")
    with running.Child(tmp_path / str(start), one, workdir, command) as child:
      assert child.end() == -signal.SIGKILL, child.printed()
    assert found() == left
    assert step_files.newest(directory)[0] == start
  assert not (directory / "7" / step_files.MANIFEST).exists()
  train.run(one, workdir)
  starts = json.loads((workdir / "manifest.json").read_text())["starts"]
  assert [begun["step"] for begun in starts] == [0, 4, 6]
  # What was put aside is gone, as its step is whole again.
  assert found() == {"7"}
  assert running.read(workdir) == running.read(whole)
  exports = [running.weights(path / "export") for path in (workdir, whole)]
  assert exports[0] == exports[1]


# --- other devices


def test_it_goes_on_with_other_devices(whole, config, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  make = sharding.make_mesh
  with monkeypatch.context() as patch:
    running.at_step(patch, 2, running.terminate)
    with pytest.raises(preemption.Interrupted):
      train.run(config(), workdir)
  one = jax.devices()[:1]
  monkeypatch.setattr(
    sharding, "make_mesh", lambda **sizes: make(**sizes, devices=one)
  )
  train.run(config(), workdir)
  starts = json.loads((workdir / "manifest.json").read_text())["starts"]
  assert [len(start["devices"]) for start in starts] == [8, 1]
  assert [start["step"] for start in starts] == [0, 3]
  # The same items in the same steps; only sums are made in another order.
  for a, b in zip(running.read(workdir), running.read(whole), strict=True):
    for key in b.keys() - {"row_fill"}:
      assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


# --- disks


@contextlib.contextmanager
def mounted(path, options):
  """A tmpfs, really mounted."""
  path.mkdir()
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", options, "none", str(path)],
    capture_output=True,
    text=True,
  )
  if done.returncode:
    pytest.skip(
      "NOT TESTED: what happens on a full or read-only disk. Mounting a tmpfs"
      f" needs root here: {done.stderr.strip()}"
    )
  try:
    yield path
  finally:
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path):
  with mounted(tmp_path / "disk", "size=3m") as path:
    yield path


# Orbax leaves its other writes unawaited when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_last_checkpoint(
  whole, config, small_disk, monkeypatch
):
  workdir = small_disk / "run"
  directory = workdir / "checkpoints"
  plain = config(export_adapters=False)

  def fill():
    # The save of step 2 continues in the background.
    ends = time.monotonic() + 60
    while not step_files.newest(directory)[0]:
      assert time.monotonic() < ends
      time.sleep(0.01)
    # Until 60 kB are left.
    usage = os.statvfs(small_disk)
    free = usage.f_bavail * usage.f_frsize
    (small_disk / "filler").write_bytes(bytes(free - 60_000))

  with monkeypatch.context() as patch:
    running.at_step(patch, 3, fill)
    with pytest.raises(
      checkpoints.SaveError, match="4 could not be saved"
    ) as e:
      train.run(plain, workdir)
  assert str(directory) in str(e.value)
  assert step_files.newest(directory)[0] == 2
  (small_disk / "filler").unlink()
  train.run(plain, workdir)
  assert running.read(workdir) == running.read(whole)
  exports = [path / "export" / "model.safetensors" for path in (workdir, whole)]
  assert exports[0].read_bytes() == exports[1].read_bytes()


def test_a_last_save_that_fails_is_not_swallowed(
  whole, config, tmp_path, monkeypatch, caplog
):
  workdir = tmp_path / "run"
  directory = workdir / "checkpoints"
  original = step_files.complete

  def vanishes(path, step):
    # The last save, in the background, after the last step.
    if step == running.STEPS:
      shutil.rmtree(path / str(step))
    original(path, step)

  with monkeypatch.context() as patch:
    patch.setattr(step_files, "complete", vanishes)
    with pytest.raises(checkpoints.SaveError, match="7 could not be saved"):
      train.run(config(), workdir)
  assert not (workdir / "finished.json").exists()
  assert not (workdir / "export").exists()
  # And the newest checkpoint is damaged.
  assert step_files.steps(directory) == [4, 6]
  path = max((directory / "6").rglob("d/*"), key=lambda x: x.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  train.run(config(), workdir)
  assert "6 is not used: " in caplog.text
  assert "resuming from step 4" in caplog.text
  assert_same(workdir, whole)


def test_a_disk_that_cannot_be_written_is_refused_first(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(dataset, "prepare", pytest.fail)
  (tmp_path / "file").write_text("")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").write_text("")
  for workdir in ("file", "file/run", "run"):
    with pytest.raises(ValueError, match=r"cannot be written: .*--workdir"):
      train.run(config(), tmp_path / workdir)
  with (
    mounted(tmp_path / "disk", "size=1m,ro") as disk,
    pytest.raises(ValueError, match="cannot be written: Read-only"),
  ):
    train.run(config(), disk / "run")


LIMITED = """
import os, sys
limit, *command = sys.argv[1:]
shell = f'ulimit {limit}; exec "$0" "$@"'
os.execvp("bash", ["bash", "-c", shell, sys.executable, *command])
"""


@pytest.mark.parametrize(
  ("limit", "code", "words"),
  [
    ("-n 40", 2, "only 40 files may be open at a time: raise the limit to 64"),
    ("-f 60", 1, "File too large; .* raise the largest size of a file"),
  ],
)
def test_limits_of_the_shell_are_named(config, tmp_path, limit, code, words):
  plain = config(export_adapters=False, max_steps=1)
  arguments = tmp_path / "child", plain, tmp_path / "run"
  command = ("-c", LIMITED, limit, "train.py")
  with running.Child(*arguments, command) as child:
    assert child.end() == code
    printed = child.printed()
  assert re.search(f"error: .*{words}", printed)
  assert "Traceback" not in printed


# --- changes on the way


def test_another_batch_size_trains_on_each_item_of_the_epoch_once(
  config, tmp_path, monkeypatch
):
  ids, write = [], loop.StepLog.write

  def recorded(self, number, metrics, batch):
    write(self, number, metrics, batch)
    ids.append(batch.counts.ids)

  monkeypatch.setattr(loop.StepLog, "write", recorded)
  plain = {"eval_every": 0, "export_adapters": False}
  with monkeypatch.context() as patch:
    running.at_step(patch, 3, running.terminate)
    with pytest.raises(preemption.Interrupted):
      train.run(config(**plain), tmp_path)
  smaller = config(
    **plain,
    batch_size=2,
    microbatches=1,
    allow_changes=["batch_size", "microbatches", "position"],
  )
  train.run(smaller, tmp_path)
  # 30 items: four steps of four, then the other 14 in seven of two.
  assert [len(step) for step in ids] == [4] * 4 + [2] * 7
  assert len({item for step in ids for item in step}) == 30


def test_what_may_change_is_recorded(
  whole, config, tmp_path, monkeypatch, caplog
):
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    running.at_step(patch, 4, running.terminate)
    # As if it had been begun with another jax.
    older = versions.versions() | {"jax": "0.10.1"}
    patch.setattr(versions, "versions", lambda: older)
    with pytest.raises(preemption.Interrupted):
      train.run(config(), workdir)
  (workdir / ".config.json.0123456789ab.tmp").write_text("of a kill")
  changes = {"loss.beta": 0.6, "optimizer.eps": 1e-7}
  with pytest.raises(ValueError, match=r"config.optimizer.eps: 1e-08 -> 1e-07"):
    train.run(config(**changes, allow_changes=["loss"]), workdir)
  with pytest.raises(ValueError, match=r"lora_a: 'float32\[.*, 2\]' -> "):
    train.run(config(**{"lora.rank": 4}, allow_changes=["lora"]), workdir)
  other = tmp_path / "other.jsonl"
  running.write(other, list(running.rows(30, 4)))
  source = {"data.sources.files.train_path": str(other)}
  allowed = ["loss.beta", "optimizer", "data"]
  with pytest.raises(ValueError, match=r"(?s)train_data: .*allow_changes"):
    train.run(config(**changes, **source, allow_changes=allowed), workdir)
  started = config(**changes, **source, allow_changes=[*allowed, "train_data"])
  train.run(started, workdir)
  first, last = json.loads((workdir / "manifest.json").read_text())["starts"]
  assert first["changed"] == []
  names = [line.split(":")[0] for line in last["changed"]]
  assert names == [
    "config.allow_changes",
    "config.data.sources.files.train_path",
    "config.loss.beta",
    "config.optimizer.eps",
    "inputs.train_data",
  ]
  assert last["versions"]["jax"] == jax.__version__
  assert f"versions.jax: '0.10.1' -> '{jax.__version__}'" in caplog.text
  assert not list(workdir.rglob("*.tmp"))
  # From now on this is the run's config; the one it was begun with is another.
  with pytest.raises(ValueError, match=r"config.loss.beta: 0.6 -> 0.5"):
    train.run(config(), workdir)
  rows = running.read(workdir)
  assert [row["step"] for row in rows if "loss" in row] == list(range(1, 8))
  assert rows[:6] == running.read(whole)[:6]
  assert rows[-1] != running.read(whole)[-1]


def test_a_directory_that_no_run_began_is_refused(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(dataset, "prepare", pytest.fail)
  (tmp_path / "thesis.tex").write_text("")
  with pytest.raises(
    ValueError, match=r"no run was begun .* holds thesis\.tex"
  ):
    train.run(config(), tmp_path)
  half = tmp_path / "half"
  (half / "checkpoints" / "4").mkdir(parents=True)
  (half / "log.txt").write_text("")
  with pytest.raises(ValueError, match=r"holds checkpoints: name an"):
    train.run(config(), half)


def test_out_of_memory_names_the_knobs(config, tmp_path):
  # Attention scores of one row: 2 heads x 131072^2 x 4 bytes, 137 GB.
  large = config(**{"data.row_length": 131072})
  with pytest.raises(Exception, match="out of memory") as error:
    train.run(large, tmp_path / "run")
  for knob in ("microbatches", "data.row_length", "remat", "mesh.fsdp"):
    assert knob in str(error.value)
  assert "dpo_jax plan" in str(error.value)
