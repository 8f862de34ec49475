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

"""The text of a tree: a line for each leaf and each empty node."""

from typing import Any

import jax


def key_name(key) -> str:
  """The name Orbax gives to one step of a path, whatever container it goes into."""
  for attribute in ("key", "idx", "name"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def is_hole(node) -> bool:
  """True for what Orbax stores as an empty node: an optax EmptyState, a masked leaf, an empty dict or list."""
  return node is None or (isinstance(node, (tuple, list, dict)) and not node)


def flatten(tree) -> dict[tuple[str, ...], Any]:
  """Leaves and empty nodes of a nested tree, by path."""
  pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hole)
  return {tuple(key_name(k) for k in path): leaf for path, leaf in pairs}


def describe(leaf) -> str:
  """Shape and dtype of a leaf as it lies on disk: a typed PRNG key becomes its raw data."""
  if isinstance(leaf, dict):
    return "{}"
  if is_hole(leaf):
    return "None"
  if not hasattr(leaf, "shape"):
    leaf = jax.eval_shape(lambda: jax.numpy.asarray(leaf))
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return f"{tuple(leaf.shape)} {leaf.dtype}"


def variable_kinds(state) -> dict[tuple[str, ...], str]:
  """The Variable type of each leaf of an nnx.State, by the leaf's path."""
  from flax import nnx

  kinds = {}
  for path, variable in nnx.to_flat_state(state):
    prefix = tuple(str(part) for part in path)
    kinds[prefix] = "OptState" if prefix[0] == "optimizer" else type(variable).__name__
  return kinds


def kind_of(path: tuple[str, ...], kinds: dict[tuple[str, ...], str]) -> str:
  """The kind of a leaf: that of the longest known prefix of its path, else OptState."""
  if path[:2] == ("params", "params"):
    path = ("model", *path[2:])
  if path[:1] == ("nnx_aux",):
    path = path[1:]
  for end in range(len(path), 0, -1):
    if path[:end] in kinds:
      return kinds[path[:end]]
  return "OptState"


def lines_of_linen(tree) -> list[str]:
  """The text of a Linen state; the last column is the collection."""
  lines = []
  for path, leaf in flatten(tree).items():
    kind = path[1] if path[0] == "params" else "OptState"
    lines.append(line(path, leaf, kind))
  return sorted(lines)


def lines_of_nnx(tree, kinds) -> list[str]:
  """The text of a pure dict that came from an nnx.State."""
  return sorted(line(path, leaf, kind_of(path, kinds)) for path, leaf in flatten(tree).items())


def line(path, leaf, kind) -> str:
  """One line of a file."""
  text = f"{'/'.join(path)} {describe(leaf)}"
  return text if is_hole(leaf) else f"{text} {kind}"
