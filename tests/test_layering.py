"""Which folder may import which, and which library stays in which folder."""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpo_jax"

# From bottom to top: a folder or module imports only from those before it.
FOLDERS = (
  "core",
  "io",
  "cli",
  "demo",
  "winrates",
  "model",
  "data",
  "hub",
  "judging",
  "sampling",
  "training",
  "report",
  "plan",
  "replicate",
  "__main__",
)
# These import nothing of the package but themselves and core.
PURE = ("winrates", "demo")
# The public names; nothing in the package imports them.
FACADE = "__init__"

# Libraries by the folders that may import them: but for EAGER, within
# functions, being optional or slow to import.
LIBRARIES = {
  "cli": "absl ml_collections",
  "data": "bs4 datasets grain tensorflow_datasets tokenizers transformers",
  "hub": "huggingface_hub",
  "io": "fsspec huggingface_hub safetensors",
  "judging": "httpx2 openai",
  "model": "flax",
  "report": "markdown_it matplotlib",
  "training": "orbax tensorboardX wandb",
  "winrates": "scipy",
}
EAGER = {"absl", "flax", "matplotlib", "ml_collections", "orbax", "safetensors"}
# Imported nowhere: only tests compare with torch, and nothing is unpickled.
NEVER = {"peft", "pickle", "tensorflow", "torch"}
# Allowed in every folder.
COMMON = {"dpo_jax", "jax", "numpy", "optax", "tqdm"}


def module_of(path):
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1:] == ("__init__",) else parts)


FILES = {module_of(path) or FACADE: path for path in PACKAGE.rglob("*.py")}
SCRIPTS = {
  path.name: path for path in ROOT.glob("*.py") if path.stem != "setup"
}


def folder(module):
  return module.split(".")[0]


@functools.cache
def imports(path):
  """Pairs of a dotted module and "top" or "function" of a file's imports."""
  tree = ast.parse(path.read_text("utf-8"))
  found = []

  def visit(node, where):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      where = "function"
    if isinstance(node, ast.Import):
      found.extend((alias.name, where) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import"
      found.extend((f"{node.module}:{a.name}", where) for a in node.names)
    for child in ast.iter_child_nodes(node):
      visit(child, where)

  visit(tree, "top")
  return found


@functools.cache
def ours(path):
  """Modules of the package that a file imports, without "dpo_jax."."""
  found = set()
  for name, _ in imports(path):
    module, _, attribute = name.partition(":")
    if module.split(".")[0] != "dpo_jax":
      continue
    short = module.removeprefix("dpo_jax").removeprefix(".")
    if attribute:
      short = f"{short}.{attribute}".removeprefix(".")
      assert short in FILES, f"{path} imports a name, not a module: {name}"
    found.add(short or FACADE)
  return found


def test_every_module_is_in_a_folder():
  assert {folder(module) for module in FILES} == {FACADE, *FOLDERS}
  loose = {path.stem for path in PACKAGE.glob("*.py")}
  assert loose == {"__init__", "__main__", "replicate"}


def test_folders_import_only_from_those_below():
  levels = {name: level for level, name in enumerate(FOLDERS)}
  for module in FILES.keys() - {FACADE}:
    own = folder(module)
    for other in {folder(name) for name in ours(FILES[module])} - {own}:
      assert other != FACADE, f"{module} imports the facade"
      assert levels[other] < levels[own], f"{module} imports {other}"
      assert own not in PURE or other == "core", f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
  above = {module: ours(path) for module, path in FILES.items()}
  done = set()

  def visit(module, path):
    assert module not in path, " -> ".join([*path, module])
    if module not in done:
      for other in above[module]:
        visit(other, [*path, module])
      done.add(module)

  for module in FILES:
    visit(module, [])


@pytest.mark.parametrize("name", [FACADE, *FOLDERS])
def test_libraries_stay_where_they_belong(name):
  own = set(LIBRARIES.get(name, "").split())
  used = set()
  for module in (module for module in FILES if folder(module) == name):
    for imported, where in imports(FILES[module]):
      library = imported.split(":")[0].split(".")[0]
      assert library not in NEVER, f"{module} imports {library}"
      assert library in own | COMMON | sys.stdlib_module_names, (
        f"{module} imports {library}, which is not in this test's table"
      )
      if library in own - EAGER:
        assert where == "function", f"{module} imports {library} at its top"
      used.add(library)
  assert own <= used


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_are_thin(script):
  path = SCRIPTS[script]
  assert len(path.read_text("utf-8").splitlines()) <= 40
  libraries = {name.split(":")[0].split(".")[0] for name, _ in imports(path)}
  assert libraries <= {"dpo_jax"} | sys.stdlib_module_names
  assert ours(path) <= set(FILES)


def test_configs_are_only_values():
  for path in (ROOT / "configs").glob("*.py"):
    libraries = {name.split(":")[0].split(".")[0] for name, _ in imports(path)}
    assert libraries <= {"configs", "ml_collections"}, path.name
