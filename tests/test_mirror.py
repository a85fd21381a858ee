"""Runs whose disk is lost, kept in a bucket: real HTTP, real kills.

The bucket is a server on this machine that speaks Google's JSON API, and
tensorstore is what speaks to it. Whatever happens, what a run on an empty disk
leaves at last is bit for bit what one that was never touched leaves.
"""

import importlib
import os
import shutil
import signal

import bucket_server
import pytest
import running

from dpo_jax.core import preemption
from dpo_jax.io import metrics, mirror, step_files, strict_json
from dpo_jax.io.mirror import contents, lease, objects
from dpo_jax.io.mirror import tables as mirror_tables
from dpo_jax.training import train


@pytest.fixture(scope="module")
def served():
  with bucket_server.serve() as bucket:
    yield bucket


@pytest.fixture
def bucket(served, monkeypatch):
  """The server; its objects stay from test to test, each has its own path."""
  for name, value in environment(served).items():
    monkeypatch.setenv(name, value)
  yield served
  served.go_on()
  served.heal()


def environment(bucket):
  return {
    "TENSORSTORE_GCS_HTTP_URL": bucket.address,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": bucket_server.TOKEN,
  }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return running.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
  """An uninterrupted run without a bucket."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train.run(running.configs(files)(), workdir)
  return workdir


@pytest.fixture
def config(files, request):
  """Settings with a path of the bucket that is the test's own."""

  def build(**changes):
    place = {"checkpoint_bucket": address(request)}
    return running.configs(files)(**place | changes)

  return build


def address(request):
  return f"gs://{bucket_server.BUCKET}/runs/{path(request)}"


def path(request):
  return request.node.name.replace("[", "-").replace("]", "")


@pytest.fixture
def here(request):
  """The test's own path in the bucket."""
  return f"runs/{path(request)}"


def assert_same(workdir, whole):
  assert running.read(workdir) == running.read(whole)
  assert running.weights(workdir) == running.weights(whole)
  assert listing(workdir) == listing(whole)
  directory = workdir / "checkpoints"
  for step in step_files.steps(directory):
    assert step_files.problem(directory, step) == ""


def listing(workdir):
  """All files but those of checkpoints, which orbax calls as it likes."""
  files = {p.relative_to(workdir) for p in workdir.rglob("*") if p.is_file()}
  return {p for p in files if p.parts[0] != "checkpoints"}


def tables(bucket, here):
  return [name for name in bucket.names(here) if name.startswith("steps/")]


def test_a_lost_disk_goes_on_from_the_bucket(
  bucket, here, config, whole, tmp_path
):
  """Killed amid the second upload: the next machine has the first."""
  workdir = tmp_path / "run"
  sent = []

  def some_later_part(method, name):
    if method == "POST" and tables(bucket, here) and "/objects/" in name:
      sent.append(name)
    return len(sent) > 3

  bucket.hold(some_later_part)
  with running.Child(
    tmp_path / "child", config(), workdir, **environment(bucket)
  ) as child:
    child.until(bucket.held.is_set)
    child.process.kill()
    assert child.end() == -signal.SIGKILL
  bucket.go_on()
  # Which step was put first is a matter of speed.
  (first,) = tables(bucket, here)
  shutil.rmtree(workdir)
  train.run(config(), workdir)
  starts = strict_json.read_object(workdir / "manifest.json")["starts"]
  assert [start["step"] for start in starts] == [0, int(first[6:12])]
  assert_same(workdir, whole)
  # Of the steps that retention keeps, the last is always there. Nothing is left
  # of the cut upload, and nobody owns the bucket.
  found = tables(bucket, here)
  assert found[-1] == "steps/000007.json"
  assert len(found) <= 2
  found.append("finished.json")
  made_of = [contents.decode(bucket.objects[f"{here}/{x}"][0]) for x in found]
  parts = set().union(*(table.parts() for table in made_of))
  assert set(bucket.names(here)) == {*found, *parts}
  # And a third machine finds all done.
  shutil.rmtree(workdir)
  train.run(config(), workdir)
  assert_same(workdir, whole)
  held = [p for p in workdir.rglob("*") if p.is_file()]
  assert not any(bucket_server.TOKEN.encode() in p.read_bytes() for p in held)


def test_a_bucket_that_fails_stops_nothing(
  bucket, here, config, whole, tmp_path
):
  """Every write of a part fails until the run has made its last step."""
  workdir = tmp_path / "run"
  finished = workdir / "finished.json"
  faults = iter(["cut", 503, 403, 500] * 1000)

  def broken(method, name):
    if method == "POST" and "/objects/" in name and not finished.exists():
      return next(faults)
    return None

  bucket.fault = broken
  train.run(config(), workdir)
  assert_same(workdir, whole)
  assert "steps/000007.json" in bucket.names(here)
  shutil.rmtree(workdir)
  train.run(config(), workdir)
  assert_same(workdir, whole)


@pytest.mark.slow
def test_a_run_that_cannot_be_copied_says_so_at_its_end(
  bucket, here, config, whole, tmp_path
):
  workdir = tmp_path / "run"
  bucket.fault = lambda method, name: 403 if "/objects/" in name else None
  with pytest.raises(mirror.NotCopied, match="the same command puts what is"):
    train.run(config(), workdir)
  assert_same(workdir, whole)
  assert bucket.names(here) == []
  bucket.heal()
  train.run(config(), workdir)
  assert "finished.json" in bucket.names(here)


@pytest.fixture(scope="module")
def finished(served, files, tmp_path_factory):
  """What the bucket holds of a finished run, each of whose steps is kept."""
  here = "runs/finished"
  workdir = tmp_path_factory.mktemp("kept") / "run"
  completed = mirror.Mirror.completed

  def one_by_one(self, step):
    completed(self, step)
    self._worker.submit(int).result()

  with pytest.MonkeyPatch.context() as patch:
    for name, value in environment(served).items():
      patch.setenv(name, value)
    patch.setattr(mirror.Mirror, "completed", one_by_one)
    place = f"gs://{bucket_server.BUCKET}/{here}"
    config = running.configs(files)
    train.run(config(checkpoint_bucket=place, keep_checkpoints=0), workdir)
  assert tables(served, here) == [f"steps/00000{x}.json" for x in (2, 4, 6, 7)]
  return {x: served.objects[f"{here}/{x}"][0] for x in served.names(here)}


@pytest.fixture
def kept(bucket, here, finished, tmp_path):
  """A finished run in the bucket, and an empty disk."""
  for name, content in finished.items():
    bucket.put(f"{here}/{name}", content)
  return tmp_path / "run"


def damage(bucket, here, table, name):
  """Flips a bit in the first part of a file that a table speaks of."""
  made = contents.decode(bucket.objects[f"{here}/{table}"][0])
  part = f"{here}/{contents.FOLDER}{made.files[name].parts[0]}"
  data = bytearray(bucket.objects[part][0])
  data[len(data) // 2] ^= 1
  bucket.put(part, bytes(data))


def test_what_is_still_being_written_is_not_copied(tmp_path):
  for name in ("step-2/a.bin", ".step-4.partial/a.bin", "step-2/b.bin.tmp"):
    file = tmp_path / "adapters" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"1")
  found = mirror_tables.beneath(tmp_path, "adapters")
  assert set(found) == {"adapters/step-2/a.bin"}


def test_a_damaged_step_is_passed_over(
  bucket, here, config, kept, whole, caplog
):
  damage(bucket, here, "steps/000007.json", "checkpoints/7/manifest.json")
  bucket.put(f"{here}/steps/000006.json", b"{}")
  train.run(config(keep_checkpoints=0), kept)
  assert "step 7 is not used" in caplog.text
  assert "steps/000006.json is not used" in caplog.text
  assert starts(kept)[-1] == 4
  assert_same(kept, whole)
  # A table of what was damaged is put aside, and the step is there anew.
  assert "rejected/000007.json" in bucket.names(here)
  shutil.rmtree(kept)
  train.run(config(keep_checkpoints=0), kept)
  assert_same(kept, whole)


def test_a_damaged_model_is_made_again(
  bucket, here, config, kept, whole, caplog
):
  damage(bucket, here, "finished.json", "export/model.safetensors")
  train.run(config(keep_checkpoints=0), kept)
  assert "the final model is not used, and made again" in caplog.text
  assert_same(kept, whole)


def test_nothing_is_started_over_where_a_step_was_whole(
  bucket, here, config, kept
):
  for step in (2, 4):
    file = f"checkpoints/{step}/manifest.json"
    damage(bucket, here, f"steps/00000{step}.json", file)
  for step in (6, 7):
    bucket.put(f"{here}/steps/00000{step}.json", b"{}")
  with pytest.raises(ValueError, match="holds no whole step any more"):
    train.run(config(keep_checkpoints=0), kept)
  assert not (kept / "config.json").exists()


def test_a_run_is_listed_verified_and_brought(
  bucket, here, kept, whole, request, capsys
):
  command = importlib.import_module("dpo_jax.io.mirror.__main__").main
  assert command(["list", address(request)]) == 0
  printed = capsys.readouterr().out.splitlines()
  steps = ["step 2", "step 4", "step 6", "step 7", "finished at step 7"]
  assert [line.partition(":")[0] for line in printed] == steps
  assert "eval_loss" in printed[2]
  assert command(["verify", address(request)]) == 0
  assert command(["fetch", address(request), str(kept)]) == 0
  assert_same(kept, whole)
  assert command(["fetch", address(request), str(kept)]) == 2
  damage(bucket, here, "steps/000004.json", "checkpoints/4/manifest.json")
  assert command(["verify", address(request)]) == 1
  assert "step 4: objects/" in capsys.readouterr().out
  assert command(["list", f"gs://{bucket_server.BUCKET}/nothing"]) == 2


def test_another_config_is_refused_by_every_key(bucket, here, config, kept):
  before = dict(bucket.objects)
  with pytest.raises(ValueError, match="begun with another config") as error:
    train.run(config(keep_checkpoints=0, seed=6, **{"loss.beta": 1.0}), kept)
  assert "config.loss.beta: 0.5 -> 1.0" in str(error.value)
  assert "config.seed: 5 -> 6" in str(error.value)
  assert here in str(error.value)
  assert not (kept / "config.json").exists()
  assert bucket.objects == before


@pytest.mark.slow
def test_whichever_is_newer_is_gone_on_from(
  bucket, here, config, whole, tmp_path
):
  """The disk of a first machine comes back; a second one had gone further."""
  first, second = tmp_path / "first", tmp_path / "second"
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, 4)
    with pytest.raises(preemption.Interrupted):
      train.run(config(), first)
  # It was put before the process ended, which was asked to.
  assert tables(bucket, here)[-1] == "steps/000005.json"
  shutil.copytree(first, second)
  shutil.rmtree(second / "checkpoints" / "5")
  train.run(config(), second)
  assert starts(second) == [0, 5]
  train.run(config(), first)
  assert starts(first) == [0, 5]
  assert_same(first, whole)
  assert_same(second, whole)


def starts(workdir):
  found = strict_json.read_object(workdir / "manifest.json")["starts"]
  return [start["step"] for start in found]


def stop_after(patch, step):
  """SIGTERM as the metrics of a step are written."""
  original = metrics.Writer.write

  def write(writer, row):
    if row["step"] == step and "loss" in row:
      os.kill(os.getpid(), signal.SIGTERM)
    original(writer, row)

  patch.setattr(metrics.Writer, "write", write)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda bucket: None, "The specified bucket does not exist"),
    (lambda b: setattr(b, "fault", lambda *_: 403), "PERMISSION_DENIED"),
    (lambda b: setattr(b, "listed", False), "storage.objects.list"),
  ],
)
def test_a_bucket_that_cannot_be_used_is_refused_first(
  bucket, config, files, tmp_path, monkeypatch, change, message
):
  monkeypatch.setattr(train.setup, "assemble", None)
  change(bucket)
  place = {} if message.startswith(("PERM", "storage")) else OTHER
  with pytest.raises(ValueError, match=message) as error:
    train.run(config(**place), tmp_path / "run")
  assert "credentials" in str(error.value)
  assert bucket_server.TOKEN not in str(error.value)


OTHER = {"checkpoint_bucket": "gs://no-such-bucket/runs/x"}


@pytest.mark.parametrize(
  "name",
  [
    "runs/x",
    "gs://b",
    "gs://my-bucket",
    "gs://my-bucket/a/../b",
    "s3://my-bucket/a",
    "gs://My/a",
  ],
)
def test_an_address_that_is_none_is_refused(config, name):
  with pytest.raises(
    ValueError, match=r"checkpoint_bucket: .* must be gs://bucket"
  ):
    config(checkpoint_bucket=name)


def test_retention_and_parts_by_hand(bucket, here, tmp_path, monkeypatch):
  """Files of several parts; a part of no table, and steps, are deleted."""
  monkeypatch.setattr(contents, "PART_BYTES", 10)
  workdir, again = tmp_path / "run", tmp_path / "again"
  (workdir / "metrics.jsonl").parent.mkdir()
  retention = step_files.Retention(1, 2, 0, "eval_loss", "lowest")
  place = f"gs://{bucket_server.BUCKET}/{here}"
  bucket.put(f"{here}/objects/{'0' * 64}", b"of an upload that was cut")
  seen = []
  with mirror.Mirror(place, workdir, retention) as copies:
    for step in range(1, 5):
      file = workdir / "checkpoints" / str(step) / "d" / "weights"
      file.parent.mkdir(parents=True)
      file.write_bytes(bytes(range(step, step + 95)))
      step_files.complete(workdir / "checkpoints", step, {})
      (workdir / "metrics.jsonl").write_text("row\n" * step)
      copies.completed(step)
      copies._worker.submit(int).result()
      seen.append([int(name[6:12]) for name in tables(bucket, here)])
  assert seen == [[1], [2], [2, 3], [2, 4]]
  made = contents.decode(bucket.objects[f"{here}/steps/000004.json"][0])
  assert len(made.files["checkpoints/4/d/weights"].parts) == 10
  assert made.files["metrics.jsonl"].bytes == 16
  older = contents.decode(bucket.objects[f"{here}/steps/000002.json"][0])
  parts = made.parts() | older.parts()
  assert set(bucket.names(here)) == {*tables(bucket, here), *parts}
  store = objects.Store(place)
  mirror_tables.bring(store, made, again)
  for name in ("checkpoints/4/d/weights", "metrics.jsonl"):
    assert (again / name).read_bytes() == (workdir / name).read_bytes()
  assert step_files.problem(again / "checkpoints", 4) == ""


def test_a_step_on_its_way_stays_on_the_disk(bucket, here, tmp_path):
  directory = tmp_path / "run" / "checkpoints"
  for step in (1, 2):
    file = directory / str(step) / "weights"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(step))
    step_files.complete(directory, step, {})
  retention = step_files.Retention(1, 0, 0, "eval_loss", "lowest")
  place = f"gs://{bucket_server.BUCKET}/{here}"
  with mirror.Mirror(place, tmp_path / "run", retention) as copies:
    bucket.hold(lambda method, name: "/objects/" in name)
    copies.completed(1)
    assert bucket.held.wait(60)
    step_files.prune(directory, retention, copies.held())
    assert step_files.steps(directory) == [1, 2]
    bucket.go_on()
    copies._worker.submit(int).result()
    assert tables(bucket, here) == ["steps/000001.json"]
    step_files.prune(directory, retention, copies.held())
    assert step_files.steps(directory) == [2]


def test_what_was_changed_on_the_disk_is_not_copied(
  bucket, here, tmp_path, caplog
):
  workdir = tmp_path / "run"
  file = workdir / "checkpoints" / "1" / "weights"
  file.parent.mkdir(parents=True)
  file.write_bytes(b"abc")
  step_files.complete(workdir / "checkpoints", 1, {})
  file.write_bytes(b"abd")
  retention = step_files.Retention(1, 0, 0, "eval_loss", "lowest")
  place = f"gs://{bucket_server.BUCKET}/{here}"
  with mirror.Mirror(place, workdir, retention) as copies:
    copies.completed(1)
  assert "weights is not what was written" in caplog.text
  assert tables(bucket, here) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_a_table_cannot_name_a_file_elsewhere(name):
  made = contents.File(0, "ab" * 32, ())
  data = contents.encode(contents.Contents(1, {}, {name: made}))
  with pytest.raises(contents.Damaged, match="would leave the directory"):
    contents.decode(data)


# --- who writes there


def test_a_second_run_is_refused_while_the_first_lives(bucket, here):
  store = objects.Store(f"gs://{bucket_server.BUCKET}/{here}")
  with lease.Lease(store, lasting_s=0.4) as first:
    with (
      pytest.raises(lease.Held, match="is held by pid"),
      lease.Lease(store, 0.4),
    ):
      pass
    first.check()
  assert bucket.names(here) == []


def test_what_is_not_renewed_is_taken_over_and_its_holder_told(bucket, here):
  store = objects.Store(f"gs://{bucket_server.BUCKET}/{here}", tries=1)
  with lease.Lease(store, lasting_s=0.4) as first:
    # Its machine stands still: what it sends does not arrive.
    first._ended.set()
    first._thread.join()
    with lease.Lease(store, lasting_s=0.4) as second:
      with pytest.raises(lease.Lost, match="was taken over by pid"):
        first.check()
      second.check()
  assert bucket.names(here) == []


def test_an_answer_that_was_lost_is_not_taken_for_another_holder(bucket, here):
  store = objects.Store(f"gs://{bucket_server.BUCKET}/{here}")
  with lease.Lease(store, lasting_s=100) as held:
    name = f"{here}/{lease.NAME}"
    # The write was done, but its generation never came back.
    bucket.put(name, bucket.objects[name][0])
    held._renewed_s -= 60
    held.check()
  assert bucket.names(here) == []


def test_a_run_that_was_taken_over_stops(
  bucket, here, config, tmp_path, monkeypatch
):
  """Another process writes its mark while the first copy is on its way."""
  put, put_mark = contents.put, lease.Lease._put

  def taken_over_first(*arguments):
    bucket.put(f"{here}/{lease.NAME}", b'{"pid": 1, "host": "elsewhere"}')
    return put(*arguments)

  def long_ago(self, generation):
    made = put_mark(self, generation)
    self._renewed_s -= lease.LASTING_S
    return made

  monkeypatch.setattr(contents, "put", taken_over_first)
  # So that the lease is looked at before each write.
  monkeypatch.setattr(lease.Lease, "_put", long_ago)
  with pytest.raises(lease.Lost, match="was taken over by pid 1 on elsewhere"):
    train.run(config(), tmp_path / "run")
  assert tables(bucket, here) == []
