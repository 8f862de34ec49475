# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#    https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The tables of flags in `docs/` are what the commands' own flags say.

`python tests/unit/linen_nnx_converter_flags_test.py --write` writes them anew.
"""

import re
import sys

from absl import flags
from absl.testing import absltest
import linen_nnx_converter_util as util

from maxtext.checkpoint_conversion.linen_nnx_comparator import __main__ as comparator
from maxtext.checkpoint_conversion.linen_nnx_converter.command import flags as converter
from maxtext.checkpoint_conversion.linen_nnx_inspector import __main__ as inspector

PAGES = {"usage.md": converter, "comparator.md": comparator, "inspector.md": inspector}
TABLE = re.compile(r"(?<=<!-- flags -->\n).*?(?=<!-- /flags -->)", re.S)


def row(flag: flags.Flag) -> str:
  """A flag's line: its name and default, its values where these are few, and what it means."""
  default = flag.default if flag.default is not False else None
  words = getattr(flag.parser, "enum_values", None) or ()
  text = flag.help.removeprefix(f"<{'|'.join(words)}>: ")
  text = re.sub(r"--\w+(?:=\w+)?|\S*<[^\s,.;)]*", r"`\g<0>`", text)
  shown = "" if default is None else f" ({str(default).lower().replace('true', 'yes')})"
  return f"| `--{flag.name}`{shown} | {', '.join(f'`{word}`' for word in words)}{'. ' if words else ''}{text} |\n"


def table(command) -> str:
  """The table of a command's flags, in the order in which they are defined."""
  values = command.define_flags()
  names = [name for names in values.flags_by_module_dict().values() for name in names]
  rows = (row(flag) for flag in names if flag.name != "help")
  return "| Flag | Meaning |\n|---|---|\n" + "".join(rows)


class FlagsTest(absltest.TestCase):

  def test_the_tables_in_the_docs(self):
    for name, command in PAGES.items():
      (found,) = TABLE.findall((util.ROOT / "docs" / name).read_text())
      self.assertMultiLineEqual(found, table(command), "write it anew, as this file's docstring says")


if __name__ == "__main__":
  if sys.argv[1:] == ["--write"]:
    for path in map((util.ROOT / "docs").joinpath, PAGES):
      path.write_text(TABLE.sub(lambda _, of=PAGES[path.name]: table(of), path.read_text()))
  else:
    absltest.main()
