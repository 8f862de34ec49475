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

"""Train states with one node damaged: refused with a path of the tree, or wholly accounted for."""

from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import event
from hypothesis import given
from hypothesis import strategies as st
from linen_nnx_converter_random_states import examples
from linen_nnx_converter_random_states import fuzz
from linen_nnx_converter_random_states import there
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import in_memory
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


def nodes(tree, prefix=()):
  """The paths of all nodes below the root, leaves among them."""
  if isinstance(tree, (dict, list)):
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
      yield (*prefix, key)
      yield from nodes(child, (*prefix, key))


def parent(tree, path):
  for key in path[:-1]:
    tree = tree[key]
  return tree


def copied(tree):
  """A copy whose leaves are the same."""
  if isinstance(tree, dict):
    return {key: copied(child) for key, child in tree.items()}
  return [copied(child) for child in tree] if isinstance(tree, list) else tree


DAMAGES = ("drop", "rename", "reshape", "retype", "duplicate", "regroup", "wrap", "unwrap", "empty", "index")


def damage(tree, kind, path, other):
  """Damages a tree in place, at `path`. False if this damage is none there."""
  above, key = parent(tree, path), path[-1]
  node = above[key]
  is_leaf = not isinstance(node, (dict, list))
  if kind == "drop":
    del above[key]
  elif kind == "rename" and isinstance(above, dict):
    above[f"{key}_renamed"] = above.pop(key)
  elif kind == "reshape" and is_leaf and hasattr(node, "shape"):
    above[key] = np.stack([node, node])
  elif kind == "retype" and is_leaf and hasattr(node, "shape"):
    above[key] = np.zeros(node.shape, np.uint16)
  elif kind == "duplicate" and isinstance(above, dict):
    above[f"{key}_2"] = copied(node)
  elif kind == "regroup" and isinstance(parent(tree, other), dict) and other[: len(path)] != path:
    parent(tree, other)[key] = above.pop(key) if isinstance(above, dict) else node
  elif kind == "wrap":
    above[key] = {"value": node}
  elif kind == "unwrap" and isinstance(node, dict) and isinstance(above, dict):
    above.update(above.pop(key))
  elif kind == "empty":
    above[key] = {}
  elif kind == "index" and isinstance(above, dict):
    above["7"] = above.pop(key)
  else:
    return False
  return True


class DamageTest(parameterized.TestCase):

  @fuzz
  @given(examples(), st.data())
  def test_a_damaged_state_is_refused_or_wholly_accounted_for(self, example, data):
    """Never another exception, and never a leaf that is gone: what was made of it leads back to all of it."""
    is_nnx = data.draw(st.booleans())
    state = copied(there(example) if is_nnx else example.state)
    paths = sorted(nodes(state), key=str)
    kind = data.draw(st.sampled_from(DAMAGES))
    path, other = data.draw(st.sampled_from(paths)), data.draw(st.sampled_from(paths))
    if not damage(state, kind, path, other):
      event("no damage")
      return
    event(f"damage: {kind}")
    options = {"param_scan_axis": example.axis, "scan_layers": data.draw(st.sampled_from((None, True, False)))}
    try:
      source = abstract_state.flatten(state)
      plan = util.plan_conversion(abstract_state.abstract(source), **options)
      target = in_memory.apply(plan, source.leaves)
    except errors.ConversionError as e:
      event("refused")
      self.assertLen(str(e).splitlines(), 1)
      self.assert_names_what_is_wrong(e, state)
      return
    event("converted")
    self.assertEmpty(plan.dropped)
    inverse = plan.inverse()
    again = in_memory.apply(inverse, target)
    leaves = {path: leaf for path, leaf in source.leaves.items() if not abstract_state.is_empty(leaf)}
    self.assertEqual({p: util.bits(again.get(p)) for p in leaves}, {p: util.bits(leaf) for p, leaf in leaves.items()})

  def assert_names_what_is_wrong(self, error, state):
    """The path that the message names stands in the tree, or beside what stands there, or is where that would land."""
    known = {"/".join(map(str, path)) for path in nodes(state)} | {"", "top level"}
    is_known = bool({error.path, error.path.rpartition("/")[0], error.path.split("/")[0]} & known)
    self.assertTrue(is_known or any(path.endswith(error.path) for path in known), error)


if __name__ == "__main__":
  absltest.main()
