"""Where the files of configs/ and the scripts are.

In a clone they lie beside the package; a wheel carries them in
dpo_jax/shipped/. A file of the working directory always comes first, so that
`--config=configs/demo.py` means one's own file where there is one.
"""

import difflib
import pathlib
import re
import sys

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_BARE = re.compile(r"[\w-]+")


def root() -> pathlib.Path:
  """The directory that holds configs/, train.py, sample.py and judge.py."""
  shipped = _PACKAGE / "shipped"
  return shipped if shipped.is_dir() else _PACKAGE.parent


def find(name: str) -> str:
  """The "FILE:VARIANT" that a --config names.

  Args:
    name: "configs/demo.py", "configs/demo.py:tiny", or "demo:tiny" for short.

  Returns:
    The same where there is such a file; else that of `root`; else the name as
    it was, for whoever opens it to say that it is missing.
  """
  path, colon, variant = name.partition(":")
  if pathlib.Path(path).is_file():
    return name
  if _BARE.fullmatch(path):
    path = f"configs/{path}.py"
  shipped = root() / path
  if pathlib.Path(path).is_file():
    name = path + colon + variant
  elif path.startswith("configs/") and shipped.is_file():
    name = str(shipped) + colon + variant
  return name


def missing(path: str) -> str:
  """What to say of a config that is not there, with the near names."""
  names = sorted(file.stem for file in (root() / "configs").glob("*.py"))
  near = difflib.get_close_matches(pathlib.Path(path).stem, names, 1)
  hint = f"did you mean configs/{near[0]}.py?" if near else f"there are {names}"
  return f"--config: there is no file {path!r}; {hint}"


def importable() -> None:
  """Lets files of configs/ import each other, as `configs.common`.

  Those of the working directory come first.
  """
  for path, place in ((str(root()), len(sys.path)), ("", 0)):
    if path not in sys.path:
      sys.path.insert(place, path)
