"""Models and data of gs://, through fsspec over a bucket in memory.

All but the network is what runs for a real bucket: fsspec is asked for the file
system of gs://, and finds this one in gcsfs's place.
"""

import pathlib
import sys
from typing import ClassVar

import bucket_server
import fsspec.config
import gcsfs
import jax
import numpy as np
import pytest
import running
from fsspec.implementations import memory

from dpo_jax.cli import flags
from dpo_jax.data import sources, tokenizer
from dpo_jax.io import remote
from dpo_jax.model import hf
from dpo_jax.sampling import response_files
from dpo_jax.training import score

HERE = "gs://bucket/files"


class Bucket(memory.MemoryFileSystem):
  """Objects by name."""

  store: ClassVar[dict] = {}
  pseudo_dirs: ClassVar[list] = [""]
  protocol = ("gs", "gcs")
  opened: ClassVar[list] = []

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix("gs://"))

  def _open(self, path, mode="rb", **kwargs):
    if mode == "rb":
      self.opened.append(path.rpartition("/")[2])
    return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """An empty bucket, and a home whose cache is empty."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  known = sys.modules["fsspec.registry"]._registry
  monkeypatch.setitem(known, "gs", Bucket)
  yield Bucket()
  Bucket.store.clear()
  Bucket.pseudo_dirs[:] = [""]
  Bucket.opened.clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return running.make_files(tmp_path_factory.mktemp("files"))


def put(bucket, directory, at):
  for path in directory.rglob("*"):
    if path.is_file():
      name = f"{at}/{path.relative_to(directory)}"
      bucket.pipe_file(name, path.read_bytes())


OPTIONS = {
  "dtype": "float32",
  "remat": "none",
  "lora": None,
  "param_dtype": "float32",
}


def test_models_tokenizers_and_data_are_those_of_the_files(bucket, files):
  put(bucket, files, HERE)
  # What is never read is never fetched.
  bucket.pipe_file(f"{HERE}/model/pytorch_model.bin", b"pickled")
  _, base = hf.load(f"{HERE}/model", **OPTIONS)
  _, wanted = hf.load(files / "model", **OPTIONS)
  jax.tree.map(np.testing.assert_array_equal, base, wanted)
  assert "pytorch_model.bin" not in Bucket.opened
  words = tokenizer.load(f"{HERE}/tokenizer")
  assert words.fingerprint == tokenizer.load(files / "tokenizer").fingerprint
  hashes = {
    response_files.weights(x) for x in (f"{HERE}/model", files / "model")
  }
  assert len(hashes) == 1
  pairs = sources.read_file(f"{HERE}/train.jsonl")
  assert pairs.rows == sources.read_file(str(files / "train.jsonl")).rows
  assert len(score.read_pairs(f"{HERE}/train.jsonl", words)) == 30


def test_an_object_is_copied_again_only_when_it_changed(bucket):
  bucket.pipe_file(f"{HERE}/a.json", b"1")
  bucket.pipe_file(f"{HERE}/b.json", b"2")
  bucket.pipe_file(f"{HERE}/deep/c.json", b"3")
  for _ in range(2):
    path = remote.fetch_objects(HERE, ["*.json"])
    assert {p.name for p in path.iterdir()} == {"a.json", "b.json"}
  assert sorted(Bucket.opened) == ["a.json", "b.json"]
  bucket.pipe_file(f"{HERE}/a.json", b"11")
  bucket.rm(f"{HERE}/b.json")
  path = remote.fetch_objects(HERE, ["*.json"])
  assert [p.read_bytes() for p in path.iterdir()] == [b"11"]
  assert sorted(Bucket.opened) == ["a.json", "a.json", "b.json"]
  path = remote.fetch_objects(HERE, ["*.json"], deep=True)
  assert (path / "deep" / "c.json").read_bytes() == b"3"


def test_a_copy_that_is_cut_is_never_taken(bucket, monkeypatch):
  bucket.pipe_file(f"{HERE}/a.json", b"12345")
  monkeypatch.setattr(
    Bucket, "get_file", lambda _, path, to: pathlib.Path(to).write_bytes(b"12")
  )
  with pytest.raises(ValueError, match="has 5 bytes, but 2 came"):
    remote.fetch_objects(f"{HERE}/a.json", ())
  left = pathlib.Path.home().rglob("*.json*")
  assert [path for path in left if path.is_file()] == []


@pytest.mark.parametrize("name", ["a/../../../x.json", "/etc/x.json"])
def test_an_object_stays_in_the_folder_of_copies(bucket, name):
  Bucket.store[f"/bucket/files/{name}"] = memory.MemoryFile(bucket, name, b"1")
  with pytest.raises(ValueError, match="would leave the folder"):
    remote.fetch_objects(HERE, ["*.json"], deep=True)


def test_adapters_of_steps_are_listed(bucket):
  for name in ("step-000010/x", "step-000002/x", "other/x", "step-3"):
    bucket.pipe_file(f"{HERE}/{name}", b"")
  assert remote.steps(f"{HERE}/") == [
    (2, f"{HERE}/step-000002"),
    (10, f"{HERE}/step-000010"),
  ]
  assert remote.steps("gs://bucket/nothing") == []


def test_what_is_not_there_says_what_is_needed(bucket):
  for load in (
    hf.read_config,
    sources.read_file,
    lambda path: tokenizer.load(path),
  ):
    with pytest.raises(ValueError, match="gs://bucket/nothing") as error:
      load("gs://bucket/nothing")
    assert "dpo-jax[gcs]" in str(error.value)


def test_google_storage_over_http(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  # fsspec read the environment when it was imported.
  token = {"token": bucket_server.TOKEN}
  monkeypatch.setitem(fsspec.config.conf, "gcs", token)
  gcsfs.GCSFileSystem.clear_instance_cache()
  with bucket_server.serve() as served:
    for name, value in served.environment().items():
      monkeypatch.setenv(name, value)
    for name in ("a.json", "b.bin", "step-000010/c.json", "step-000002/c.json"):
      served.objects[f"files/{name}"] = name.encode()
    address = f"gs://{bucket_server.BUCKET}/files"
    assert [step for step, _ in remote.steps(address)] == [2, 10]
    for _ in range(2):
      path = remote.fetch(address)
      assert [x.read_text() for x in path.iterdir()] == ["a.json"]
    served.objects["files/a.json"] = b"changed"
    path = remote.fetch_objects(f"{address}/a.json", ())
    assert path.read_bytes() == b"changed"
    path = remote.fetch(address)
    assert (path / "a.json").read_bytes() == b"changed"
    reads = [name for act, name in served.asked if act == "read"]
    assert reads == ["files/a.json"] * 3
    served.fault = lambda act, name: 403
    with pytest.raises(ValueError, match=r"(?s)Forbidden.*dpo-jax\[gcs\]"):
      remote.fetch(address)


def test_nothing_is_written_to_a_bucket(bucket, files, tmp_path):
  config = running.configs(files)
  for call in (
    lambda: flags._directory("gs://bucket/run"),
    lambda: config(**{"data.token_cache": "gs://bucket/cache"}),
    lambda: config(reference_cache="gs://bucket/cache"),
    lambda: remote.refuse_address("output", "s3://bucket/x"),
  ):
    with pytest.raises(ValueError, match="neither locks nor renames"):
      call()
  assert not Bucket.store
