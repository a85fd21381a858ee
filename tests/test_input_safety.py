"""Hostile and half-fetched files: what a reader may cost, and what it says.

Every bound is met with a real file that passes it. Memory is what Python
allocates, traced; the readers' own buffers are all Python's.
"""

import contextlib
import dataclasses
import gzip
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import readers
import reported
import sourcing
import tiny
from test_records import RESPONSE, line

from dpo_jax.data import tokenizer
from dpo_jax.io import jsonl, metrics, records, safetensors, strict_json
from dpo_jax.judging import verdicts
from dpo_jax.model import gpt_neox, hf
from dpo_jax.report import dpo_replication, verify
from dpo_jax.training import reference

NUMERICS = {
  "dtype": "float32",
  "remat": "none",
  "lora": None,
  "param_dtype": "float32",
}
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
def exported(tmp_path_factory):
  """A model with its tokenizer, and an adapter of it."""
  directory = tmp_path_factory.mktemp("exported")
  words = ["the pen is blue", "a pen is a tool"] * 4
  trained = tokenizer.train(words, 300, directory / "trained")
  config = dataclasses.replace(
    tiny.CONFIG,
    vocab_size=304,
    lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS),
  )
  base = tiny.weights(config)
  hf.export(directory / "model", config, base, trained)
  hf.export_adapter(
    directory / "adapter", config, tiny.adapters(config), "base", base
  )
  return directory


@pytest.fixture
def files(exported, tmp_path):
  """The same files again, to be replaced."""
  shutil.copytree(exported, tmp_path / "files")
  return tmp_path / "files"


# --- pointers of git-LFS


def load_model(files):
  return hf.load(files / "model", **NUMERICS)


def load_adapter(files):
  config, base = load_model(files)
  return hf.load_adapter(files / "adapter", config, base)


@pytest.mark.parametrize(
  ("name", "read"),
  [
    ("model/model.safetensors", load_model),
    ("model/config.json", load_model),
    ("model/tokenizer.json", lambda f: tokenizer.load(f / "model")),
    ("model/tokenizer_config.json", lambda f: tokenizer.load(f / "model")),
    ("adapter/adapter_model.safetensors", load_adapter),
    ("adapter/adapter_config.json", load_adapter),
    ("eval_x.json", lambda f: dpo_replication.read(f / "eval_x.json")),
    ("rows.jsonl", lambda f: sourcing.load(f / "rows.jsonl")),
    ("rows.jsonl.gz", lambda f: sourcing.load(f / "rows.jsonl.gz")),
    ("dpo.jsonl", lambda f: records.read(f / "dpo.jsonl", records.Response)),
    ("metrics.jsonl", lambda f: metrics.read(f / "metrics.jsonl")),
    ("x.safetensors", lambda f: reference.load(f / "x.safetensors", None, {})),
  ],
)
def test_a_pointer_of_git_lfs_is_named_with_the_mend(files, name, read):
  (files / name).write_bytes(POINTER)
  with pytest.raises(ValueError, match=r"is a pointer of git-LFS") as error:
    read(files)
  assert str(files / name) in str(error.value)
  assert "git lfs pull" in str(error.value)


def test_a_pointer_in_the_place_of_a_shard_is_named(files):
  directory = files / "model"
  weights = directory / "model.safetensors"
  names = list(safetensors.find(directory, "model"))
  weights.rename(directory / "model-00001-of-00001.safetensors")
  index = {
    "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")
  }
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  load_model(files)
  (directory / "model-00001-of-00001.safetensors").write_bytes(POINTER)
  with pytest.raises(ValueError, match=r"00001\.safetensors is a pointer of"):
    load_model(files)


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


def test_real_rows_stay_far_below_the_bounds(shared):
  """The bounds are generous: what is real needs a tenth of them."""
  for path in (shared / "data").rglob("*.jsonl.gz"):
    longest = max(len(text) for _, text in strict_json.lines(path))
    assert longest < strict_json.MAX_BYTES / 10
  for path in (shared / "seed_results").glob("*.json"):
    assert path.stat().st_size < strict_json.MAX_BYTES / 10
  found = (shared / "tokenizer" / "pythia" / "tokenizer.json").stat().st_size
  assert found < tokenizer.MAX_BYTES / 10


@pytest.mark.parametrize(
  ("name", "size", "read", "message"),
  [
    ("model/config.json", 33, load_model, r"config\.json: longer than 32 MiB"),
    (
      "model/tokenizer.json",
      65,
      lambda f: tokenizer.load(f / "model"),
      r"tokenizer\.json has 68157440 bytes",
    ),
    (
      "adapter/adapter_config.json",
      33,
      load_adapter,
      r"adapter_config\.json: longer than 32 MiB",
    ),
    (
      "eval_x.json",
      33,
      lambda f: dpo_replication.read(f / "eval_x.json"),
      r"eval_x\.json: longer than 32 MiB",
    ),
  ],
)
def test_files_beyond_their_bound_are_not_held(
  files, name, size, read, message
):
  with (files / name).open("wb") as file:
    # Spaces, then a hole: nothing of it needs to be written.
    file.write(b" ")
    file.truncate(size * MIB)
  with at_most(80), pytest.raises(ValueError, match=message):
    read(files)


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


def test_a_long_last_line_is_no_interrupted_append(tmp_path):
  """No append was ever so long: nothing is cut off from such a file."""
  path = tmp_path / "rows.jsonl"
  path.write_bytes(line() + b"x" * (strict_json.MAX_BYTES + 2))
  before = path.stat().st_size
  with (
    pytest.raises(ValueError, match=r"rows\.jsonl:2: longer than 32 MiB"),
    jsonl.Store(path, records.Response),
  ):
    pass
  assert path.stat().st_size == before


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


# --- what fuzzing found


@pytest.mark.parametrize(
  "change",
  [
    lambda c: c["model"]["vocab"].update(a=2**31),
    lambda c: c["model"]["vocab"].update(a=-1),
    lambda c: c["added_tokens"][0].update(id=2**32 - 1),
    lambda c: c["added_tokens"][0].update(id="0"),
  ],
)
def test_ids_that_would_take_all_memory_are_refused(files, change):
  """The tokenizers library walks over all ids up to the highest one."""
  path = files / "model" / "tokenizer.json"
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="is no id of a token"):
    tokenizer.load(files / "model")


def test_a_kept_reference_without_its_array_is_damaged(tmp_path):
  path = tmp_path / "reference.safetensors"
  for name, dtype in (("other", np.float32), ("logps", np.int32)):
    values = np.zeros(3, dtype)
    safetensors.write(
      path,
      {name: values},
      [values],
      {"kind": "dpo_jax reference log-probs 1"},
    )
    with pytest.raises(ValueError, match="is damaged; delete"):
      reference.load(path, None, {})


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
def test_an_accuracy_of_no_number_of_items_has_no_interval(tmp_path, items):
  reported.make_run(tmp_path)
  path = tmp_path / "dpo" / "metrics.jsonl"
  row = {"step": 9, "eval_rewards/accuracies": 0.5, "eval_items": items}
  reported.write_metrics(path, [row])
  if isinstance(items, list):
    with pytest.raises(ValueError, match=r":1: field 'eval_items' is \[200\]"):
      metrics.read(path)
  else:
    text = reported.text(tmp_path)
    assert "chosen above rejected in 50.0% (step 9)" in text


def test_names_in_result_files_do_not_steer_the_terminal(tmp_path, capsys):
  content = readers.EVAL | {
    "metadata": readers.EVAL["metadata"] | {"run_name": "a\x1b[2J\u202eb\x07"}
  }
  (tmp_path / "eval_x.json").write_text(json.dumps(content))
  assert verify.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert r"a\x1b[2J\u202eb\x07" in out
  assert not set(out) & set("\x1b\u202e\x07")
