"""Hostile and half-fetched files: memory bounds of readers, and their errors.

Every bound is exceeded by a real file. Memory is what Python allocates, traced;
the readers' own buffers are all Python's.
"""

import contextlib
import dataclasses
import gzip
import json
import tracemalloc

import pytest
import readers
import reported
import sourcing
from test_records import RESPONSE

from dpo_jax.data import tokenizer
from dpo_jax.io import jsonl, metrics, records, safetensors, strict_json
from dpo_jax.judging import verdicts
from dpo_jax.model import hf
from dpo_jax.report import dpo_replication, verify
from dpo_jax.training import reference

POINTER = (
  b"version https://git-lfs.github.com/spec/v1\n"
  b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
  b"\nsize 12345\n"
)
MIB = 2**20


@contextlib.contextmanager
def at_most(mib):
  """Checks the peak of what is allocated inside."""
  tracemalloc.start()
  try:
    yield
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < mib * MIB, f"{peak / MIB:.0f} MiB"


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared):
  return readers.Files(tmp_path_factory.mktemp("files"), shared)


def load_model(path):
  return hf.load(path.parent, **readers.NUMERICS)


def load_tokenizer(path):
  return tokenizer.load(path.parent)


# Names of files, and what reads them.
READ = {
  "model/model.safetensors": load_model,
  "model/config.json": load_model,
  "model/tokenizer.json": load_tokenizer,
  "model/tokenizer_config.json": load_tokenizer,
  "adapter/adapter_model.safetensors": None,
  "adapter/adapter_config.json": None,
  "eval_x.json": dpo_replication.read,
  "rows.jsonl": sourcing.load,
  "rows.jsonl.gz": sourcing.load,
  "dpo.jsonl": lambda path: records.read(path, records.Response),
  "metrics.jsonl": metrics.read,
  "x.safetensors": lambda path: reference.load(path, None, {}),
}


def read(files, name, data):
  """Reads a file of these bytes, in the place of a valid one if there is."""
  folder, _, inner = name.rpartition("/")
  if folder:
    path = files.replaced(getattr(files, folder), inner, data) / inner
  else:
    path = files.put(name, data)
  if folder == "adapter":
    return hf.load_adapter(path.parent, files.config, files.base)
  return READ[name](path)


@pytest.mark.parametrize("name", READ)
def test_a_pointer_of_git_lfs_is_named_with_advice(files, name):
  with pytest.raises(ValueError, match=r"is a pointer of git-LFS") as error:
    read(files, name, POINTER)
  assert name in str(error.value)
  assert "git lfs pull" in str(error.value)


def test_a_pointer_in_the_place_of_a_shard_is_named(files):
  directory = files.replaced(files.model, "pointer", POINTER)
  weights = directory / "model.safetensors"
  shard = "model-00001-of-00001.safetensors"
  index = {"weight_map": dict.fromkeys(safetensors.find(directory, "model"))}
  index["weight_map"] = dict.fromkeys(index["weight_map"], shard)
  weights.rename(directory / shard)
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  load_model(weights)
  (directory / shard).write_bytes(POINTER)
  with pytest.raises(ValueError, match=r"00001\.safetensors is a pointer of"):
    load_model(weights)


@pytest.mark.parametrize("end", [4, 8])
def test_a_name_given_twice_to_tensors_is_refused_with_its_file(tmp_path, end):
  about = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
  header = f'{{"a":{about % (0, 4)},"a":{about % (4, 8)}}}'.encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * end)
  with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
    safetensors.find(tmp_path, "model")


# --- sizes


def test_a_line_beyond_the_bound_is_not_held(tmp_path):
  path = tmp_path / "rows.jsonl"
  longest = sourcing.line(sourcing.GOOD | {"note": ""})
  room = strict_json.MAX_BYTES - len(longest)
  longest = longest.replace(b'""', b'"' + b"x" * room + b'"')
  assert len(longest) == strict_json.MAX_BYTES
  path.write_bytes(longest + longest)
  assert len(sourcing.load(path).rows) == 2
  with path.open("ab") as file:
    file.truncate(10 * strict_json.MAX_BYTES)
  with at_most(200), pytest.raises(ValueError, match=r":3: longer than 32 MiB"):
    sourcing.load(path, filtered={"skip_bad": 9})


def test_a_gzip_bomb_is_refused(tmp_path):
  """100 MiB without an end of line in 100 kB."""
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(gzip.compress(b"x" * (100 * MIB), 6))
  assert path.stat().st_size < MIB / 4
  with at_most(80), pytest.raises(ValueError, match=r":1: longer than 32 MiB"):
    sourcing.load(path, filtered={"skip_bad": 9})


@pytest.mark.parametrize(
  "name", ["model/config.json", "adapter/adapter_config.json", "eval_x.json"]
)
def test_files_beyond_their_bound_are_not_held(files, name):
  data = b" " * (strict_json.MAX_BYTES + 1)
  # The bytes themselves are not traced: they were there before.
  message = rf"{name.rpartition('/')[2]}: longer than 32 MiB"
  with at_most(20), pytest.raises(ValueError, match=message):
    read(files, name, data)


# --- our own rows


def test_a_row_that_could_not_be_read_again_is_not_written(tmp_path):
  path = tmp_path / "rows.jsonl"
  row = dataclasses.replace(RESPONSE, response="x" * strict_json.MAX_BYTES)
  with (
    jsonl.Store(path, records.Response) as store,
    pytest.raises(ValueError, match="more than the 33554432 of a line"),
  ):
    store.append_many([RESPONSE, row])
  assert path.read_bytes() == b""


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b'{"step": 1}\n{"step": "2"}\n', r":2 is not a row of metrics"),
    (b'{"step": 1}\n[]\n', r":2 is not a row of metrics"),
    (b'{"step": 1, "loss": NaN}\n', r":1: NaN is not a JSON number"),
    (b"\xff\n", r":1: not UTF-8"),
  ],
)
def test_metrics_that_are_none_are_named_by_line(tmp_path, data, message):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=rf"metrics\.jsonl{message}"):
    metrics.read(path)


# --- found by fuzzing


@pytest.mark.parametrize("others", [3, "A", {"a": 1}, [None], None])
def test_alternatives_that_are_no_list_give_no_score(others):
  token = {"token": "A", "logprob": 0.0, "top_logprobs": others}
  choice = {
    "message": {"content": "A"},
    "logprobs": {"content": [token]},
    "finish_reason": "stop",
  }
  reply = verdicts.read_completion(
    {"choices": [choice]}, output="text", ties=False
  )
  assert (reply.choice, reply.score) == ("first", None)


@pytest.mark.parametrize("items", [[200], "nan", 0, -3])
def test_an_accuracy_of_no_number_of_items_has_no_interval(files, items):
  row = {"step": 9, "eval_rewards/accuracies": 0.5, "eval_items": items}
  data = json.dumps(row).encode() + b"\n"
  workdir = files.replaced(files.run, "dpo/metrics.jsonl", data)
  if isinstance(items, list):
    with pytest.raises(ValueError, match=r":1: field 'eval_items' is \[200\]"):
      metrics.read(workdir / "dpo/metrics.jsonl")
  else:
    text = reported.text(workdir)
    assert "chosen above rejected in 50.0% (step 9)" in text


def test_names_in_result_files_do_not_steer_the_terminal(tmp_path, capsys):
  name = {"run_name": "a\x1b[2J\u202eb\x07"}
  content = readers.EVAL | {"metadata": readers.EVAL["metadata"] | name}
  (tmp_path / "eval_x.json").write_text(json.dumps(content))
  assert verify.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert r"a\x1b[2J\u202eb\x07" in out
  assert not set(out) & set("\x1b\u202e\x07")
