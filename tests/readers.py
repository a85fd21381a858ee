"""Every reader of foreign bytes, with valid files to mutate.

`Reader.check` is the question of all fuzzing: given any bytes, a reader
returns, or raises a ValueError whose message can be shown. Whatever else it
raises is a finding.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import shutil
from collections.abc import Callable

import mutating
import reported
import sourcing
import tiny

from dpo_jax.data import preferences, token_cache, tokenizer
from dpo_jax.io import (
  jsonl,
  records,
  rundir,
  safetensors,
  step_files,
)
from dpo_jax.judging import batch_api, prompts, verdicts
from dpo_jax.model import gpt_neox, hf
from dpo_jax.report import report, verify
from dpo_jax.sampling import response_files

# An error names what is wrong; it does not repeat the file.
LONGEST_MESSAGE = 10_000


@dataclasses.dataclass(frozen=True)
class Reader:
  """The form of a file, valid bytes of it, and what reads it.

  `slow` readers need far more than a millisecond for a file.
  """

  form: str
  seeds: Callable[["Files"], list[bytes]]
  read: Callable[["Files", bytes], object]
  slow: bool = False

  def check(self, files, data):
    """Reads `data`; an error that is no plain ValueError is raised."""
    try:
      self.read(files, data)
    except ValueError as error:
      text = str(error)
      assert text.strip(), "an error without a message"
      assert len(text) <= LONGEST_MESSAGE, f"{len(text)}: {text:.200}"
      text.encode()  # it can be printed


class Files:
  """A directory of valid files of every kind, written when first needed."""

  def __init__(self, directory, shared):
    self.directory, self.shared = directory, shared

  def put(self, name, data):
    path = self.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

  def replaced(self, root, name, data):
    """A copy of a directory in which one file is replaced."""
    copy = self.directory / "copies" / root.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    (copy / name).write_bytes(data)
    return copy

  @functools.cached_property
  def config(self):
    lora = gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
    return dataclasses.replace(tiny.CONFIG, vocab_size=304, lora=lora)

  @functools.cached_property
  def base(self):
    return tiny.weights(self.config)

  @functools.cached_property
  def tokenizer(self):
    words = ["the pen is blue", "a pen is a tool", "ink is wet"] * 4
    return tokenizer.train(words, 300, self.directory / "trained")

  @functools.cached_property
  def model(self):
    hf.export(self.directory / "model", self.config, self.base, self.tokenizer)
    return self.directory / "model"

  @functools.cached_property
  def adapter(self):
    path, lora = self.directory / "adapter", tiny.adapters(self.config)
    hf.export_adapter(path, self.config, lora, "base", self.base)
    return path

  @functools.cached_property
  def hh(self):
    path = self.shared / "data/hh-rlhf/harmless-base/test.jsonl.gz"
    with gzip.open(path) as file:
      return [line for _, line in zip(range(6), file)]

  @functools.cached_property
  def run(self):
    path = self.directory / "run"
    names = [(model, f"p{i}") for model in ("sft", "dpo") for i in range(3)]
    rows = [reported.response(model, None, 1.0, i) for model, i in names]
    orders = ("model_first", "chosen_first")
    calls = [
      reported.verdict(row, order, "model", raw="More helpful: A")
      for row in rows
      for order in orders
    ]
    reported.write_rows(path / "responses" / "all.jsonl", rows)
    reported.write_rows(path / "verdicts" / "all.jsonl", calls)
    (path / "verdicts" / "judge.json").write_text(json.dumps(JUDGE))
    for name in ("sft", "dpo"):
      reported.write_metrics(path / name / "metrics.jsonl", METRICS)
      (path / name / "manifest.json").write_text(json.dumps(MANIFEST))
    return path


METRICS = [
  {"step": 0, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5},
  {"step": 1, "loss": 0.7, "rewards/margins": 0.1, "rewards/accuracies": 0.6},
  {"step": 2, "loss": "nan", "learning_rate": 1e-6, "eval_items": 200}
  | {"eval_rewards/accuracies": 0.7, "eval_rewards/margins": 0.5},
]
MANIFEST = {
  "objective": "dpo",
  "parameters": {"base": 3, "lora": 1, "trained": 1},
  "data": {
    "train": {"counts": {"read": 9, "kept": 8, "filtered: x": 1}},
    "held_out": {"counts": {"read": 2, "kept": 2}},
    "packing": {"pairs": 3},
  },
}
JUDGE = {"judge": "m", "template_hash": "t1", "complete": True, "missing": 0}
JUDGE |= {"not_dispatched": 0, "cost": 0.5, "calls": 12, "modes": ["live"]}
JUDGE |= {"data_fingerprint": "0" * 64}
NUMERICS = {"dtype": "float32", "param_dtype": "float32"}
NUMERICS |= {"remat": "none", "lora": None}
SHP = {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b"}
SHP |= {"labels": 1, "score_A": 9, "score_B": 2}
SE = {
  "question": "<p>Why <b>so</b>?</p>",
  "answers": [
    {"text": "<p>a</p>", "pm_score": 1},
    {"text": "b", "pm_score": 5},
  ],
}
TLDR = {
  "info": {"post": "A long post.", "title": "T", "subreddit": "r"},
  "summaries": [{"text": " one"}, {"text": " two"}],
  "choice": 1,
}
MESSAGES = {
  name: [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": text},
  ]
  for name, text in (("chosen", "So."), ("rejected", "No."))
}
LOGPROBS = [
  {"token": "Comparison: x.\nMore helpful: ", "logprob": 0.0},
  {
    "token": "A",
    "logprob": -0.1,
    "top_logprobs": [
      {"token": "A", "logprob": -0.1},
      {"token": "B", "logprob": -2.3},
    ],
  },
]
COMPLETION = {
  "model": "m",
  "system_fingerprint": "fp",
  "usage": {"prompt_tokens": 3, "completion_tokens": 2},
  "choices": [
    {
      "finish_reason": "stop",
      "message": {
        "content": "Comparison: x.\nMore helpful: A",
        "refusal": None,
      },
      "logprobs": {"content": LOGPROBS},
    }
  ],
}
# A result file of dpo-replication.
EVAL = {
  "metadata": {
    "run_name": "pythia-2.8b-dpo-0.75_20251024_101527",
    "temperature": 0.75,
    "total_samples_evaluated": 2,
  },
  "win_counts": {"Model": 1, "Chosen": 0, "Tie": 1, "Error": 0},
  "winrates": {
    "model_winrate": 50.0,
    "chosen_winrate": 0.0,
    "tie_rate": 50.0,
    "error_rate": 0.0,
  },
  "results": [
    {
      "sample_id": index,
      "prompt": "\n\nHuman: a\n\nAssistant:",
      "model_response": " b",
      "chosen_response": " cc",
      "presentation_order": "model_first",
      "verdict": verdict,
      "raw_gpt4_response": raw,
    }
    for index, (verdict, raw) in enumerate(
      [("Model", "More helpful: A"), ("Tie", 'More helpful: "A"')]
    )
  ],
}


# --- valid bytes


def _given(*seeds):
  """Bytes, or values to write as JSON, whatever the directory."""
  data = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in seeds]
  return lambda files: data


def _lines(*rows):
  return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _file(root, name):
  return lambda files: [(getattr(files, root) / name).read_bytes()]


def _token_file(files):
  directory = files.directory / "tokens"
  shutil.rmtree(directory, ignore_errors=True)
  assert len(_tokenize(files).table) == 2
  (path,) = directory.glob("*.safetensors")
  return [path.read_bytes()]


def _tokenize(files):
  rows = [
    preferences.pair(f"{sourcing.HUMAN} {x}{sourcing.ASSISTANT}", " b", " c")
    for x in "ab"
  ]
  return token_cache.tokenize(
    files.directory / "tokens",
    files.tokenizer,
    rows,
    rules="paper",
    max_length=64,
    max_prompt_length=32,
  )


def _step_manifest(files):
  directory = files.put("whole/3/a", b"abc").parent.parent
  step_files.complete(directory, 3)
  return [(directory / "3" / "manifest.json").read_bytes()]


# --- reading


def _pairs(kind, name="rows.jsonl"):
  def read(files, data):
    path = files.put(name, data)
    with contextlib.suppress(ValueError):
      sourcing.load(path, kind=kind)
    lenient = {"skip_bad": 10**9}
    for row in sourcing.load(path, kind=kind, filtered=lenient).rows:
      # What is kept can be tokenized, written and judged.
      for text in (row.prompt, row.chosen, row.rejected):
        assert text.strip()
        text.encode()

  return read


def _tensors(files, data):
  arrays, metadata = safetensors.read(files.put("a.safetensors", data))
  json.dumps(metadata)
  assert sum(array.nbytes for array in arrays.values()) <= len(data)


def _model(name):
  def read(files, data):
    hf.load(files.replaced(files.model, name, data), **NUMERICS)

  return read


def _adapter_config(files, data):
  path = files.replaced(files.adapter, "adapter_config.json", data)
  hf.load_adapter(path, files.config, files.base)


def _tokenizer_config(files, data):
  path = files.replaced(files.model, "tokenizer_config.json", data)
  words = tokenizer.load(path)
  words.decode(words.encode("a pen, \0 שלום 👩‍👩‍👧"))
  assert len(words.fingerprint) == 16


def _tokens(files, data):
  """A damaged entry of the cache is written again, whatever is in it."""
  (path,) = (files.directory / "tokens").glob("*.safetensors")
  path.write_bytes(data)
  wanted = _tokenize(files).table.fingerprint()
  assert _tokenize(files).table.fingerprint() == wanted


def _verdict_text(files, data):
  text = data.decode("utf-8", "replace")
  outcomes = {"A", "B", "missing", "refusal", "tie"}
  for ties in (False, True):
    assert verdicts.read(text, ties=ties) in outcomes
    verdicts.read_json(text, ties=ties)


def _completion(files, data):
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    return
  for output in ("text", "json_schema"):
    reply = verdicts.read_completion(value, output=output, ties=True)
    row = reported.verdict(
      reported.response("m", None, 1.0, "p"),
      "model_first",
      "model",
      raw=reply.text,
      error=reply.error,
      score=reply.score,
      judge_returned=reply.model,
      judge_fingerprint=reply.fingerprint,
      prompt_tokens=reply.prompt_tokens,
      completion_tokens=reply.completion_tokens,
    )
    records.encode(row)  # any reply can be written


def _batch_results(files, data):
  found = batch_api.read_results(data)
  assert all(isinstance(result, dict) for result in found.values())


def _eval_file(files, data):
  path = files.put("evals/eval_one.json", data)
  with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as err,
  ):
    assert verify.main([str(path)]) in (0, 1, 2)
  text = out.getvalue() + err.getvalue()
  text.encode()
  steering = set(text) & {"\x1b", "\x07", "\x00", "\u202e", "\r"}
  assert not steering, f"steers the terminal: {steering}"


def _rows(cls):
  def read(files, data):
    path = files.put("store.jsonl", data)
    with contextlib.suppress(ValueError):
      for row in records.read(path, cls):
        assert records.decode(records.encode(row), cls) == row
    with jsonl.Store(path, cls) as store:
      store.append_many(store.rows[:1])

  return read


def _report(name):
  settings = dataclasses.replace(reported.SETTINGS, resamples=100)

  def read(files, data):
    workdir = files.replaced(files.run, name, data)
    text = report.compose(settings, workdir).texts[report.TEXT]
    assert "<script" not in text
    assert "\x1b" not in text

  return read


def _config(files, data):
  path = files.put("begun/config.json", data)
  rundir.check(path.parent, {"a": {"b": [1, 2.0, None]}, "c": "d"})


def _claim(files, data):
  path = files.put("claimed/dpo.json", data)
  response_files.claim(path.with_suffix(".jsonl"), {"model": "a", "n": 1}, True)


def _step(files, data):
  directory = files.put("steps/3/manifest.json", data).parent.parent
  files.put("steps/3/a", b"abc")
  assert isinstance(step_files.problem(directory, 3), str)
  step_files.manifest(directory, 3)


def _template(files, data):
  path = str(files.put("template.txt", data))
  prompts.load(path, output="text", ties=False)


_REPLIES = (
  b"Comparison: both.\nMore helpful: A",
  b'{"comparison": "x", "choice": "B"}',
  "**More helpful:** “B” because A is not.".encode(),
  b"I'm sorry, but I cannot. Final answer: [[A]] or tie",
)
_PAIRS = (sourcing.GOOD, MESSAGES, sourcing.apart("p", "c", "r"))
_BATCH = [
  {"custom_id": name, "response": {"status_code": 200, "body": {}}}
  for name in "abc"
]
_WEIGHTS = _file("model", "model.safetensors")

READERS = {
  "hh rows, gzip": Reader(
    "gzip",
    lambda files: [gzip.compress(b"".join(files.hh))],
    _pairs("hh", "rows.jsonl.gz"),
  ),
  "pairs": Reader("lines", _given(_lines(*_PAIRS)), _pairs("pairs")),
  "shp": Reader("lines", _given(_lines(SHP, SHP)), _pairs("shp")),
  "stack exchange": Reader("lines", _given(_lines(SE, SE)), _pairs("se")),
  "tl;dr": Reader("lines", _given(_lines(TLDR, TLDR)), _pairs("tldr")),
  "safetensors": Reader("tensors", _WEIGHTS, _tensors),
  "token cache": Reader("tensors", _token_file, _tokens),
  "weights": Reader(
    "tensors", _WEIGHTS, _model("model.safetensors"), slow=True
  ),
  "config.json": Reader(
    "json", _file("model", "config.json"), _model("config.json"), slow=True
  ),
  "tokenizer_config.json": Reader(
    "json",
    _file("model", "tokenizer_config.json"),
    _tokenizer_config,
    slow=True,
  ),
  "adapter_config.json": Reader(
    "json",
    _file("adapter", "adapter_config.json"),
    _adapter_config,
    slow=True,
  ),
  "verdict text": Reader("bytes", _given(*_REPLIES), _verdict_text),
  "completion": Reader("json", _given(COMPLETION), _completion),
  "results of a batch": Reader(
    "lines", _given(_lines(*_BATCH)), _batch_results
  ),
  "eval file": Reader("json", _given(EVAL), _eval_file),
  "responses": Reader(
    "lines", _file("run", "responses/all.jsonl"), _rows(records.Response)
  ),
  "verdicts": Reader(
    "lines", _file("run", "verdicts/all.jsonl"), _rows(records.Verdict)
  ),
  **{
    f"report of {name}": Reader(form, _file("run", name), _report(name), True)
    for form, name in (
      ("lines", "dpo/metrics.jsonl"),
      ("json", "dpo/manifest.json"),
      ("json", "verdicts/judge.json"),
    )
  },
  "a run's config.json": Reader(
    "json", _given({"a": {"b": [1, 2.0, None]}, "c": "d"}), _config
  ),
  "origin of responses": Reader("json", _given({"model": "a", "n": 1}), _claim),
  "manifest of a step": Reader("json", _step_manifest, _step),
  "a template": Reader(
    "bytes",
    _given(b"{prompt} {first} {second} {fence} {ending} {x}"),
    _template,
  ),
}


def mutant(files, name, rng):
  """Wrong bytes for a reader."""
  reader = READERS[name]
  return mutating.mutate(reader.form, rng.choice(reader.seeds(files)), rng)
