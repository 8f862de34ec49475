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

"""Flips one random bit in a random chunk of a source, again and again, and counts how often a conversion finds it.

python tests/campaigns/linen_nnx_converter_bit_rot_campaign.py --runs=40 --seed=1
"""

import collections
import os
import pathlib
import random
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

_RUNS = flags.DEFINE_integer("runs", 40, "How many bits to flip for each line of the result.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 1, "Of the choice of bits.")

CONTENTS = {
    "random bits": lambda bits: bits.integers(0, 2**16, (256, 256), np.uint16).view(np.int16),
    "bfloat16 weights": lambda bits: bits.standard_normal((256, 256)).astype(jax.numpy.bfloat16.dtype),
}
MODES = {
    "by reference": {"scan_layers": True},
    "by reference, --verify=full": {"scan_layers": True, "verify": "full"},
    "streamed": {"scan_layers": False},
}


def main(argv):
  del argv
  logging.set_verbosity(logging.FATAL)
  chooser, found = random.Random(_SEED.value), collections.Counter()
  for content, make in CONTENTS.items():
    for use_zarr3 in (False, True):
      for mode, options in MODES.items():
        with tempfile.TemporaryDirectory() as folder:
          source = save(pathlib.Path(folder).resolve(), make, use_zarr3, is_scanned=mode == "streamed")
          for _ in range(_RUNS.value):
            found[finds_a_flipped_bit(source, chooser, options)] += 1
        label = f"{content}, {'zarr 3' if use_zarr3 else 'zarr 2'}, {mode}"
        print(f"{label}: found {found[True]} of {_RUNS.value} with seed {_SEED.value}", flush=True)
        found.clear()


def save(folder, make, use_zarr3, is_scanned):
  bits = np.random.default_rng(0)
  tree = {"params": {"params": {"decoder": {f"layers_{i}": {"w": make(bits)} for i in range(3)}}}}
  if is_scanned:
    tree = converter.convert_nnx_to_linen(converter.convert_linen_to_nnx(tree))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=use_zarr3)) as checkpointer:
    checkpointer.save(folder / "source", args=ocp.args.PyTreeSave(tree))
  return folder / "source"


def finds_a_flipped_bit(source, chooser, options) -> bool:
  """Whether a conversion is refused when one bit of a chunk is another one; the bit is put right afterwards."""
  chunks = [value for value in reader.Checkpoint(epath.Path(source)).index.values.values() if value.nbytes > 10_000]
  value = chooser.choice(chunks)
  place, bit = value.offset + chooser.randrange(value.nbytes), 1 << chooser.randrange(8)
  content = (source / value.file).read_bytes()
  with tempfile.TemporaryDirectory(dir=source.parent) as target:
    (source / value.file).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    try:
      converter.convert_checkpoint(source, pathlib.Path(target) / "target", **options)
      return False
    except errors.ConversionError:
      return True
    finally:
      (source / value.file).write_bytes(content)


if __name__ == "__main__":
  app.run(main)
