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

"""The abstract state of a checkpoint: its leaves by path, without their bytes.

A leaf path is a tuple of strings, the names that Orbax gives to the keys of a pytree: a list's third entry and a
dict's key `2` are both `"2"`. What tells them apart is `AbstractState.lists`.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import gc
from typing import Any

import jax
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

Path = tuple[str, ...]

# The dtypes that can be cast into each other on request.
FLOATS = frozenset({"bfloat16", "float16", "float32"})
_MOST_LEVELS = 100  # Deeper trees exhaust the stacks of Python, Orbax and JAX. MaxText's have up to 15.

# A `jax.ShapeDtypeStruct`; a Python scalar or string, as it is; or an empty node: None, {}, [] or ().
Leaf = Any


@dataclasses.dataclass(frozen=True)
class AbstractState:
  """A pytree as a flat mapping.

  Attributes:
    leaves: every leaf by its path. Empty nodes count as leaves: an optax `EmptyState` or `MaskedNode` is None, as
      Orbax writes it.
    lists: the paths of the nodes that are lists; every other inner node is a dict.
  """

  leaves: Mapping[Path, Leaf]
  lists: frozenset[Path] = frozenset()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
  """Pauses garbage collection, which takes half of the time while many objects are made that all stay alive."""
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


def inner_nodes(paths: Iterable[Path]) -> set[Path]:
  """The paths of all nodes above these leaves, including the root's."""
  inner = set()
  for path in paths:
    while path and (path := path[:-1]) not in inner:
      inner.add(path)
  return inner


def is_empty(leaf: Any) -> bool:
  """Whether `leaf` is a node without children: None, {}, [], () or a named tuple without fields."""
  return leaf is None or (isinstance(leaf, (dict, list, tuple)) and not leaf)


def is_array(leaf: Any) -> bool:
  """Whether `leaf` has a shape and a dtype, whatever kind of array it is."""
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def checked_cast(path: Path, value: Any, dtype: np.dtype) -> Any:
  """Casts the step, or floats among `FLOATS`: to nearest, ties to even. NaNs stay NaNs and keep their sign.

  Raises:
    StepError: `dtype` cannot hold the step.
    OptionError: a finite number would become infinite.
  """
  if str(dtype) in FLOATS:
    return _cast_floats(path, value, dtype)
  limits = np.iinfo(dtype)
  if not limits.min <= int(value) <= limits.max:
    raise errors.StepError(
        path,
        f"a step from {limits.min} to {limits.max}, the range of {np.dtype(dtype)}",
        f"{int(value)}",
        "The checkpoint is damaged, or its step is of an unknown kind.",
    )
  return value.astype(dtype)


def _cast_floats(path, value, dtype):
  """Casts with NumPy, because XLA on a CPU flushes the smallest numbers to zero."""
  array = np.asarray(value)
  with np.errstate(over="ignore", invalid="ignore"):  # Overflow is reported below.
    cast = array.astype(dtype)
  if (lost := np.isinf(cast) & np.isfinite(array)).any():
    raise errors.OptionError(
        path,
        f"numbers that {dtype} can hold, of at most {float(jax.numpy.finfo(dtype).max):.4g}",
        f"{array[lost].ravel()[0]}",
        "Cast to another dtype.",
    )
  return jax.device_put(cast, value.sharding) if isinstance(value, jax.Array) else cast


def flatten(tree: Any) -> AbstractState:
  """Flattens any pytree, such as a Flax `TrainState` or an `nnx.State`, keeping its leaves as they are.

  Raises:
    PathCollisionError: two keys have the same name, for example `0` and `"0"`.
    LayoutError: the tree is too deep, or keys of a dict cannot be sorted.
  """
  leaves, lists = {}, set()
  for keypath, leaf in _with_paths(tree):
    path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keypath)
    if path in leaves:
      raise errors.PathCollisionError(path, "one leaf of this path", "two", "Rename one of the keys in the source.")
    leaves[path] = _empty_node(leaf) if is_empty(leaf) else leaf
    lists.update(path[:i] for i, key in enumerate(keypath) if isinstance(key, jax.tree_util.SequenceKey))
  return AbstractState(leaves, frozenset(lists))


def abstract(state: AbstractState) -> AbstractState:
  """The same state with every array replaced by its `jax.ShapeDtypeStruct`."""
  structs = {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf
      for path, leaf in state.leaves.items()
  }
  return dataclasses.replace(state, leaves=structs)


def unflatten(state: AbstractState) -> Any:
  """The inverse of `flatten`: nested dicts and lists."""
  root = {}
  for path, leaf in state.leaves.items():
    node = root
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  for path in sorted(state.lists, key=len, reverse=True):
    parent = root
    for key in path[:-1]:
      parent = parent[key]
    children = parent[path[-1]]
    parent[path[-1]] = [children[str(i)] for i in range(len(children))]
  return root


def _with_paths(tree):
  """The leaves with their key paths; refuses a tree that is too deep for Python's stack."""
  _check_depth(tree)
  try:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)[0]
  except ValueError as e:  # JAX sorts the keys.
    raise errors.LayoutError(
        "top level",
        "keys of one kind in each dict",
        "some that cannot be sorted",
        "Give strings for keys, as in a checkpoint.",
    ) from e


def _check_depth(tree):
  """Refuses nesting that is too deep or circular, on which JAX's own check would overflow Python's stack."""
  nodes = [(tree, 0)]
  while nodes:
    node, depth = nodes.pop()
    if depth > _MOST_LEVELS:
      raise errors.LayoutError(
          "top level",
          f"a tree of at most {_MOST_LEVELS} levels",
          "a deeper one",
          "This is no train state: give the folder that holds one.",
      )
    if isinstance(node, (dict, list, tuple)):
      nodes += [(child, depth + 1) for child in (node.values() if isinstance(node, dict) else node)]


def _empty_node(leaf: Any) -> Any:
  return None if hasattr(leaf, "_fields") else leaf
