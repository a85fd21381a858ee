"""JSON files that are not strict, or too large, are refused by name."""

import pytest

from dpo_jax.io import strict_json


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b'{"a": 1', "Expecting"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    (b'{"a": 1e999}', "too large to be finite"),
    (b'{"a": [{"b": ["\\ud800"]}]}', "'b' holds a lone surrogate"),
    (b'{"\\uDFFF": 1}', "holds a lone surrogate"),
    (b"9" * 5000, "digits"),
  ],
)
def test_strange_json_is_refused_with_its_file(tmp_path, data, message):
  path = tmp_path / "eval_x.json"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=rf"eval_x\.json: .*{message}"):
    strict_json.read(path)


def test_json_at_its_limits_is_read(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  path.write_bytes(b"[1,2,3,445]")
  monkeypatch.setattr(strict_json, "MAX_BYTES", 10)
  with pytest.raises(ValueError, match=r"x\.json: longer than 0 MiB"):
    strict_json.read(path)
  path.write_bytes(b"[1,2,3,44]")
  assert strict_json.read(path) == [1, 2, 3, 44]
