"""Models and data of gs:// and names of the hub.

Buckets are a server on this machine that speaks Google's JSON API.
"""

import pathlib

import bucket_server
import fsspec.config
import gcsfs
import jax
import numpy as np
import pytest
import running

from dpo_jax.data import sources, tokenizer
from dpo_jax.io import remote
from dpo_jax.model import hf
from dpo_jax.sampling import response_files

HERE = f"gs://{bucket_server.BUCKET}/files"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """An empty bucket, and a home whose cache is empty."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  # fsspec read the environment when it was imported.
  token = {"token": bucket_server.TOKEN}
  monkeypatch.setitem(fsspec.config.conf, "gcs", token)
  with bucket_server.serve() as served:
    for name, value in served.environment().items():
      monkeypatch.setenv(name, value)
    yield served


def reads(bucket):
  names = [name for act, name in bucket.asked if act == "read"]
  return sorted(name.rpartition("/")[2] for name in names)


OPTIONS = {
  "dtype": "float32",
  "remat": "none",
  "lora": None,
  "param_dtype": "float32",
}


def test_models_tokenizers_and_data_are_those_of_the_files(bucket, tmp_path):
  files = running.make_files(tmp_path)
  for path in files.rglob("*"):
    if path.is_file():
      name = f"files/{path.relative_to(files)}"
      bucket.objects[name] = path.read_bytes()
  # What is never read is never fetched.
  bucket.objects["files/model/pytorch_model.bin"] = b"pickled"
  _, base = hf.load(f"{HERE}/model", **OPTIONS)
  _, wanted = hf.load(files / "model", **OPTIONS)
  jax.tree.map(np.testing.assert_array_equal, base, wanted)
  assert "pytorch_model.bin" not in reads(bucket)
  words = tokenizer.load(f"{HERE}/tokenizer")
  assert words.fingerprint == tokenizer.load(files / "tokenizer").fingerprint
  hashes = {
    response_files.weights(x) for x in (f"{HERE}/model", files / "model")
  }
  assert len(hashes) == 1
  pairs = sources.read_file(f"{HERE}/train.jsonl")
  assert pairs.rows == sources.read_file(str(files / "train.jsonl")).rows


def test_an_object_is_copied_again_only_when_it_changed(bucket):
  objects = bucket.objects
  objects |= {"files/a.json": b"1", "files/b.json": b"2"}
  objects |= {"files/deep/c.json": b"3", "files/d.bin": b"4"}
  for _ in range(2):
    path = remote.fetch_objects(HERE, ["*.json"])
    assert {p.name for p in path.iterdir()} == {"a.json", "b.json"}
  assert reads(bucket) == ["a.json", "b.json"]
  objects["files/a.json"] = b"5"
  del objects["files/b.json"]
  path = remote.fetch(HERE)
  assert [p.read_bytes() for p in path.iterdir()] == [b"5"]
  assert reads(bucket) == ["a.json", "a.json", "b.json"]
  path = remote.fetch_objects(HERE, ["*.json"], deep=True)
  assert (path / "deep" / "c.json").read_bytes() == b"3"
  path = remote.fetch_objects(f"{HERE}/a.json", ())
  assert (path.name, path.read_bytes()) == ("a.json", b"5")


def test_a_copy_that_is_cut_is_never_taken(bucket, monkeypatch):
  bucket.objects["files/a.json"] = b"12345"
  monkeypatch.setattr(
    gcsfs.GCSFileSystem,
    "get_file",
    lambda _, path, to: pathlib.Path(to).write_bytes(b"12"),
  )
  with pytest.raises(ValueError, match="has 5 bytes, but 2 came"):
    remote.fetch_objects(f"{HERE}/a.json", ())
  left = pathlib.Path.home().rglob("*.json*")
  assert [path for path in left if path.is_file()] == []


@pytest.mark.parametrize("name", ["a/../../../x.json", "/etc/x.json"])
def test_an_object_stays_in_the_folder_of_copies(bucket, name):
  bucket.objects[f"files/{name}"] = b"1"
  with pytest.raises(ValueError, match="would leave the folder"):
    remote.fetch_objects(HERE, ["*.json"], deep=True)


def test_adapters_of_steps_are_listed(bucket):
  for name in ("step-000010/x", "step-000002/x", "other/x", "step-3"):
    bucket.objects[f"files/{name}"] = b""
  assert remote.steps(f"{HERE}/") == [
    (2, f"{HERE}/step-000002"),
    (10, f"{HERE}/step-000010"),
  ]
  assert remote.steps(f"{HERE}/nothing") == []


def test_what_is_not_there_says_what_is_needed(bucket):
  for load in (hf.read_config, sources.read_file, tokenizer.load):
    with pytest.raises(ValueError, match="files/nothing") as error:
      load(f"{HERE}/nothing")
    assert "dpo-jax[gcs]" in str(error.value)
  bucket.fault = lambda act, name: 403
  with pytest.raises(ValueError, match=r"(?s)Forbidden.*dpo-jax\[gcs\]"):
    remote.fetch(HERE)


def test_nothing_is_written_to_a_bucket(tmp_path):
  config = running.configs(tmp_path)
  for call in (
    lambda: config(**{"data.token_cache": "gs://bucket/cache"}),
    lambda: config(reference_cache="gs://bucket/cache"),
    lambda: remote.refuse_address("output", "s3://bucket/x"),
  ):
    with pytest.raises(ValueError, match="neither locks nor renames"):
      call()


# --- names of the hub


@pytest.mark.parametrize(
  "name", ["user/name@", "a/b/c", "../x", "user/name@-x", "", "user/na me"]
)
def test_names_that_are_no_ids_are_refused(name):
  with pytest.raises(ValueError, match="neither a directory nor a hub id"):
    hf.read_config(name)


def test_a_path_that_is_not_there_is_not_asked_for(tmp_path, monkeypatch):
  """The mend names the nearest; with a revision it is the hub's."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "sft-demo").mkdir(parents=True)
  monkeypatch.setattr("huggingface_hub.snapshot_download", None)
  for read in (
    remote.fetch,
    tokenizer.load,
    sources.read_file,
  ):
    with pytest.raises(
      ValueError, match="did you mean 'runs/sft-demo'"
    ) as found:
      read("runs/sft-demos")
    assert "runs/sft-demos@main" in str(found.value)
  with pytest.raises(ValueError, match="runs holds sft-demo;"):
    remote.fetch("runs/other")
  # Asked for: what stands in the library's place cannot be called.
  for name in ("runs/sft@main", "nobody/sft"):
    with pytest.raises(ValueError, match="was not fetched"):
      remote.fetch(name)


def test_an_id_with_its_revision():
  assert remote.split("user/name@step-000100") == ("user/name", "step-000100")
  assert remote.split("gpt2") == ("gpt2", None)
  assert remote.split("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
