"""Which steps are whole, and which are kept: faults made in real files."""

import json
import math
import os
import shutil
import subprocess
import sys
import types

import hypothesis
import pytest
from hypothesis import strategies as st
from orbax.checkpoint import checkpoint_managers as policies

from dpo_jax.io import checkpoint, step_files


def keep(newest=2, every=0, best=0, metric="eval_loss", best_is="lowest"):
  return step_files.Retention(newest, every, best, metric, best_is)


def make(directory, step, metrics=None, complete=True):
  path = directory / str(step)
  (path / "trainable" / "d").mkdir(parents=True)
  (path / "meta").mkdir()
  (path / "trainable" / "d" / "array").write_bytes(bytes(range(256)) * step)
  (path / "meta" / "metadata").write_text("{}")
  (path / "empty").write_bytes(b"")
  if complete:
    step_files.complete(directory, step, metrics or {})
  return path


def test_retention_by_hand(tmp_path):
  # Step 4 has no evaluation; of the equal steps 2 and 5 the first is better.
  losses = {1: 0.9, 2: 0.3, 3: math.nan, 5: 0.3, 6: 0.4, 7: math.inf, 8: 1.0}
  for step in range(1, 9):
    metrics = {"eval_loss": losses[step]} if step in losses else {}
    make(tmp_path, step, metrics)
  found = {i: step_files.manifest(tmp_path, i).metrics for i in range(1, 9)}
  for retention, kept in (
    (keep(newest=0), set(found)),
    (keep(newest=2), {7, 8}),
    (keep(newest=9), set(found)),
    (keep(newest=1, every=3), {3, 6, 8}),
    (keep(newest=1, best=9), {1, 2, 5, 6, 8}),
    (keep(newest=1, best=1, best_is="highest"), {8}),
    (keep(newest=1, best=9, metric="eval_rewards/accuracies"), {8}),
  ):
    assert retention.kept(found) == kept
  step_files.prune(tmp_path, keep(newest=1, every=4, best=1), {3})
  assert {path.name for path in tmp_path.iterdir()} == set("2348")


def kept_by_orbax(retention, found):
  """The same of Orbax's preservation policies."""
  sign = 1 if retention.best_is == "lowest" else -1
  ranks = {
    step: (sign * metrics[retention.metric], step)
    for step, metrics in found.items()
    if math.isfinite(metrics.get(retention.metric, math.nan))
  }
  rules = [
    policies.LatestN(retention.newest or None),
    policies.BestN(
      get_metric_fn=lambda rank: rank,
      reverse=True,
      # Asked for as many as there are steps, it keeps those without a metric.
      n=min(retention.best, len(ranks)),
      keep_checkpoints_without_metrics=False,
    ),
  ]
  if retention.every:
    rules.append(policies.EveryNSteps(retention.every))
  infos = [
    types.SimpleNamespace(step=step, metrics=ranks.get(step))
    for step in sorted(found)
  ]
  kept = policies.AnyPreservationPolicy(rules).should_preserve(
    infos, context=policies.PreservationContext()
  )
  return {info.step for info, keep in zip(infos, kept) if keep}


VALUES = st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.nan, math.inf, -math.inf])


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
  st.builds(
    keep,
    newest=st.integers(0, 4),
    every=st.integers(0, 4),
    best=st.integers(0, 10),
    best_is=st.sampled_from(["lowest", "highest"]),
  ),
  st.dictionaries(
    st.integers(1, 12),
    st.dictionaries(st.sampled_from(["eval_loss", "other"]), VALUES),
    max_size=10,
  ),
)
def test_retention_is_that_of_orbax(retention, found):
  assert retention.kept(found) == kept_by_orbax(retention, found)


def test_an_evaluation_can_be_noted_later(tmp_path):
  make(tmp_path, 4)
  step_files.note(tmp_path, 4, {"eval_loss": 0.25, "other": math.nan})
  assert step_files.manifest(tmp_path, 4).metrics == {"eval_loss": 0.25}
  # Killed in it, there is the temporary beside the old manifest.
  (tmp_path / "4" / ".manifest.json.0123456789ab.tmp").write_text("{")
  assert step_files.newest(tmp_path) == (4, [])


def test_steps_that_were_never_completed_are_not_counted(tmp_path):
  for step in (1, 2):
    make(tmp_path, step)
  make(tmp_path, 3, complete=False)
  step_files.prune(tmp_path, keep(newest=1))
  assert step_files.steps(tmp_path) == [2, 3]


def flip(path, bit=0):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1 << bit
  path.write_bytes(data)


FAULTS = {
  "a flipped bit": lambda path: flip(path / "trainable/d/array", 3),
  "a cut file": lambda path: os.truncate(path / "trainable/d/array", 100),
  "a file grown": lambda path: os.truncate(path / "empty", 1),
  "a missing file": lambda path: (path / "meta/metadata").unlink(),
  "a missing empty file": lambda path: (path / "empty").unlink(),
  "a missing directory": lambda path: shutil.rmtree(path / "trainable"),
  "a further file": lambda path: (path / "trainable/x").write_text(""),
  "no manifest": lambda path: (path / "manifest.json").unlink(),
  "an empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
  "a cut manifest": lambda path: os.truncate(path / "manifest.json", 80),
  "an edited manifest": lambda path: flip(path / "manifest.json"),
  "a manifest of another step": lambda path: shutil.copy(
    path.parent / "1" / "manifest.json", path / "manifest.json"
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_is_not_used(tmp_path, fault):
  for step in (1, 2, 3):
    path = make(tmp_path, step)
    assert step_files.problem(tmp_path, step) == ""
  assert step_files.newest(tmp_path) == (3, [])
  FAULTS[fault](path)
  step, problems = step_files.newest(tmp_path)
  assert step == 2
  (problem,) = problems
  assert problem.startswith(f"{path} is not used: ")
  step_files.tidy(tmp_path, step)
  # Nothing is deleted: it may be looked at, but is no step any more.
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"1", "2", "3.rejected"}
  assert step_files.newest(tmp_path) == (2, [])


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path):
  path = make(tmp_path, 1) / "manifest.json"
  whole = path.read_bytes()
  for place in range(len(whole)):
    data = bytearray(whole)
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    # White space alone says nothing.
    if step_files.problem(tmp_path, 1) == "":
      assert json.loads(data) == json.loads(whole)


def test_a_first_save_that_was_interrupted_starts_over(tmp_path):
  make(tmp_path, 2, complete=False)
  step, (problem,) = step_files.newest(tmp_path)
  assert step is None
  assert "its save was interrupted" in problem
  step_files.tidy(tmp_path, step)
  assert [path.name for path in tmp_path.iterdir()] == ["2.rejected"]


def test_nothing_is_started_over_where_a_step_was_whole(tmp_path):
  for step in (1, 2):
    flip(make(tmp_path, step) / "trainable/d/array")
  make(tmp_path, 3, complete=False)
  with pytest.raises(ValueError, match="holds no whole checkpoint") as error:
    step_files.newest(tmp_path)
  assert str(error.value).count(" is not used: ") == 3
  assert step_files.steps(tmp_path) == [1, 2, 3]


def test_half_written_and_half_deleted_steps_are_removed(tmp_path):
  make(tmp_path, 2)
  make(tmp_path, 1).rename(tmp_path / "1.deleting")
  (tmp_path / "4.orbax-checkpoint-tmp" / "trainable").mkdir(parents=True)
  step_files.tidy(tmp_path, 2)
  assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_what_no_run_wrote_is_refused(tmp_path):
  make(tmp_path, 2)
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"notes.txt is no checkpoint"):
    step_files.tidy(tmp_path, 2)
  assert (tmp_path / "notes.txt").exists()


def test_verify_and_list(tmp_path, capsys):
  def call(*arguments):
    code = checkpoint.main(list(arguments))
    return code, *capsys.readouterr()

  directory = tmp_path / "checkpoints"
  directory.mkdir()
  code, _, stderr = call("verify", str(tmp_path))
  assert (code, "holds no checkpoints" in stderr) == (2, True)
  make(directory, 1, {"eval_loss": 0.625})
  path = make(directory, 2)
  code, stdout, _ = call("list", str(tmp_path))
  assert code == 0
  # 256 bytes of the array and 2 of the metadata.
  assert stdout.splitlines() == [
    "step 1: 258 bytes, eval_loss 0.625",
    "step 2: 514 bytes",
  ]
  flip(path / "trainable/d/array")
  code, stdout, _ = call("verify", str(directory))
  assert code == 1
  assert stdout.splitlines() == [
    "step 1: whole",
    "step 2: it differs from its manifest in trainable/d/array",
  ]
  command = [sys.executable, "-m", "dpo_jax", "checkpoint", "verify", tmp_path]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (1, stdout)
