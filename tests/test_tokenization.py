"""The three tokenization rules: ids of TRL itself, truncation word by word."""

import collections
import hashlib
import json
import unicodedata

import hypothesis
import pytest
import sourcing
from hypothesis import strategies as st

from dpo_jax.data import preferences, sources, tokenization, tokenizer

ODD = [
  "👩🏽‍🚀",
  "שלום",
  "\0",
  "\u2028",
  "e\u0301",
  "é",
  " ",
  "\n",
  "a",
  ")",
  ":",
]
EOS = "<|endoftext|>"
RULES = ("paper", "trl", "dpo-replication")
NO_ROOM = "dropped: no room for prompt and response"
NO_TOKEN = "dropped: the prompt has no token of its own"
EQUAL = "dropped: both responses have the same tokens"


@pytest.fixture(scope="module")
def pythia(shared):
  return tokenizer.load(shared / "tokenizer" / "pythia")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  # One byte is one token: no letter below occurs in this text.
  return tokenizer.train(["pen"], 258, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def real(shared):
  return [
    row for side in ("train", "eval") for row in sourcing.harmless(shared, side)
  ]


def of(*texts):
  """Rows of (prompt, chosen, rejected), numbered."""
  return [preferences.Comparison(str(i), *row) for i, row in enumerate(texts)]


def run(words, rows, rules, max_length, max_prompt_length):
  if rules == "trl":
    max_prompt_length = 0
  return tokenization.tokenize(
    words,
    rows,
    rules=rules,
    max_length=max_length,
    max_prompt_length=max_prompt_length,
  )


def listed(done):
  return [
    (list(pair.prompt), list(pair.chosen), list(pair.rejected))
    for pair in done.table
  ]


# --- TRL's own ids

# benchmarks/trl_tokens.py prints these hashes of the ids that TRL made of the
# 1,806 good rows: trl 1.16.0 of "trl", trl 0.24.0 of "dpo-replication".
TRL_HASHES = [
  ("trl", 512, 0, 1786, "ecebd661f2116c50"),
  ("trl", 96, 0, 900, "cf3943b5f00f7147"),
  ("dpo-replication", 512, 358, 1804, "7c932521bf077a8f"),
  ("dpo-replication", 96, 48, 1466, "18c90cfc6e1645ef"),
]


@pytest.mark.parametrize(
  ("rules", "max_length", "max_prompt", "kept", "digest"), TRL_HASHES
)
def test_all_real_rows_have_trls_ids(
  pythia, real, rules, max_length, max_prompt, kept, digest
):
  done = run(pythia, real, rules, max_length, max_prompt)
  lines = [json.dumps(row) + "\n" for row in listed(done)]
  found = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
  assert (len(real), len(lines), found) == (1806, kept, digest)


HUMAN = "\n\nHuman: Name a colour.\n\nAssistant:"
# fmt: off
HUMAN_IDS = [
  187, 187, 22705, 27, 9424, 247, 10688, 15, 187, 187, 6717, 5567, 27,
]
STRANGE = [
  228, 104, 14931, 226, 123, 325, 224, 14931, 237, 211, 33839, 20770, 12859,
  240, 40702, 79, 335, 209, 177, 3974, 3974, 0,
]
# fmt: on
SPOKEN = [
  (HUMAN, " Blue, like the sea.  ", " No"),
  (HUMAN, "Blue", " 👩🏽‍🚀 שלום\u2028nul \0 é e\u0301"),
]
# Prompts whose end merges with a response into other tokens.
MERGING = [
  ("Say it:", ")", " yes"),
  ("Say it ", "word", "thing"),
  ("line\n", "\n\nnext", "next"),
  ("tail  ", "  ", "\u2028 end"),
]
BLUE = [13, 751, 253, 6150, 15]


def test_ids_of_trl(pythia):
  # Given by trl 1.16.0.
  done = run(pythia, of(*SPOKEN, *MERGING), "trl", 64, 0)
  assert listed(done) == [
    (HUMAN_IDS, [10063, *BLUE, 50276, 0], [1621, 0]),
    (HUMAN_IDS, [22036, 0], [22692, *STRANGE]),
    ([27128, 352], [37731, 0], [27, 4754, 0]),
    ([27128, 352], [3159, 0], [2181, 0]),
    ([1282], [535, 187, 8384, 0], [187, 8384, 0]),
    ([14694], [50274, 0], [50276, 40702, 990, 0]),
  ]
  assert done.counts == {"prompt's end merges with a response": 4}
  # Nothing of a text was lost by that.
  assert not done.cut.any()


def test_ids_of_trl_cut_to_14(pythia):
  # Given by trl 1.16.0: the prompt takes 13.
  done = run(pythia, of(*SPOKEN), "trl", 14, 0)
  assert listed(done) == [
    (HUMAN_IDS, [10063], [1621]),
    (HUMAN_IDS, [22036], [22692]),
  ]
  assert done.counts == {"response cut": 2}
  # And given by it for 13: nothing is left.
  none = run(pythia, of(*SPOKEN), "trl", 13, 0)
  assert none.counts == {NO_ROOM: 2}
  assert (len(none.table), none.cut.shape) == (0, (0,))


def test_ids_of_dpo_replication(pythia):
  # Given by trl 0.24.0 of stripped responses.
  rows = of(*SPOKEN, *MERGING)
  done = run(pythia, rows, "dpo-replication", 64, 40)
  assert listed(done) == [
    (HUMAN_IDS, [22036, *BLUE, 0], [2302, 0]),
    (HUMAN_IDS, [22036, 0], [14931, *STRANGE]),
    ([27128, 352, 27], [10, 0], [9820, 0]),
    ([27128, 352, 209], [3418, 0], [1597, 0]),
    ([14694, 50276], [0], [423, 0]),
  ]
  assert done.counts == {EQUAL: 1}
  # The same with 14 and 8: 14 - 7 leaves the prompt 7; 23 leave it nothing.
  short = run(pythia, rows, "dpo-replication", 14, 8)
  assert listed(short)[0] == (HUMAN_IDS[-7:], [22036, *BLUE, 0], [2302, 0])
  assert short.counts == {
    NO_ROOM: 1,
    "prompt cut": 1,
    EQUAL: 1,
  }
  assert short.cut.tolist() == [True, False, False, False]


def test_dpo_replication_strips_both_ends_of_responses_alone(pythia):
  one, two = (
    run(pythia, of((" p ", *responses)), "dpo-replication", 64, 40)
    for responses in (("\n a b \t", "\u2028c \n"), ("a b", "c"))
  )
  assert listed(one) == listed(two)
  assert pythia.decode(one.table[0].prompt) == " p "


def test_a_prompt_that_merges_whole_is_dropped(pythia):
  # trl 1.16.0 keeps both with no prompt, whose first token nothing predicts.
  rows = of(("cafe", "\u0301 yes", "teria"), ("e", "\u0301", "xample"))
  done = run(pythia, rows, "trl", 64, 0)
  assert len(done.table) == 0
  assert done.counts[NO_TOKEN] == 2


def test_a_tokenizer_that_adds_tokens_is_refused_under_trl(
  shared, tmp_path, pythia
):
  pythia.save(tmp_path)
  path = tmp_path / "tokenizer.json"
  values = json.loads(path.read_text("utf-8"))
  for token in values["added_tokens"]:
    token["lstrip"] = token["content"] == EOS
  path.write_text(json.dumps(values), "utf-8")
  words = tokenizer.load(tmp_path)
  with pytest.raises(ValueError, match="set tokenization='paper'"):
    run(words, of(*SPOKEN), "trl", 64, 0)
  assert listed(run(words, of(*SPOKEN), "paper", 64, 32))


# --- the rules, in plain Python


def paper(prompt, chosen, rejected, max_length, max_prompt):
  """What the rule's words say, on lists; None if the pair is dropped."""
  longer = max(len(chosen), len(rejected))
  if len(prompt) + longer > max_length:
    prompt = prompt[-max_prompt:]
  if len(prompt) + longer > max_length:
    chosen = chosen[: max_length - max_prompt]
    rejected = rejected[: max_length - max_prompt]
  return prompt, chosen, rejected


def trl(prompt, chosen, rejected, max_length, _):
  if len(prompt) >= max_length:
    return None
  both = [(prompt + response)[:max_length] for response in (chosen, rejected)]
  return prompt, both[0][len(prompt) :], both[1][len(prompt) :]


def dpo_replication(prompt, chosen, rejected, max_length, max_prompt):
  prompt = prompt[-max_prompt:]
  while prompt and len(prompt) + max(len(chosen), len(rejected)) > max_length:
    prompt = prompt[1:]
  return (prompt, chosen, rejected) if prompt else None


PLAIN = {"paper": paper, "trl": trl, "dpo-replication": dpo_replication}


def lettered(sizes):
  """Texts of these many tokens under `trained`, no two letters alike."""
  return tuple(
    "".join(letters[i % len(letters)] for i in range(size))
    for size, letters in zip(sizes, ("QRSTUVWX", "YZAB", "JKLM"))
  )


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.sampled_from(RULES),
  st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6),
  st.integers(2, 50),
  st.data(),
)
def test_cuts_are_where_the_rule_says(trained, rules, sizes, max_length, data):
  max_prompt = data.draw(st.integers(1, max_length - 1))
  rows = of(*map(lettered, sizes))
  done = run(trained, rows, rules, max_length, max_prompt)
  expected, cut, counts = [], [], collections.Counter()
  for row in rows:
    whole = (
      trained.encode(row.prompt),
      *([*trained.encode(x), 0] for x in (row.chosen, row.rejected)),
    )
    left = PLAIN[rules](*whole, max_length, max_prompt)
    if left and left[1] == left[2]:
      counts[EQUAL] += 1
    elif left:
      expected.append((row.id, *left))
      shorter = [len(a) < len(b) for a, b in zip(left, whole)]
      counts["prompt cut"] += shorter[0]
      counts["response cut"] += any(shorter[1:])
      cut.append(any(shorter))
      assert len(left[0]) + max(map(len, left[1:])) <= max_length
      assert min(map(len, left)) >= 1
  found = [(pair.id, *ids) for pair, ids in zip(done.table, listed(done))]
  assert found == expected
  assert done.cut.tolist() == cut
  assert done.cut.dtype == bool
  counts[NO_ROOM] = len(rows) - len(expected) - counts[EQUAL]
  counts = {reason: number for reason, number in counts.items() if number}
  assert done.counts == counts


# By hand; lengths of prompt, chosen and rejected in tokens, EOS not counted;
# what is left of each, EOS counted.
@pytest.mark.parametrize(
  ("rules", "sizes", "left"),
  [
    # 12 + 8 = 20 fits; with one more the prompt keeps its last 8.
    ("paper", (12, 7, 3), (12, 8, 4)),
    ("paper", (12, 8, 3), (8, 9, 4)),
    # 8 + 12 fits after the cut; one more cuts both responses to 20 - 8.
    ("paper", (30, 11, 2), (8, 12, 3)),
    ("paper", (30, 40, 50), (8, 12, 12)),
    # A short prompt is not cut, and leaves the responses no more room.
    ("paper", (4, 16, 2), (4, 12, 3)),
    # As long as that the responses may be more than 20 - 8.
    ("paper", (4, 15, 2), (4, 16, 3)),
    # Each sequence of TRL's has 20 tokens; the prompt is never cut.
    ("trl", (12, 8, 3), (12, 8, 4)),
    ("trl", (19, 8, 3), (19, 1, 1)),
    ("trl", (20, 3, 3), None),
    # The prompt is cut though there is room, then for the longer one.
    ("dpo-replication", (12, 3, 3), (8, 4, 4)),
    ("dpo-replication", (12, 13, 3), (6, 14, 4)),
    ("dpo-replication", (12, 18, 3), (1, 19, 4)),
    ("dpo-replication", (12, 3, 19), None),
  ],
)
def test_lengths_by_hand(trained, rules, sizes, left):
  done = run(trained, of(lettered((2, 2, 2)), lettered(sizes)), rules, 20, 8)
  if left:
    assert tuple(map(len, listed(done)[1])) == left
  else:
    assert done.table.ids == ("0",)
    assert done.counts == {NO_ROOM: 1}


@pytest.mark.parametrize("rules", RULES)
def test_no_row_is_lost_between_batches(trained, rules):
  rows = of(*[lettered((1 + i % 7, 1 + i % 5, 1 + i % 3)) for i in range(2060)])
  done = run(trained, rows, rules, 8, 3)
  ids = done.table.ids
  assert list(ids) == sorted(ids, key=int)
  assert len(done.cut) == len(ids)
  assert len(ids) + done.counts.get(NO_ROOM, 0) == 2060
  for i in (0, 1023, 1024, 2059):
    one = run(trained, rows[i : i + 1], rules, 8, 3)
    if one.table:
      assert done.table[ids.index(str(i))] == one.table[0]


def test_no_rows_give_an_empty_table(pythia):
  done = run(pythia, [], "trl", 8, 0)
  assert (len(done.table), done.counts, done.cut.tolist()) == (0, {}, [])


# --- borders of prompt and response

odd = st.lists(st.sampled_from(ODD), min_size=1, max_size=8).map("".join)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(odd, odd, odd, odd)
def test_responses_never_depend_on_the_prompt_under_paper(
  pythia, one, two, chosen, other
):
  # Nothing is learned from responses that are equal once normalized.
  chosen += "."
  rows = of((one, chosen, other), (two, chosen, other))
  first, second = run(pythia, rows, "paper", 400, 200).table
  assert (first.chosen, first.rejected) == (second.chosen, second.rejected)
  # The text comes back in Unicode's normal form, with EOS behind it.
  normal = unicodedata.normalize("NFC", chosen)
  assert pythia.decode(first.chosen) == normal + EOS
  assert pythia.decode(first.prompt) == unicodedata.normalize("NFC", one)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(odd, odd, odd)
def test_prompt_and_response_together_are_the_text_under_trl(
  pythia, prompt, chosen, other
):
  done = run(pythia, of((prompt, chosen, other)), "trl", 400, 0)
  for pair in done.table:
    for response, text in ((pair.chosen, chosen), (pair.rejected, other)):
      assert pythia.decode(pair.prompt + response) == (
        unicodedata.normalize("NFC", prompt + text) + EOS
      )
  dropped = sum(done.counts.get(reason, 0) for reason in (NO_TOKEN, EQUAL))
  assert len(done.table) + dropped == 1


@pytest.mark.parametrize("rules", RULES)
def test_eos_ends_a_response_unless_it_was_cut(pythia, real, rules):
  done = run(pythia, real[:200], rules, 96, 32)
  for pair in done.table:
    for response in (pair.chosen, pair.rejected):
      assert pythia.eos_id not in response[:-1]
      longest = 96 - (32 if rules == "paper" else len(pair.prompt))
      assert response[-1] == pythia.eos_id or len(response) == longest
  assert done.counts["response cut" if rules == "trl" else "prompt cut"] > 0


# --- refusals


@pytest.mark.parametrize("special", [EOS, "<|padding|>"])
@pytest.mark.parametrize("rules", RULES)
def test_special_text_is_dropped_and_counted(pythia, special, rules):
  rows = of(
    ("p", " a", " b"),
    (f"p{special}", " a", " b"),
    ("p", f" {special}", " b"),
    ("p", " a", f"{special} b"),
  )
  done = run(pythia, rows, rules, 9, 4)
  assert done.table.ids == ("0",)
  assert done.counts == {"holds a special token": 3}


def test_special_text_across_the_border(pythia):
  rows = of((EOS[:5], EOS[5:], " b"))
  assert len(run(pythia, rows, "paper", 20, 8).table) == 1
  assert run(pythia, rows, "trl", 20, 0).counts == {"holds a special token": 1}


@pytest.mark.parametrize(
  ("rules", "max_length", "max_prompt", "message"),
  [
    ("paper", 20, 0, r"max_prompt_length=0 must be between 1 and .*\(19\)"),
    ("paper", 20, 20, "max_prompt_length=20 must be between"),
    ("dpo-replication", 20, -1, "max_prompt_length=-1 must be between"),
    ("trl", 20, 8, "max_prompt_length=8 has no meaning .*; set it to 0"),
    ("trl", 1, 0, "max_length=1 must be at least 2"),
    ("TRL", 20, 0, "='TRL' must be one of paper, trl, dpo-replication"),
  ],
)
def test_lengths_that_cannot_be_kept_are_refused(
  rules, max_length, max_prompt, message
):
  with pytest.raises(ValueError, match=message):
    tokenization.check_lengths(rules, max_length, max_prompt)


@pytest.mark.parametrize("rules", ["paper", "trl", "dpo-replication"])
def test_pairs_whose_responses_have_equal_tokens_are_dropped(
  pythia, shared, rules
):
  # Pythia's tokenizer normalizes: "e" and an accent are the one letter.
  rows = sources.read_file(str(shared / "cases" / "data" / "nfc.jsonl")).rows
  assert all(row.chosen != row.rejected for row in rows)
  limit = 0 if rules == "trl" else 32
  done = run(pythia, rows, rules, 64, limit)
  assert (len(done.table), done.counts) == (0, {EQUAL: 24})
  # Those that differ in white space alone are equal once it is stripped.
  rows = sources.read_file(str(shared / "cases" / "data" / "ws.jsonl")).rows
  differ = [row.chosen.strip() != row.rejected.strip() for row in rows]
  done = run(pythia, rows, rules, 64, limit)
  expected = sum(differ) if rules == "dpo-replication" else len(rows)
  assert len(done.table) == expected
  assert 0 < sum(differ) < len(rows)


def test_pairs_equal_once_cut_are_dropped(trained):
  rows = of(("QQ", "YYYYYY", "YYYYZZ"), ("QQ", "YY", "ZZ"))
  done = run(trained, rows, "paper", 6, 2)
  assert done.counts == {EQUAL: 1}
  assert listed(done) == listed(run(trained, rows[1:], "paper", 6, 2))
