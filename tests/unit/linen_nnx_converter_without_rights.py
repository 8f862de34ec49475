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

"""Reads what the user may not read, in a process of its own, and prints as JSON what each attempt raises: `… FOLDER`.

FOLDER holds checkpoints `ocdbt`, `plain`, `steps` and `target`; the last is for verifying.
"""

import json
import os
import pathlib
import shutil
import sys

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter


def attempt(folder, name, task, pattern):
  """What is raised with a copy of a checkpoint of which one file or folder may not be read."""
  copied = folder / "copy"
  shutil.copytree(folder / name, copied)
  denied = max(copied.glob(pattern), key=lambda path: path.stat().st_size) if pattern else copied
  mode = denied.stat().st_mode
  denied.chmod(0)
  try:
    task(folder, copied)
    raised = ["nothing", ""]
  except Exception as e:  # It is printed.  pylint: disable=broad-except
    raised = [type(e).__name__, str(e)]
  denied.chmod(mode)
  shutil.rmtree(copied)
  return [name, pattern, *raised, str(denied), sorted(os.listdir(folder))]


def convert(folder, source):
  converter.convert_checkpoint(source, folder / "out", scan_layers=True)


def compare(folder, source):
  comparator.compare_checkpoints(folder / "ocdbt", source)


def verify(_, target):
  converter.verify_checkpoint(target)


def main(folder):
  """Tries every file and folder that matters."""
  ocdbt = ("", "_METADATA", "_sharding", "array_metadatas", "array_metadatas/*", "manifest.ocdbt", "d/*", "ocdbt.*")
  plain = ("_CHECKPOINT_METADATA", "params.*", "params.*/.zarray", "params.*/0*")
  data = "manifest.ocdbt", "ocdbt.*/d/*"
  attempts = [("ocdbt", convert, pattern) for pattern in ocdbt] + [("plain", convert, pattern) for pattern in plain]
  attempts += [("steps", convert, pattern) for pattern in ("", "5", "5/items")]
  attempts += [("ocdbt", compare, pattern) for pattern in data] + [("plain", compare, plain[-1])]
  attempts += [("target", verify, pattern) for pattern in (*data, "linen_nnx_converter_digests.json")]
  print(json.dumps([[task.__name__, *attempt(folder, name, task, pattern)] for name, task, pattern in attempts]))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
