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

"""What the tests of the converter share: fixtures, tiny trees, and equality to the bit."""

import dataclasses
import os
import pathlib
import shutil
import tempfile

from absl.testing import parameterized
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import options
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import by_reference
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner

ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "assets" / "linen_nnx_converter"

# Checkpoints that MaxText's own trainers wrote; FIXTURES/README.md says how.
LINEN = ("maxtext-0.2.4/linen_scan", "maxtext-main-2026-05-14/linen_scan", "maxtext-main-2026-05-14/linen_unscan")
LINEN_LAYOUT_OF_NNX = ("maxtext-0.2.3/nnx_unscan", "maxtext-0.2.4/nnx_scan", "maxtext-0.2.5/nnx_scan")
NNX = ("maxtext-main-2026-05-14/nnx_scan", "maxtext-main-2026-05-14/nnx_unscan")
ALL = LINEN + LINEN_LAYOUT_OF_NNX + NNX


def bits(leaf):
  """A leaf as type, shape, dtype and bytes, so that NaNs and signed zeros count; other leaves as they are."""
  if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
    array = np.asarray(leaf)
    return array.shape, str(array.dtype), array.tobytes()
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.shape, str(leaf.dtype)
  return leaf


def flat(tree, prefix=()):
  """A tree of dicts and lists as `a/b/0: leaf`; empty nodes are leaves."""
  if isinstance(tree, (dict, list)) and tree:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, child in items for path, leaf in flat(child, (*prefix, str(key))).items()}
  return {"/".join(prefix): bits(tree)}


def snapshot(folder):
  """Every file below `folder`, with its content and its time of modification."""
  return {
      str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
      for path in sorted(pathlib.Path(folder).rglob("*"))
      if path.is_file()
  }


def files(folder):
  """The names of everything below `folder`."""
  return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))


def array(*shape, dtype=np.float32, start=0):
  """An array whose elements all differ, as far as the dtype can tell."""
  return (start + np.arange(np.prod(shape, dtype=int)).reshape(shape)).astype(dtype)


def flipped(array, index, bit=0):
  """A copy of an array with one bit of one element flipped."""
  array = np.array(array)
  raw = array.view(f"u{array.dtype.itemsize}")
  raw[index] ^= np.array(1 << bit, raw.dtype)
  return array


def layer(seed):
  """One layer's weights."""
  return {
      "mlp": {"wi_0": {"kernel": array(3, 5, start=100 * seed)}, "wi_0_scale": array(3, start=100 * seed)},
      "norm": {"scale": array(4, start=-100 * seed)},
      "gain": np.array(seed, np.float32),
  }


def linen(params, count=7, step=11, **other):
  """A Linen train state with adamw, of the params collection `params`."""
  moments = lambda sign: {"params": jax.tree.map(lambda leaf: np.asarray(sign * leaf, leaf.dtype), params)}
  return {
      "params": {"params": params},
      "opt_state": [
          {"count": np.array(count, np.int32), "mu": moments(2), "nu": moments(3)},
          None,
          {"count": np.array(count, np.int32)},
      ],
      "step": np.array(step, np.int32),
      **other,
  }


def unscanned_params(layers=3):
  return {
      "decoder": {
          **{f"layers_{i}": layer(i) for i in range(layers)},
          "decoder_norm": {"scale": array(4)},
      },
      "token_embedder": {"embedding": array(7, 4)},
  }


def stack(sources, axes, sizes):
  """The move of whole leaves that are stacked."""
  return leaf_moves.Move(tuple((source, ()) for source in sources), stacked=axes, sizes=sizes)


def slice_of(source, axes, index):
  """The move of a leaf at one index of some axes."""
  return leaf_moves.Move(((source, index),), taken=axes)


def plan_conversion(state, *, empty_nodes=None, **keywords):
  """The planner's plan, its options and its run given as keywords."""
  names = {field.name for field in dataclasses.fields(planner.Run)}
  run = planner.Run(**{name: value for name, value in keywords.items() if name in names})
  chosen = options.PlanOptions.of(**{name: value for name, value in keywords.items() if name not in names})
  return planner.plan_conversion(state, chosen, run, empty_nodes)


class CheckpointTestCase(parameterized.TestCase):
  """Has a folder of its own, `tmp`."""

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp()).resolve()
    self.addCleanup(shutil.rmtree, self.tmp)

  def save(self, name, tree, **options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
      checkpointer.save(self.tmp / name, args=ocp.args.PyTreeSave(tree))
    return self.tmp / name

  def assert_nothing_left(self, *names):
    self.assertCountEqual(os.listdir(self.tmp), names)


def own_bytes(folder):
  """The bytes of the files that only this folder has."""
  return sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def all_bytes(folder):
  return sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*") if p.is_file())


def in_one_file(folder):
  """Writes a store anew, all values into one data file; TensorStore begins new ones as time goes by."""
  spec = {"driver": "ocdbt", "base": f"file://{folder}/"}
  old = ts.KvStore.open(spec).result()
  values = {key: old.read(key).result().value for key in old.list().result()}
  for name in ("d", "ocdbt.process_0"):
    shutil.rmtree(folder / name)
  (folder / "manifest.ocdbt").unlink()
  new = ts.KvStore.open(spec, context=ts.Context()).result()
  with ts.Transaction(atomic=True) as transaction:
    for key, value in values.items():
      new.with_transaction(transaction)[key] = value


async def swapped(source, target, ranges, documents, rename=by_reference.rename):
  """Renames each range to the name of the next one."""
  ranges = list(ranges)
  names = {new: other for (_, new, _), (_, other, _) in zip(ranges, ranges[1:] + ranges[:1])}
  await rename(source, target, [(old, names[new], is_prefix) for old, new, is_prefix in ranges], documents)
