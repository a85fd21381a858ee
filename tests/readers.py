"""Every reader of foreign bytes, with valid files to make wrong ones of.

`Reader.check` is the one question of all fuzzing here: given any bytes, a
reader returns, or raises a ValueError whose message can be shown. Whatever else
it raises is a finding.
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
import numpy as np
import reported
import sourcing
import tiny

from dpo_jax.data import preferences, token_cache, token_table, tokenizer
from dpo_jax.io import (
  bucket,
  jsonl,
  metrics,
  records,
  rundir,
  safetensors,
  step_files,
  strict_json,
)
from dpo_jax.judging import batch_api, prompts, verdicts
from dpo_jax.model import gpt_neox, hf
from dpo_jax.report import report, verify
from dpo_jax.sampling import response_files
from dpo_jax.training import guards, reference, score

# An error names what is wrong; it does not repeat the file.
LONGEST_MESSAGE = 10_000


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader, the form of what it reads, and valid bytes of it.

  `slow` readers need far more than a millisecond for a file.
  """

  form: str
  seeds: Callable[["Files"], list[bytes]]
  read: Callable[["Files", bytes], None]
  slow: bool = False

  def check(self, files, data):
    """Reads `data`; an error that is no plain ValueError goes through."""
    try:
      self.read(files, data)
    except ValueError as error:
      text = str(error)
      assert text.strip(), "an error without a message"
      assert len(text) <= LONGEST_MESSAGE, (
        f"{len(text)} characters: {text:.200}"
      )
      text.encode()  # it can be printed


class Files:
  """Valid files of every kind in one directory, made when first needed."""

  def __init__(self, directory, shared):
    self.directory, self.shared = directory, shared

  def put(self, name, data):
    path = self.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

  @functools.cached_property
  def config(self):
    return dataclasses.replace(
      tiny.CONFIG,
      vocab_size=304,
      lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS),
    )

  @functools.cached_property
  def base(self):
    return tiny.weights(self.config)

  @functools.cached_property
  def tokenizer(self):
    words = ["the pen is blue", "a pen is a tool", "ink is wet"] * 4
    return tokenizer.train(words, 300, self.directory / "trained")

  @functools.cached_property
  def tokenized(self):
    return _tokenize(self)

  @functools.cached_property
  def entry(self):
    """The cache's entry as it was written: readers leave other ones."""
    assert len(self.tokenized.table) == 2
    (path,) = _cached(self)
    return path.read_bytes()

  @functools.cached_property
  def model(self):
    hf.export(self.directory / "model", self.config, self.base, self.tokenizer)
    return self.directory / "model"

  @functools.cached_property
  def adapter(self):
    lora = tiny.adapters(self.config)
    path = self.directory / "adapter"
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
    rows = [
      reported.response(model_, None, 1.0, f"p{i}")
      for model_ in ("sft", "dpo")
      for i in range(3)
    ]
    calls = [
      reported.verdict(row, order, "model", raw="More helpful: A")
      for row in rows
      for order in ("model_first", "chosen_first")
    ]
    reported.write_rows(path / "responses" / "all.jsonl", rows)
    reported.write_rows(path / "verdicts" / "all.jsonl", calls)
    (path / "verdicts" / "judge.json").write_text(json.dumps(JUDGE))
    for name in ("sft", "dpo"):
      reported.write_metrics(path / name / "metrics.jsonl", METRICS)
      (path / name / "manifest.json").write_text(json.dumps(MANIFEST))
    return path

  def replaced(self, root, name, data):
    """A copy of a directory in which one file is other."""
    copy = self.directory / "copies" / root.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    (copy / name).write_bytes(data)
    return copy


METRICS = [
  {"step": 0, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5},
  {"step": 1, "loss": 0.7, "rewards/margins": 0.1, "rewards/accuracies": 0.6},
  {
    "step": 2,
    "loss": "nan",
    "learning_rate": 1e-6,
    "eval_rewards/accuracies": 0.7,
    "eval_rewards/margins": 0.5,
    "eval_items": 200,
  },
]
INCIDENT = {
  "step": 6,
  "cause": "loss is nan",
  "loss": "nan",
  "grad_norm": "nan",
  "skipped": 1,
  "items": ["044ba5bef89dc888", "e07787d1dfe0fb60"],
}
MANIFEST = {
  "objective": "dpo",
  "parameters": {"base": 3, "lora": 1, "trained": 1},
  "data": {
    "train": {"counts": {"read": 9, "kept": 8, "filtered: x": 1}},
    "held_out": {"counts": {"read": 2, "kept": 2}},
    "packing": {"pairs": 3},
  },
}
JUDGE = {
  "judge": "m",
  "template_hash": "t1",
  "complete": True,
  "missing": 0,
  "not_dispatched": 0,
  "cost": 0.5,
  "calls": 12,
  "modes": ["live"],
  "data_fingerprint": "0" * 64,
}
NUMERICS = {
  "dtype": "float32",
  "remat": "none",
  "lora": None,
  "param_dtype": "float32",
}
SHP = {
  "post_id": "q",
  "history": "Why?",
  "human_ref_A": "a",
  "human_ref_B": "b",
  "labels": 1,
  "score_A": 9,
  "score_B": 2,
}
SE = {
  "question": "<p>Why <b>so</b>?</p>",
  "answers": [
    {"text": "<p>a</p>", "pm_score": 1},
    {"text": "b", "pm_score": 5},
  ],
}
TLDR = {
  "info": {
    "id": "t3_a",
    "post": "A long post.",
    "title": "T",
    "subreddit": "r",
  },
  "summaries": [{"text": " one"}, {"text": " two"}],
  "choice": 1,
}
MESSAGES = {
  "chosen": [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
  ],
  "rejected": [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "No."},
  ],
}
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
      "logprobs": {
        "content": [
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
      },
    }
  ],
}


def _lines(*rows):
  return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _pairs(kind, name="rows.jsonl"):
  def read(files, data):
    path = files.put(name, data)
    changes = {"kind": kind}
    with contextlib.suppress(ValueError):
      sourcing.load(path, **changes)
    filters = {"skip_bad": 10**9}
    found = sourcing.load(path, filtered=filters, **changes)
    for row in found.rows:
      # What is kept can be tokenized, written and asked about.
      for text in (row.prompt, row.chosen, row.rejected):
        assert text.strip()
        text.encode()

  return read


def _transcripts(files, data):
  """HH's own rule: what is split must be what was joined."""
  chosen, _, rejected = data.decode("utf-8", "replace").partition("\x01")
  prompt, good, bad = preferences.split(chosen, rejected)
  assert (prompt + good, prompt + bad) == (chosen, rejected)
  assert prompt.endswith(preferences.ASSISTANT)
  assert preferences.ASSISTANT not in good + bad


def _hh_texts(files):
  rows = [json.loads(line) for line in files.hh]
  return [f"{r['chosen']}\x01{r['rejected']}".encode() for r in rows]


def _tensors(files, data):
  arrays, metadata = safetensors.read(files.put("a.safetensors", data))
  json.dumps(metadata)
  assert sum(array.nbytes for array in arrays.values()) <= len(data)


def _model(name):
  def read(files, data):
    hf.load(files.replaced(files.model, name, data), **NUMERICS)

  return read


def _adapter(name):
  def read(files, data):
    path = files.replaced(files.adapter, name, data)
    hf.load_adapter(path, files.config, files.base)

  return read


def _tokenizer(name):
  def read(files, data):
    found = tokenizer.load(files.replaced(files.model, name, data))
    ids = found.encode("a pen, \0 שלום 👩‍👩‍👧")
    found.decode(ids)
    assert len(found.fingerprint) == 16

  return read


TABLE = token_table.from_items(
  [
    token_table.Pair("a", (1, 2), (3,), (4, 5)),
    token_table.Pair("b", (1,), (2,), (3,)),
  ]
)


def _reference(files, data):
  reference.load(files.put("own.safetensors", data), TABLE, {"items": "a"})


def _reference_file(files):
  path = files.directory / "reference.safetensors"
  reference.save(path, np.zeros(5, np.float32), {"items": "a"})
  return [path.read_bytes()]


def _tokens(files, data):
  """A broken entry of the cache is made again, whatever is in it."""
  (path,) = _cached(files)
  path.write_bytes(data)
  kept = _tokenize(files)
  assert kept.table.fingerprint() == files.tokenized.table.fingerprint()


def _cached(files):
  return (files.directory / "tokens").glob("*.safetensors")


def _tokenize(files):
  rows = [
    preferences.pair(f"{sourcing.HUMAN} {x}{sourcing.ASSISTANT}", " b", " c")
    for x in "ab"
  ]
  return token_cache.tokenize(
    files.directory / "tokens",
    files.tokenizer,
    rows,
    tokenization="paper",
    max_length=64,
    max_prompt_length=32,
  )


def _verdict_text(files, data):
  text = data.decode("utf-8", "replace")
  for ties in (False, True):
    assert verdicts.read(text, ties=ties) in {
      *("A", "B", "missing", "refusal", "tie")
    }
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
    records.encode(row)  # whatever was replied can be kept


def _batch_results(files, data):
  del files
  found = batch_api.read_results(data)
  assert all(isinstance(result, dict) for result in found.values())


def _eval_file(files, data):
  path = files.put("evals/eval_one.json", data)
  with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as err,
  ):
    code = verify.main([str(path)])
  assert code in (0, 1, 2)
  for text in (out.getvalue(), err.getvalue()):
    text.encode()
    steering = set(text) & {"\x1b", "\x07", "\x00", "\u202e", "\r"}
    assert not steering, f"steers the terminal: {steering}"


def _rows(cls):
  def read(files, data):
    path = files.put("store.jsonl", data)
    with contextlib.suppress(ValueError):
      rows = records.read(path, cls)
      assert all(
        records.decode(records.encode(row), cls) == row for row in rows
      )
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


def _begun(files, data):
  path = files.put("begun/config.json", data)
  rundir.check(path.parent, {"a": {"b": [1, 2.0, None]}, "c": "d"})


def _claim(files, data):
  path = files.put("claimed/dpo.json", data)
  response_files.claim(path.with_suffix(".jsonl"), {"model": "a", "n": 1}, True)


def _step(files, data):
  directory = files.put("steps/3/manifest.json", data).parent.parent
  files.put("steps/3/a", b"abc")
  assert isinstance(step_files.problem(directory, 3), str)
  step_files.metrics(directory, 3)


def _bucket(files, data):
  # Whoever writes a table can give it the right hash.
  with contextlib.suppress(ValueError, AttributeError, TypeError):
    values = strict_json.parse(data)
    values.pop("sha256", None)
    data = json.dumps(values | {"sha256": bucket._own_hash(values)}).encode()
  table = bucket.decode(data)
  assert bucket.decode(bucket.encode(table)) == table


def _bucket_table(files):
  made = bucket.File(3, "ab" * 32)
  names = ("checkpoints/3/a", "metrics.jsonl")
  folder = "000003-5f0c61d2a9be"
  table = bucket.Table(
    3, {"eval_loss": 0.5}, folder, dict.fromkeys(names, made)
  )
  return [bucket.encode(table)]


def _step_manifest(files):
  directory = files.put("whole/3/a", b"abc").parent.parent
  step_files.complete(directory, 3, {"eval_loss": 0.5})
  return [(directory / "3" / "manifest.json").read_bytes()]


def _file(root, name):
  return lambda files: [(getattr(files, root) / name).read_bytes()]


READERS = {
  "hh rows": Reader("lines", lambda f: [b"".join(f.hh)], _pairs("hh")),
  "hh rows, gzip": Reader(
    "gzip",
    lambda f: [gzip.compress(b"".join(f.hh))],
    _pairs("hh", "rows.jsonl.gz"),
  ),
  "pairs": Reader(
    "lines",
    lambda f: [_lines(sourcing.GOOD, MESSAGES, sourcing.apart("p", "c", "r"))],
    _pairs("pairs"),
  ),
  "shp": Reader("lines", lambda f: [_lines(SHP, SHP)], _pairs("shp")),
  "stack exchange": Reader("lines", lambda f: [_lines(SE, SE)], _pairs("se")),
  "tl;dr": Reader("lines", lambda f: [_lines(TLDR, TLDR)], _pairs("tldr")),
  "hh transcripts": Reader("bytes", _hh_texts, _transcripts),
  "pairs to score": Reader(
    "lines",
    lambda f: [b"".join(f.hh)],
    lambda f, data: score.read_pairs(
      str(f.put("score.jsonl", data)), f.tokenizer
    ),
  ),
  "safetensors": Reader(
    "tensors", _file("model", "model.safetensors"), _tensors
  ),
  "kept reference": Reader("tensors", _reference_file, _reference),
  "kept tokens": Reader("tensors", lambda f: [f.entry], _tokens),
  "weights": Reader(
    "tensors",
    _file("model", "model.safetensors"),
    _model("model.safetensors"),
    slow=True,
  ),
  "config.json": Reader(
    "json", _file("model", "config.json"), _model("config.json"), slow=True
  ),
  "tokenizer.json": Reader(
    "json",
    _file("model", "tokenizer.json"),
    _tokenizer("tokenizer.json"),
    slow=True,
  ),
  "tokenizer_config.json": Reader(
    "json",
    _file("model", "tokenizer_config.json"),
    _tokenizer("tokenizer_config.json"),
    slow=True,
  ),
  "adapter_config.json": Reader(
    "json",
    _file("adapter", "adapter_config.json"),
    _adapter("adapter_config.json"),
    slow=True,
  ),
  "adapter weights": Reader(
    "tensors",
    _file("adapter", "adapter_model.safetensors"),
    _adapter("adapter_model.safetensors"),
    slow=True,
  ),
  "verdict text": Reader(
    "bytes",
    lambda f: [
      b"Comparison: both.\nMore helpful: A",
      b'{"comparison": "x", "choice": "B"}',
      "**More helpful:** “B” because A is not.".encode(),
      b"I'm sorry, but I cannot. Final answer: [[A]] or tie",
    ],
    _verdict_text,
  ),
  "completion": Reader(
    "json", lambda f: [json.dumps(COMPLETION).encode()], _completion
  ),
  "results of a batch": Reader(
    "lines",
    lambda f: [
      _lines(
        *(
          {"custom_id": name, "response": {"status_code": 200, "body": {}}}
          for name in "abc"
        )
      )
    ],
    _batch_results,
  ),
  "eval file": Reader(
    "json", lambda f: [json.dumps(EVAL).encode()], _eval_file
  ),
  "responses": Reader(
    "lines", _file("run", "responses/all.jsonl"), _rows(records.Response)
  ),
  "verdicts": Reader(
    "lines", _file("run", "verdicts/all.jsonl"), _rows(records.Verdict)
  ),
  "metrics": Reader(
    "lines",
    _file("run", "dpo/metrics.jsonl"),
    lambda f, data: metrics.read(f.put("metrics.jsonl", data)),
  ),
  "skipped updates": Reader(
    "lines",
    lambda f: [_lines(INCIDENT, INCIDENT | {"step": 9})],
    lambda f, data: guards.read_skipped(f.put("skipped_updates.jsonl", data)),
  ),
  "report of responses": Reader(
    "lines",
    _file("run", "responses/all.jsonl"),
    _report("responses/all.jsonl"),
    slow=True,
  ),
  "report of verdicts": Reader(
    "lines",
    _file("run", "verdicts/all.jsonl"),
    _report("verdicts/all.jsonl"),
    slow=True,
  ),
  "report of metrics": Reader(
    "lines",
    _file("run", "dpo/metrics.jsonl"),
    _report("dpo/metrics.jsonl"),
    slow=True,
  ),
  "report of a manifest": Reader(
    "json",
    _file("run", "dpo/manifest.json"),
    _report("dpo/manifest.json"),
    slow=True,
  ),
  "report of judge.json": Reader(
    "json",
    _file("run", "verdicts/judge.json"),
    _report("verdicts/judge.json"),
    slow=True,
  ),
  "a run's config.json": Reader(
    "json", lambda f: [b'{"a": {"b": [1, 2.0, null]}, "c": "d"}'], _begun
  ),
  "origin of answers": Reader(
    "json", lambda f: [b'{"model": "a", "n": 1}'], _claim
  ),
  "table of a bucket": Reader("json", _bucket_table, _bucket),
  "manifest of a step": Reader("json", _step_manifest, _step),
  "a template": Reader(
    "bytes",
    lambda f: [b"{prompt} {first} {second} {fence} {ending} {x}"],
    lambda f, data: prompts.load(
      str(f.put("template.txt", data)), output="text", ties=False
    ),
  ),
  "any json": Reader(
    "json",
    lambda f: [json.dumps(EVAL).encode(), b"[1, [2, {}], null]", b"{}"],
    lambda f, data: strict_json.read(f.put("any.json", data)),
  ),
}

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


def mutant(files, name, rng):
  """Wrong bytes for a reader."""
  reader = READERS[name]
  seeds = reader.seeds(files)
  return mutating.mutate(reader.form, rng.choice(seeds), rng)
