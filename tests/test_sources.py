"""Sources: sides, filters, limits, and every row accounted for."""

import hashlib

import hypothesis
import pytest
from hypothesis import strategies as st
from sourcing import ASSISTANT, HUMAN, apart, filters, line, load, source, texts

from dpo_jax.data import preferences, sources


@pytest.fixture
def write(tmp_path):
  def to(rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"".join(line(row) for row in rows))
    return path

  return to


def numbered(count, start=0):
  return [apart(f"p{i}", f" a{i}", f" b{i}") for i in range(start, count)]


def chosen(loaded):
  return [row.chosen for row in loaded.rows]


# --- settings


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"train_path": ""}, "train_path='' must name"),
    ({"held_out": 0.1}, r"held_out=0.1 must be 0, as eval_path='x'"),
    ({"eval_path": ""}, r"held_out=0.0 must be a share between 0 and 1"),
    ({"eval_path": "", "held_out": 1.0}, "held_out=1.0 must be a share"),
    ({"eval_path": "", "held_out": -0.1}, "held_out=-0.1 must be a share"),
    ({"eval_path": "", "held_out": float("nan")}, "held_out=nan must be"),
    ({"weight": 0.0}, "weight=0.0 must be positive and finite"),
    ({"subsets": ("a", "b", "a")}, "subsets=.* names one twice"),
    ({"min_score_ratio": 2.0}, "min_score_ratio=2.0 is for kind='shp'"),
    ({"max_pairs_per_prompt": 3}, "max_pairs_per_prompt=3 is for kinds"),
    ({"kind": "tfds"}, r"subsets=\(\) must name what was written"),
    ({"kind": "tfds", "subsets": ("a",), "streaming": True}, "streaming=True"),
  ],
)
def test_a_source_that_cannot_be_meant_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    source("x", **changes)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"skip_bad": -1}, "skip_bad=-1 must not be negative"),
    (
      {"min_response_chars": 9, "max_response_chars": 8},
      "max_response_chars=8 must be at least min_response_chars=9",
    ),
    (
      {"single_turn": True, "max_turns": 2},
      "max_turns=2 contradicts single_turn=True",
    ),
  ],
)
def test_filters_that_cannot_be_meant_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    filters(**changes)


def test_settings_are_accepted_where_they_say_something():
  source("x", kind="shp", min_score_ratio=2.0, max_pairs_per_prompt=5)
  source("x", eval_path="", held_out=0.01)
  filters(min_response_chars=9, max_response_chars=9, single_turn=True)


# --- sides


def test_each_side_reads_its_own_path_and_split(write, tmp_path):
  write(numbered(2), "train.jsonl")
  write(numbered(5, start=2), "test.jsonl")
  other = write(numbered(6, start=5))
  assert chosen(load(tmp_path)) == [" a0", " a1"]
  assert chosen(load(tmp_path, side="eval")) == [" a2", " a3", " a4"]
  assert chosen(load(tmp_path, side="eval", eval_path=str(other))) == [" a5"]


def test_prompts_are_held_out_by_their_hash(write):
  # Two pairs of each prompt, far from each other.
  rows = numbered(400) + [apart(f"p{i}", f" c{i}", " d") for i in range(400)]
  path = write(rows)
  split = {"eval_path": "", "held_out": 0.25}
  train = load(path, **split)
  held_out = load(path, side="eval", **split)

  def taken(prompt):
    data = b"".join(
      len(text).to_bytes(8, "big") + text.encode()
      for text in ("held out", prompt)
    )
    digest = hashlib.sha256(data).digest()[:8]
    return int.from_bytes(digest, "big") / 2**64 < 0.25

  wanted = {f"p{i}" for i in range(400) if taken(f"p{i}")}
  assert {row.prompt for row in held_out.rows} == wanted
  # 400 draws at 1/4: mean 100, standard deviation 8.7.
  assert 65 < len(wanted) < 135
  assert len(held_out.rows) == 2 * len(wanted)
  assert len(train.rows) + len(held_out.rows) == 800
  assert preferences.leaks(train.rows, held_out.rows) == 0
  assert train.counts == {
    "read": 800,
    "filtered: the prompt is held out": 2 * len(wanted),
    "kept": 800 - 2 * len(wanted),
  }
  assert held_out.counts == {
    "read": 800,
    "filtered: the prompt is trained on": 800 - 2 * len(wanted),
    "kept": 2 * len(wanted),
  }


@hypothesis.given(st.lists(st.text(), max_size=20), st.floats(0, 1), st.text())
def test_a_held_out_prompt_stays_so_in_any_company(prompts, share, prompt):
  alone = sources.is_held_out(prompt, share)
  taken = [p for p in [*prompts, prompt] if sources.is_held_out(p, share)]
  assert (prompt in taken) == alone
  # A greater share takes all that a smaller one takes, and 1 takes all.
  assert not alone or sources.is_held_out(prompt, min(1.0, share * 1.5))
  assert sources.is_held_out(prompt, 1.0)
  assert not sources.is_held_out(prompt, 0.0)


# --- filters


def talk(count):
  """A prompt of so many human turns."""
  middle = f"{ASSISTANT} Yes.".join(f"{HUMAN} Go {i}." for i in range(count))
  return middle + ASSISTANT


@pytest.mark.parametrize(
  ("filtered", "kept", "reason"),
  [
    ({"single_turn": True}, [1], "several turns"),
    ({"max_turns": 1}, [1], "more than 1 turns"),
    ({"max_turns": 2}, [1, 2], "more than 2 turns"),
    ({"max_turns": 3}, [1, 2, 3], None),
  ],
)
def test_turns(write, filtered, kept, reason):
  path = write([apart(talk(n), f" {n}", " x") for n in (1, 2, 3)])
  loaded = load(path, filtered=filtered)
  assert chosen(loaded) == [f" {n}" for n in kept]
  wanted = {"read": 3, "kept": len(kept)}
  if reason:
    wanted[f"filtered: {reason}"] = 3 - len(kept)
  assert loaded.counts == wanted


def test_a_prompt_without_marks_is_not_of_several_turns(write):
  path = write([apart("Sum up: a.", " b", " c")])
  assert len(load(path, filtered={"single_turn": True}).rows) == 1


@pytest.mark.parametrize(
  ("filtered", "kept", "reason"),
  [
    # Characters are counted, not bytes, and not the white space around them.
    ({"min_response_chars": 3}, [1, 2], "response shorter than 3 characters"),
    ({"min_response_chars": 4}, [1], "response shorter than 4 characters"),
    ({"max_response_chars": 4}, [0, 2], "response longer than 4 characters"),
    ({"max_response_chars": 3}, [2], "response longer than 3 characters"),
    ({"max_prompt_chars": 5}, [0, 1], "prompt longer than 5 characters"),
    ({"max_prompt_chars": 6}, [0, 1, 2], None),
  ],
)
def test_lengths(write, filtered, kept, reason):
  rows = [
    apart(" 12345 ", " four", " 2 "),
    apart("12345", " fives", " four\n"),
    apart("123456", " שלו", " 😀😀😀"),
  ]
  loaded = load(write(rows), filtered=filtered)
  assert chosen(loaded) == [rows[i]["chosen"] for i in kept]
  wanted = {"read": 3, "kept": len(kept)}
  if reason:
    wanted[f"filtered: {reason}"] = 3 - len(kept)
  assert loaded.counts == wanted


def test_a_pair_is_counted_under_its_first_reason_only(write):
  rows = [apart(talk(3), " a", " b"), apart(talk(1), " long one", " other")]
  loaded = load(
    write(rows), filtered={"single_turn": True, "min_response_chars": 3}
  )
  assert loaded.counts == {
    "read": 2,
    "filtered: several turns": 1,
    "kept": 1,
  }


def test_repeats_are_counted_or_dropped(write):
  one, two, turned = (
    apart("p", " a", " b"),
    apart("p", " a", " c"),
    apart("p", " b", " a"),
  )
  path = write([one, two, one, turned, one])
  assert load(path).counts == {
    "read": 5,
    "kept": 5,
    "kept, repeating an earlier pair": 2,
    "kept, preferring the opposite of an earlier pair": 2,
  }
  loaded = load(path, filtered={"drop_repeats": True})
  assert texts(loaded) == [
    ("p", " a", " b"),
    ("p", " a", " c"),
    ("p", " b", " a"),
  ]
  assert loaded.counts == {
    "read": 5,
    "filtered: repeats an earlier pair": 2,
    "kept": 3,
    "kept, preferring the opposite of an earlier pair": 1,
  }


def test_a_limit_counts_kept_pairs_and_stops_reading(write, tmp_path):
  rows = [apart("p", "", " b"), *numbered(2), apart("p", " x", " x")]
  path = write(rows)
  with path.open("ab") as file:
    file.write(b"{not JSON")
  loaded = load(path, limit=2)
  assert chosen(loaded) == [" a0", " a1"]
  # The rows behind the second one were not looked at.
  assert loaded.counts == {
    "read": 3,
    "quarantined: empty chosen response": 1,
    "kept": 2,
  }
  assert load(path, limit=1).rows == loaded.rows[:1]
  with pytest.raises(ValueError, match=r":5: not JSON"):
    load(path, limit=3)
  with pytest.raises(ValueError, match="limit=-1 is negative"):
    load(path, limit=-1)


def test_rows_are_known_by_their_texts_wherever_they_stand(write):
  there = load(write(numbered(3)))
  back = load(write(numbered(3)[::-1], "b.jsonl"))
  assert {row.id for row in there.rows} == {row.id for row in back.rows}
  assert there.fingerprint != back.fingerprint
  assert there.fingerprint == load(write(numbered(3), "c.jsonl")).fingerprint


PIECE = st.sampled_from(["", " ", " a", " bb", " ccc"])
ROW = st.one_of(
  st.builds(apart, st.sampled_from(["", talk(1), talk(2)]), PIECE, PIECE),
  st.sampled_from([{"chosen": " a"}, [], {"chosen": "a", "rejected": "b"}]),
)


@hypothesis.given(
  st.lists(ROW, max_size=12), st.booleans(), st.booleans(), st.integers(0, 3)
)
@hypothesis.settings(
  deadline=None,
  max_examples=60,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_every_row_read_is_kept_or_counted_once(
  write, rows, single_turn, drop_repeats, shortest
):
  rows = [*rows, apart(talk(1), " sound", " pair")]
  loaded = load(
    write(rows),
    filtered={
      "single_turn": single_turn,
      "drop_repeats": drop_repeats,
      "min_response_chars": shortest,
      "skip_bad": 99,
    },
  )
  gone = sum(
    number
    for reason, number in loaded.counts.items()
    if reason.startswith(("malformed: ", "quarantined: ", "filtered: "))
  )
  assert loaded.counts["read"] == len(rows) == gone + loaded.counts["kept"]
  assert loaded.counts["kept"] == len(loaded.rows)
