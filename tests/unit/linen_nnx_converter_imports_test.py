# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What may import what: the order of the rooms, and what each of them may know."""

import ast

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util

CONVERTER = "maxtext.checkpoint_conversion.linen_nnx_converter"
ROOT = util.ROOT / "src" / "maxtext" / "checkpoint_conversion" / "linen_nnx_converter"
# Each imports those before it alone; modules of one room may import each other.
ORDER = (
    "errors",
    "folding",
    "memory",
    "options",
    "state",
    "layers",
    "planning",
    "storage",
    "maxtext_model",
    "progress",
    "copying",
    "verification",
    "record",
    "conversion",
    "api",
    "command",
    "__main__",
)
IO = ("os", "io", "pathlib", "shutil", "asyncio", "tensorstore", "orbax", "etils")
KNOW_NO_IO = ("errors", "folding", "options", "state", "layers", "planning")


def imported(path) -> list[tuple[str, str]]:
  """The modules that a file imports, as (module, name)."""
  nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
  pairs = [(node, alias.name) for node in nodes for alias in node.names]
  return [(node.module or "", name) if isinstance(node, ast.ImportFrom) else (name, "") for node, name in pairs]


def room(path) -> str:
  """The room, or the module at the top, that a file is of."""
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts != ("__init__.py",))


class ImportsTest(parameterized.TestCase):

  def test_every_file_is_of_a_room(self):
    self.assertEqual({room(path) for path in FILES}, set(ORDER))

  @parameterized.parameters(*FILES)
  def test_rooms_import_those_before_them(self, path):
    for module, name in imported(path):
      if module.startswith(CONVERTER) and name != "__version__":
        inside = f"{module}.{name}".removeprefix(f"{CONVERTER}.").split(".")[0]
        self.assertLessEqual(ORDER.index(inside), ORDER.index(room(path)), f"{path.name} imports {module} {name}")

  @parameterized.parameters(*(path for path in FILES if room(path) in KNOW_NO_IO))
  def test_planning_knows_no_io(self, path):
    for module, _ in imported(path):
      self.assertNotIn(module.split(".")[0], IO)
    self.assertNotIn("open(", path.read_text())

  @parameterized.parameters(*FILES)
  def test_only_maxtext_model_imports_maxtext(self, path):
    ours = ("maxtext.checkpoint_conversion.linen_nnx_converter", "maxtext.checkpoint_conversion.linen_nnx_comparator")
    found = [module for module, _ in imported(path) if module.split(".")[0] == "maxtext" and not module.startswith(ours)]
    if room(path) != "maxtext_model":
      self.assertEmpty(found)

  @parameterized.parameters(*FILES)
  def test_only_storage_knows_what_is_private_to_orbax(self, path):
    if room(path) != "storage":
      self.assertEmpty([module for module, _ in imported(path) if module.startswith("orbax.checkpoint._src")])

  def test_what_verifies_opens_by_itself(self):
    """A fault of the reader, or of the writer, cannot verify itself."""
    shared = {"reader", "ocdbt_index", "leaf_metadata", "orbax_writer", "target_leaf", "write_specs"}
    for name in ("decoded", "encoded", "reopen", "while_written"):
      path = ROOT / "verification" / f"{name}.py"
      self.assertEmpty([name for module, name in imported(path) if module == f"{CONVERTER}.storage" and name in shared])

  def test_few_files_stand_at_the_top(self):
    self.assertLessEqual(len(list(ROOT.glob("*.py"))), 12)


if __name__ == "__main__":
  absltest.main()
