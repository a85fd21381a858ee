import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dpo_jax.io import hashing, jsonl, locks, records

RESPONSE = records.Response(
  prompt_id="p1",
  prompt="\n\nHuman: hi\n\nAssistant:",
  response=" yes",
  # What breaks naive JSON lines: separators other than a newline, and
  # characters that escapes or decoders lose.
  chosen="a\u2028b\u2029c\u0085d\nf\r\ng\rh\x0b\x0c\x1c\x00\x1b[0m\x7f"
  '👩‍👩‍👧 שלום עולם \u202egnp \ufeff"quoted" \\n \\u2028 {"a": 1}',
  model="dpo",
  step=None,
  temperature=1.0,
  top_k=50,
  top_p=0.9,
  max_new_tokens=8,
  seed=0,
  sample_id=0,
  token_count=2,
  finish_reason="eos",
)
VERDICT = records.Verdict(
  key="k",
  prompt_id="p1",
  model="dpo",
  step=100,
  temperature=0.7,
  sample_id=0,
  order="model_first",
  control="",
  verdict="model",
  score=0.75,
  judge="j",
  judge_returned="j-1",
  judge_fingerprint="fp-1",
  template_hash="t",
  response_chars=4,
  chosen_chars=3,
  prompt_tokens=100,
  completion_tokens=20,
  raw="More helpful: A",
  error="",
)


def line(**changes) -> bytes:
  values = dataclasses.asdict(RESPONSE) | changes
  return json.dumps(values).encode() + b"\n"


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  text=any_text,
  step=st.none() | st.integers(),
  temperature=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_row_survives_its_line(text, step, temperature):
  row = dataclasses.replace(
    RESPONSE, prompt=text, step=step, temperature=temperature
  )
  data = records.encode(row)
  assert data.index(b"\n") == len(data) - 1
  assert records.decode(data, records.Response) == row


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  rows=st.lists(any_text, min_size=1, max_size=4), data=st.data()
)
def test_a_cut_anywhere_loses_only_the_line_it_cuts(
  tmp_path_factory, rows, data
):
  rows = [
    dataclasses.replace(RESPONSE, response=text, sample_id=i)
    for i, text in enumerate(rows)
  ]
  lines = [records.encode(row) for row in rows]
  whole = b"".join(lines)
  cut = data.draw(st.integers(0, len(whole)))
  path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
  path.write_bytes(whole[:cut])
  # A line that lacks its newline only is whole: JSON ends with its brace.
  ends = [sum(map(len, lines[: i + 1])) - 1 for i in range(len(lines))]
  kept = sum(end <= cut for end in ends)
  with jsonl.Store(path, records.Response) as store:
    assert store.rows == rows[:kept]
    store.append(RESPONSE)
  assert path.read_bytes() == b"".join(lines[:kept]) + records.encode(RESPONSE)


def test_what_may_be_unknown_may_be_missing():
  values = json.loads(line())
  del values["mean_logp"], values["subset"]
  data = json.dumps(values).encode()
  assert records.decode(data, records.Response) == RESPONSE


def test_store_says_what_it_cut(tmp_path, caplog):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(line() + line()[:30])
  with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
    records.read(path, records.Response)
  with jsonl.Store(path, records.Response) as store:
    assert store.rows == [RESPONSE]
  assert "30 bytes" in caplog.text
  assert path.read_bytes() == line()


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (line(step="1"), "step"),
    (line(top_k=True), "top_k"),
    (line(temperature=10**400), "temperature"),
    (line(top_k=1.0), "top_k"),
    (line(prompt=None), "prompt"),
    (line(finish_reason="stop"), "finish_reason.*'eos', 'turn', 'length'"),
    (line(extra=1), "extra"),
    (line().replace(b'"chosen"', b'"chose"'), "chosen"),
    (line().replace(b"1.0", b"NaN", 1), "NaN is not a JSON number"),
    (line().replace(b" yes", b"\\ud83d"), "'response' holds a lone surrogate"),
    (line().replace(b" yes", b"\xff"), "not UTF-8 at byte"),
    (line()[:40] + b"\n", "not JSON: Invalid control character"),
    (b"\n", "Expecting value"),
    (b"[1]\n", "row must be a dict"),
  ],
)
def test_bad_line_is_named_with_its_field(tmp_path, data, message):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(line() + data + line())
  with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*(?:{message})"):
    records.read(path, records.Response)
  # A bad line in the middle is not an interrupted append: nothing is mended.
  with (
    pytest.raises(ValueError, match=r"rows\.jsonl:2"),
    jsonl.Store(path, records.Response),
  ):
    pass
  assert path.read_bytes() == line() + data + line()
  assert not path.with_name("rows.jsonl.lock").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"temperature": float("nan")}, "temperature.*finite"),
    ({"temperature": np.float64(0.5)}, "temperature.*float64"),
    ({"token_count": np.int64(3)}, "token_count"),
    ({"response": "\ud83d"}, "'response' holds a lone surrogate"),
    ({"finish_reason": "done"}, "finish_reason"),
  ],
)
def test_bad_row_is_refused_before_it_is_written(tmp_path, changes, message):
  path = tmp_path / "rows.jsonl"
  with (
    jsonl.Store(path, records.Response) as store,
    pytest.raises(ValueError, match=message),
  ):
    store.append_many([RESPONSE, dataclasses.replace(RESPONSE, **changes)])
  assert path.read_bytes() == b""


def test_content_hash_keeps_parts_apart():
  assert hashing.content_hash("ab", "c") != hashing.content_hash("a", "bc")
  assert hashing.content_hash("a") != hashing.content_hash("a", "")
  # By hand: each part after its byte count and a colon.
  expected = hashlib.sha256(b"2:\xc3\xa9" + b"1:x").hexdigest()
  assert hashing.content_hash("é", "x") == expected


def test_the_last_verdict_of_a_unit_counts(tmp_path):
  path = tmp_path / "verdicts.jsonl"
  missing = dataclasses.replace(VERDICT, verdict="missing", error="HTTP 500")
  other = dataclasses.replace(VERDICT, order="chosen_first")
  retest = dataclasses.replace(VERDICT, control="retest", score=None)
  with jsonl.Store(path, records.Verdict) as store:
    store.append_many([missing, other, retest, VERDICT])
  assert records.read(path, records.Verdict) == [other, retest, VERDICT]
  with jsonl.Store(path, records.Verdict) as store:
    assert store.rows == [missing, other, retest, VERDICT]


def test_a_full_disk_keeps_what_was_committed(tmp_path):
  """The size limit of a real process stands in for the size of a disk."""
  path = tmp_path / "rows.jsonl"
  with jsonl.Store(path, records.Response) as store:
    store.append(RESPONSE)
  before = path.read_bytes()
  code = f"""
import dataclasses, resource, signal
from dpo_jax.io import jsonl, records
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before)} + 100,) * 2)
with jsonl.Store({str(path)!r}, records.Response) as store:
  try:
    store.append(dataclasses.replace(store.rows[0], sample_id=1))
  except OSError as error:
    print(error)
"""
  out = python(code).communicate(timeout=60)[0]
  assert str(path) in out
  assert f"{len(before)} bytes" in out
  assert path.read_bytes() == before


def python(code: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", code],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, caplog):
  path = tmp_path / "rows.jsonl"
  code = f"""
from dpo_jax.io import jsonl, records
with jsonl.Store({str(path)!r}, records.Response) as store:
  print("held", flush=True)
  input()
"""
  with python(code) as holder:
    try:
      assert holder.stdout.readline() == "held\n"
      with (
        pytest.raises(locks.Held, match=f"pid {holder.pid} on "),
        jsonl.Store(path, records.Response),
      ):
        pass
    finally:
      holder.send_signal(signal.SIGKILL)
  # The killed process left its lock file behind.
  assert path.with_name("rows.jsonl.lock").exists()
  with jsonl.Store(path, records.Response) as store:
    store.append(RESPONSE)
  assert f"stale lock of pid {holder.pid}" in caplog.text
  assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_lock_of_another_host_is_not_guessed_about(tmp_path):
  path = tmp_path / "lock"
  path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
  with pytest.raises(locks.Held, match="elsewhere"), locks.Lock(path):
    pass
  assert "elsewhere" in path.read_text()


def test_a_killed_writer_leaves_whole_rows_only(tmp_path):
  path = tmp_path / "rows.jsonl"
  code = f"""
import dataclasses
from dpo_jax.io import jsonl, records
row = records.decode({records.encode(RESPONSE)!r}, records.Response)
with jsonl.Store({str(path)!r}, records.Response) as store:
  number = 0
  while True:
    store.append(dataclasses.replace(row, sample_id=number))
    print(number, flush=True)
    number += 1
"""
  with python(code) as writer:
    printed = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    printed += [int(number) for number in writer.stdout.read().split()]
  with jsonl.Store(path, records.Response) as store:
    numbers = [row.sample_id for row in store.rows]
  # Rows that `append` returned from are there, in order, and at most one more.
  assert numbers[: len(printed)] == printed == list(range(len(printed)))
  assert len(numbers) - len(printed) in (0, 1)
