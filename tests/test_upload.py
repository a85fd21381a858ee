"""Runs whose disk is lost, kept in a bucket: real files, real HTTP, real kills.

Buckets are directories and memory, and a server on this machine that speaks
Google's JSON API. Whatever happens, what a run on an empty disk leaves at last
is bit for bit what one that was never touched leaves.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent import futures

import bucket_server
import pytest
import running
from fsspec import config as fsspec_config

from dpo_jax.cli import checkpoint
from dpo_jax.data import dataset
from dpo_jax.io import bucket as bucket_lib
from dpo_jax.io import step_files, strict_json, upload
from dpo_jax.training import train

KEEP = 1
OF_MANIFEST = re.compile(r"/(\d{6}|finished)\.json$")


@pytest.fixture(scope="module")
def served():
  with bucket_server.serve() as bucket:
    yield bucket


@pytest.fixture
def gcs(served, monkeypatch):
  """The server; its objects stay from test to test, each has its own path."""
  import gcsfs.retry

  for name, value in served.environment().items():
    monkeypatch.setenv(name, value)
  # fsspec read the environment when it was imported.
  token = {"token": bucket_server.TOKEN}
  monkeypatch.setitem(fsspec_config.conf, "gcs", token)
  # It waits for 31 s in all between the attempts of a request.
  at_once = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0))
  monkeypatch.setattr(gcsfs.retry, "asyncio", at_once)
  yield served
  served.go_on()
  served.heal()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return running.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
  """An uninterrupted run, each of whose steps is kept in a bucket beside it."""
  place = tmp_path_factory.mktemp("whole")
  completed = upload.Uploader.completed

  def one_by_one(self, step):
    completed(self, step)
    self._worker.submit(int).result()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(upload.Uploader, "completed", one_by_one)
    config = running.configs(files)(
      checkpoint_bucket=f"file://{place}/bucket", keep_checkpoints=0
    )
    train.run(config, place / "run")
  assert [*look(config.checkpoint_bucket).steps] == [2, 4, 6, 7]
  return place / "run"


@pytest.fixture
def address(request):
  """The test's own path in the server's bucket."""
  name = re.sub(r"\W", "-", request.node.name)
  return f"gs://{bucket_server.BUCKET}/runs/{name}"


@pytest.fixture
def path(address):
  """The same without the bucket's name."""
  return address.removeprefix(f"gs://{bucket_server.BUCKET}/")


@pytest.fixture
def config(files):
  return running.configs(files)


def assert_same(workdir, whole):
  assert running.read(workdir) == running.read(whole)
  assert running.weights(workdir) == running.weights(whole)
  assert listing(workdir) == listing(whole)
  directory = workdir / "checkpoints"
  for step in step_files.steps(directory):
    assert step_files.problem(directory, step) == ""


def listing(workdir):
  """All files but those of checkpoints, which orbax calls as it likes."""
  found = {p.relative_to(workdir) for p in workdir.rglob("*") if p.is_file()}
  return {p for p in found if p.parts[0] != "checkpoints"}


def starts(workdir):
  found = strict_json.read_object(workdir / "manifest.json")["starts"]
  return [start["step"] for start in found]


def look(address):
  return bucket_lib.look(bucket_lib.connect(address))


def assert_nothing_is_left_over(address):
  """Every object is a manifest, or of one."""
  there = look(address)
  live = {f"{m.folder}/{x}" for m in there.manifests.values() for x in m.files}
  assert {*there.names} == {*there.manifests, *live}


# --- the uploader alone


def make_step(workdir, step, content=b"weights"):
  file = workdir / "checkpoints" / str(step) / "d" / "weights"
  file.parent.mkdir(parents=True)
  file.write_bytes(content)
  (workdir / "config.json").write_text("{}")
  (workdir / "metrics.jsonl").write_text("row\n" * step)
  step_files.complete(workdir / "checkpoints", step)


def make_finished(workdir, step):
  (workdir / "export").mkdir()
  (workdir / "export" / "model.safetensors").write_bytes(b"model")
  (workdir / "finished.json").write_text(json.dumps({"step": step}))


@pytest.fixture
def memory():
  """An address in memory."""
  yield "memory:///bucket/run"
  bucket = bucket_lib.connect("memory:///bucket")
  for name in bucket.find(""):
    bucket.rm_file(name)


def push(uploader, step):
  uploader.completed(step)
  uploader._worker.submit(int).result()


# --- a process that is killed

UPLOADS = """
import pathlib, sys
from dpo_jax.io import step_files, upload
address, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
with upload.Uploader(address, workdir, 1) as uploader:
  steps = step_files.steps(workdir / "checkpoints")
  if not steps:
    uploader.fetch({}, ())
  for step in steps:
    uploader.completed(step)
    uploader._worker.submit(int).result()
"""


def amid_objects(act, name, manifests, objects, deletes):
  return act == "write" and manifests == 1 and objects > 3


def at_the_manifest(act, name, manifests, objects, deletes):
  return act == "write" and manifests == 2 and OF_MANIFEST.search(name)


def after_the_manifest(act, name, manifests, objects, deletes):
  return act == "list" and manifests == 2


def amid_deletes(act, name, manifests, objects, deletes):
  return act == "delete" and manifests == 2 and deletes > 2


def is_manifest(act, name):
  return act == "write" and bool(OF_MANIFEST.search(name))


def until(gcs, path, moment):
  """The condition on a request that a moment of an upload to a path is."""

  def stop(act, name):
    asked = [x for x in gcs.asked if x[1].startswith(path)]
    manifests = [i for i, x in enumerate(asked) if is_manifest(*x)]
    since = [x[0] for x in asked[manifests[-1] :]] if manifests else []
    counts = (len(manifests), since.count("write"), since.count("delete"))
    return moment(act, name, *counts)

  return stop


def kill(gcs, stop, *command):
  """Kills a child process at the request that `stop` is true of."""
  gcs.hold(stop)
  with subprocess.Popen(
    [sys.executable, *map(str, command)],
    cwd=running.ROOT,
    env=os.environ | {"PYTHONPATH": str(running.ROOT)} | gcs.environment(),
  ) as child:
    held = gcs.held.wait(60)
    child.kill()
  assert held
  gcs.go_on()


@pytest.mark.parametrize(
  "moment", [amid_objects, at_the_manifest, after_the_manifest, amid_deletes]
)
def test_killed_in_an_upload_the_newest_whole_step_counts(
  gcs, address, path, tmp_path, moment
):
  """Killed amid the second upload, before or after its manifest."""
  for step in (1, 2):
    make_step(tmp_path / "run", step)
  stop = until(gcs, path, moment)
  kill(gcs, stop, "-c", UPLOADS, address, tmp_path / "run")
  if moment is at_the_manifest:
    gcs.until(f"{path}/000002.json")
  whole, again = 1 if moment is amid_objects else 2, tmp_path / "again"
  with upload.Uploader(address, again, KEEP) as uploader:
    uploader.fetch({}, ())
    assert step_files.newest(again / "checkpoints") == (whole, [])
    assert (again / "metrics.jsonl").exists()
    make_step(again, 3)
    push(uploader, 3)
  assert [*look(address).manifests] == ["000003.json"]
  assert_nothing_is_left_over(address)


def test_killed_in_a_download_the_next_one_is_whole(
  gcs, address, path, tmp_path
):
  make_step(tmp_path / "run", 1)
  with upload.Uploader(address, tmp_path / "run", KEEP) as uploader:
    push(uploader, 1)
  reads = []

  def stop(act, name):
    reads.append(act == "read" and name.startswith(f"{path}/000001-"))
    return sum(reads) > 3

  again = tmp_path / "again"
  kill(gcs, stop, "-c", UPLOADS, address, again)
  assert [p.name for p in again.iterdir()] == [".download"]
  with upload.Uploader(address, again, KEEP) as uploader:
    uploader.fetch({}, ())
  assert step_files.newest(again / "checkpoints") == (1, [])
  names = {"checkpoints", "config.json", "metrics.jsonl"}
  assert {p.name for p in again.iterdir()} == names


def test_killed_in_an_upload_an_empty_disk_goes_on(
  gcs, address, path, config, whole, tmp_path
):
  """Killed at the second manifest; the third machine finds all done."""
  workdir = tmp_path / "run"
  settings = config(checkpoint_bucket=address, keep_checkpoints=1)
  gcs.hold(until(gcs, path, at_the_manifest))
  with running.Child(
    tmp_path / "child", settings, workdir, **gcs.environment()
  ) as child:
    child.until(gcs.held.is_set)
    child.process.kill()
    assert child.end() == -signal.SIGKILL
  mine = [x for x in gcs.asked if is_manifest(*x) and x[1].startswith(path)]
  last = mine[-1][1]
  gcs.go_on()
  gcs.until(last)
  shutil.rmtree(workdir)
  train.run(settings, workdir)
  assert len(mine) == 2
  assert starts(workdir) == [0, int(OF_MANIFEST.search(last)[1])]
  assert_same(workdir, whole)
  assert [*look(address).manifests] == ["000007.json", "finished.json"]
  assert_nothing_is_left_over(address)
  shutil.rmtree(workdir)
  train.run(settings, workdir)
  assert_same(workdir, whole)
  held = [p for p in workdir.rglob("*") if p.is_file()]
  assert not any(bucket_server.TOKEN.encode() in p.read_bytes() for p in held)


def test_whichever_is_newer_is_gone_on_from(memory, tmp_path):
  """The disk of a first machine comes back; a second one had gone further."""
  first, second = tmp_path / "first", tmp_path / "second"
  for workdir, step in (first, 1), (second, 2):
    make_step(workdir, step, str(workdir).encode())
  for workdir, newest in (first, 1), (second, 2), (first, 2):
    with upload.Uploader(memory, workdir, KEEP) as uploader:
      uploader.fetch({}, ())
    assert step_files.newest(workdir / "checkpoints") == (newest, [])
    assert [*look(memory).steps] == [newest]
  weights = first / "checkpoints" / "2" / "d" / "weights"
  assert weights.read_bytes() == str(second).encode()
  assert (first / "metrics.jsonl").read_text() == "row\n" * 2


# --- a bucket that fails


def of_a_run(act, name):
  return act == "write" and not name.endswith("/probe")


@pytest.mark.parametrize(
  ("fault", "reason"),
  [(403, "Forbidden"), (503, "out of order"), ("silent", "TimeoutError")],
)
def test_a_bucket_that_fails_is_named_at_the_end(
  gcs, address, tmp_path, monkeypatch, fault, reason
):
  """Every object is refused; then it heals, and the end makes up for it."""
  make_step(tmp_path, 1)
  make_finished(tmp_path, 1)
  monkeypatch.setattr(bucket_lib, "_TIMEOUT_S", 0.5)
  with upload.Uploader(address, tmp_path, KEEP) as uploader:
    if fault == "silent":
      gcs.hold(of_a_run)
    else:
      gcs.fault = lambda *asked: fault if of_a_run(*asked) else None
    push(uploader, 1)
    with pytest.raises(upload.NotCopied, match=reason):
      uploader.finish()
    assert not look(address).manifests
    gcs.go_on()
    gcs.heal()
    uploader.finish()
  assert [*look(address).manifests] == ["000001.json", "finished.json"]


def test_a_bucket_that_fails_stops_nothing(
  gcs, address, config, whole, tmp_path
):
  workdir = tmp_path / "run"
  settings = config(checkpoint_bucket=address)
  gcs.fault = lambda *asked: 503 if of_a_run(*asked) else None
  with pytest.raises(upload.NotCopied, match="out of order"):
    train.run(settings, workdir)
  assert_same(workdir, whole)
  gcs.heal()
  train.run(settings, workdir)
  assert {"000007.json", "finished.json"} <= {*look(address).manifests}


@pytest.mark.parametrize(
  ("refused", "message"),
  [(None, "no-such-bucket"), ("list", "Forbidden"), ("delete", "Forbidden")],
)
def test_a_bucket_that_cannot_be_used_is_refused_first(
  gcs, address, config, tmp_path, monkeypatch, refused, message
):
  monkeypatch.setattr(dataset, "prepare", pytest.fail)
  gcs.fault = lambda act, name: 403 if act == refused else None
  place = address if refused else "gs://no-such-bucket/runs/x"
  with pytest.raises(ValueError, match=message) as error:
    train.run(config(checkpoint_bucket=place), tmp_path / "run")
  assert "credentials" in str(error.value)
  assert bucket_server.TOKEN not in str(error.value)


@pytest.mark.parametrize(
  "name",
  [
    "runs/x",
    "gs://my-bucket",
    "gs://my-bucket/",
    "gs://my-bucket/a/../b",
    "gs://my-bucket/a//b",
    "s3://my-bucket/a",
    "gs://My/a",
    "file://relative/a",
  ],
)
def test_an_address_that_is_none_is_refused(config, name):
  with pytest.raises(
    ValueError, match=r"checkpoint_bucket: .* must be gs://bucket"
  ):
    config(checkpoint_bucket=name)


def test_a_client_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  known = sys.modules["fsspec.registry"]._registry
  monkeypatch.delitem(known, "gs", raising=False)
  with pytest.raises(ValueError, match=r"dpo-jax\[gcs\]"):
    bucket_lib.connect("gs://my-bucket/a")


# --- damage in the bucket of a finished run


@pytest.fixture
def kept(whole, config, tmp_path):
  """A copy of a run's bucket, an empty disk, and the run's settings."""
  shutil.copytree(whole.parent / "bucket", tmp_path / "bucket")
  address = f"file://{tmp_path}/bucket"

  def build(**changes):
    place = {"checkpoint_bucket": address, "keep_checkpoints": 0}
    return config(**place | changes)

  return tmp_path / "bucket", tmp_path / "run", build


def damage(bucket, manifest, name):
  """Flips a bit in an object of a manifest."""
  found = step_files.decode((bucket / manifest).read_bytes())
  path = bucket / found.folder / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_folders_that_are_being_written_are_passed_over(tmp_path):
  """They get their name while the others are listed."""
  whole = tmp_path / "adapters" / "step-1"
  whole.mkdir(parents=True)
  (whole / "adapter_config.json").write_text("{}")
  done = threading.Event()

  def write():
    partial = tmp_path / "adapters" / ".step-2.partial"
    while not done.is_set():
      (partial / "a").mkdir(parents=True)
      partial.rename(partial.with_name(".step-3.partial"))
      shutil.rmtree(partial.with_name(".step-3.partial"))

  with futures.ThreadPoolExecutor(1) as pool:
    writing = pool.submit(write)
    try:
      for _ in range(300):
        found = upload._files(tmp_path, ("adapters",))
        assert found == ["adapters/step-1/adapter_config.json"]
    finally:
      done.set()
    writing.result()


def test_a_damaged_step_is_passed_over(kept, whole, caplog):
  bucket, workdir, config = kept
  address = config().checkpoint_bucket
  damage(bucket, "000007.json", "checkpoints/7/manifest.json")
  (bucket / "000006.json").write_text("{}")
  train.run(config(), workdir)
  for step in (6, 7):
    assert f"bucket/00000{step}.json is not used" in caplog.text
  assert starts(workdir)[-1] == 4
  assert_same(workdir, whole)
  # They were uploaded anew, and then the damaged objects were deleted.
  assert [*look(address).steps] == [2, 4, 6, 7]
  assert_nothing_is_left_over(address)
  damage(bucket, "finished.json", "export/model.safetensors")
  for whole_again in (False, True):
    caplog.clear()
    shutil.rmtree(workdir)
    train.run(config(), workdir)
    assert ("finished.json is not used" in caplog.text) != whole_again
    assert_same(workdir, whole)


def test_stopped_as_files_arrive_the_same_command_goes_on(
  kept, whole, monkeypatch
):
  """Between the first file that is moved into place and the rest."""
  _, workdir, config = kept
  replace, moved = pathlib.Path.replace, []

  def once(self, target):
    if moved:
      running.interrupt()
    moved.append(target.name)
    return replace(self, target)

  monkeypatch.setattr(pathlib.Path, "replace", once)
  with pytest.raises(KeyboardInterrupt):
    train.run(config(), workdir)
  monkeypatch.undo()
  assert moved == ["config.json"]
  train.run(config(), workdir)
  assert_same(workdir, whole)


def test_nothing_is_started_over_where_a_step_was_whole(kept):
  bucket, workdir, config = kept
  for step in (2, 4):
    damage(bucket, f"00000{step}.json", f"checkpoints/{step}/manifest.json")
  for step in (6, 7):
    (bucket / f"00000{step}.json").write_text("{}")
  before = {p: p.read_bytes() for p in bucket.rglob("*") if p.is_file()}
  for _ in range(2):
    with pytest.raises(ValueError, match="holds no whole step any more"):
      train.run(config(), workdir)
  assert not (workdir / "config.json").exists()
  after = {p: p.read_bytes() for p in bucket.rglob("*") if p.is_file()}
  assert after == before


def test_another_config_is_refused_by_every_key(kept):
  bucket, workdir, config = kept
  with pytest.raises(ValueError, match="begun with another config") as error:
    train.run(config(seed=6, **{"loss.beta": 1.0}), workdir)
  assert "config.loss.beta: 0.5 -> 1.0" in str(error.value)
  assert "config.seed: 5 -> 6" in str(error.value)
  assert str(bucket) in str(error.value)
  assert not (workdir / "config.json").exists()


def test_a_run_is_listed_verified_and_fetched(kept, whole, capsys):
  bucket, workdir, config = kept
  address = config().checkpoint_bucket
  assert checkpoint.main(["list", address]) == 0
  printed = capsys.readouterr().out.splitlines()
  names = ["step 2", "step 4", "step 6", "step 7", "finished at step 7"]
  assert [line.partition(":")[0] for line in printed] == names
  assert "bytes" in printed[2]
  assert checkpoint.main(["verify", address]) == 0
  assert checkpoint.main(["fetch", address, str(workdir)]) == 0
  assert_same(workdir, whole)
  assert checkpoint.main(["fetch", address, str(workdir)]) == 2
  damage(bucket, "000007.json", "checkpoints/7/manifest.json")
  assert checkpoint.main(["verify", address]) == 1
  assert "step 7: 000007-" in capsys.readouterr().out
  # The one before it is fetched, and the exit code says that one is damaged.
  other = workdir.with_name("other")
  assert checkpoint.main(["fetch", address, str(other)]) == 1
  assert step_files.steps(other / "checkpoints") == [6]
  assert checkpoint.main(["list", f"{address}/nothing"]) == 2


# --- what is kept, and by whom


def test_retention_by_hand(memory, tmp_path):
  """Older steps go, and objects of no manifest but newer ones."""
  bucket = bucket_lib.connect(memory)
  for folder in ("000001-aaaaaaaaaaaa", "000009-aaaaaaaaaaaa"):
    bucket.pipe_file(f"{folder}/cut", b"of an upload that was cut")
  seen = []
  with upload.Uploader(memory, tmp_path, 2) as uploader:
    for step in range(1, 6):
      make_step(tmp_path, step)
      push(uploader, step)
      seen.append([*look(memory).steps])
  assert seen == [[1], [1, 2], [2, 3], [3, 4], [4, 5]]
  there = look(memory)
  live = {f"{m.folder}/{x}" for m in there.manifests.values() for x in m.files}
  spared = {"000009-aaaaaaaaaaaa/cut"}
  assert {*there.names} == {*there.manifests, *live, *spared}
  again = tmp_path / "again"
  bucket_lib.download(bucket, there.steps[4], again)
  name = "checkpoints/4/d/weights"
  assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
  assert (again / "metrics.jsonl").read_text() == "row\n" * 4
  assert step_files.problem(again / "checkpoints", 4) == ""


def test_a_step_on_its_way_stays_on_the_disk(gcs, address, tmp_path):
  directory = tmp_path / "checkpoints"
  for step in (1, 2):
    make_step(tmp_path, step)
  with upload.Uploader(address, tmp_path, KEEP) as uploader:
    gcs.hold(lambda act, name: act == "write")
    began_s = time.monotonic()
    uploader.completed(1)
    assert time.monotonic() - began_s < 1
    assert gcs.held.wait(60)
    step_files.prune(directory, KEEP, uploader.held())
    assert step_files.steps(directory) == [1, 2]
    gcs.go_on()
    uploader._worker.submit(int).result()
    step_files.prune(directory, KEEP, uploader.held())
    assert step_files.steps(directory) == [2]


def test_a_second_writer_of_a_step_is_refused(memory, tmp_path, caplog):
  """Both go on; the first's step stays, and the second's end says so."""
  first, second = tmp_path / "first", tmp_path / "second"
  with contextlib.ExitStack() as stack:
    for workdir in (first, second):
      for step in (1, 2, 3):
        make_step(workdir, step, str(workdir).encode())
      make_finished(workdir, 3)
    runs = [
      stack.enter_context(upload.Uploader(memory, workdir, 0))
      for workdir in (first, second)
    ]
    # The last was seen there before it was tried.
    for uploader, step in (0, 1), (1, 1), (0, 2), (1, 3), (1, 2):
      push(runs[uploader], step)
    said = re.findall(r"00000(\d).json was uploaded by another", caplog.text)
    assert said == ["1", "2"]
    with pytest.raises(upload.NotCopied, match="by another process"):
      runs[0].finish()
    with pytest.raises(upload.NotCopied, match="by another process"):
      runs[1].finish()
  bucket_lib.download(
    bucket_lib.connect(memory), look(memory).steps[1], tmp_path / "again"
  )
  found = (tmp_path / "again/checkpoints/1/d/weights").read_bytes()
  assert found == str(first).encode()


# Of aiohttp, to gcsfs, which sends chunks as they are.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_lost_answer_is_not_taken_for_another_writer(gcs, address, tmp_path):
  """The manifest was created, but nobody heard; the weights come in chunks."""
  make_step(tmp_path, 1, os.urandom(6 * 2**20))
  make_finished(tmp_path, 1)
  gcs.fault = lambda act, name: "lost" if is_manifest(act, name) else None
  with upload.Uploader(address, tmp_path, KEEP) as uploader:
    push(uploader, 1)
    gcs.heal()
    uploader.finish()
  assert_nothing_is_left_over(address)
  again = tmp_path / "again"
  bucket = bucket_lib.connect(address)
  bucket_lib.download(bucket, look(address).steps[1], again)
  assert step_files.problem(again / "checkpoints", 1) == ""


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a\0b"])
def test_a_manifest_cannot_name_a_file_elsewhere(memory, name):
  files = {name: step_files.File(0, "")}
  bucket = bucket_lib.connect(memory)
  for folder in ("000001-aaaaaaaaaaaa", name):
    manifest = step_files.Manifest(1, files if folder != name else {}, folder)
    bucket.pipe_file("000001.json", step_files.encode(manifest))
    there = look(memory)
    assert not there.manifests
    assert list(there.damaged) == ["000001.json"]


def test_another_format_is_refused_and_stays(memory):
  bucket = bucket_lib.connect(memory)
  manifest = step_files.Manifest(1, {}, "000001-aaaaaaaaaaaa")
  values = json.loads(step_files.encode(manifest))
  del values["sha256"]
  values["format"] += 1
  values["sha256"] = step_files._own_hash(values)
  bucket.pipe_file("000001.json", json.dumps(values).encode())
  with pytest.raises(ValueError, match=r"000001.json: a checkpoint of format"):
    look(memory)
