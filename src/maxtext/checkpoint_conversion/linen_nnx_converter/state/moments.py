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

"""Checks that an optimizer's state follows the weights, so that it can be arranged as they are."""

from collections.abc import Mapping

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles as roles_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import optimizer_tree

Path = abstract_state.Path
Variable = roles_lib.Variable


def check(roles: roles_lib.Roles, leaves: Mapping[Path, abstract_state.Leaf], layout: layouts.StateLayout):
  """Checks the optimizer's state, which does not matter with `--params_only`.

  Raises:
    LayoutError: its leaves are only partly boxed.
    MomentError: a params-like subtree has a leaf without a weight, lacks one, or has one of another shape.
  """
  refuse_known = lambda path: _refuse_known(path, leaves, layout)
  if layout.framework == "nnx" and layout.opt_state is not None:
    _check_boxes(leaves, layout.opt_state[:1], refuse_known)
  variables = {path: role for path, role in roles.by_path.items() if isinstance(role, Variable)}
  weights = {role: leaves[path] for path, role in variables.items() if role.subtree is None}
  moments = {path: role for path, role in variables.items() if role.subtree is not None}
  others = {path: role.path for path, role in roles.by_path.items() if isinstance(role, roles_lib.OptimizerLeaf)}
  for path, role in moments.items():
    _check_shape(path, role.path, leaves[path], weights.get(role._replace(subtree=None)), refuse_known)
  subtrees = {role.subtree for role in moments.values()}
  roots = {roles_lib.PARAMS} | {role.path[0] for role in weights if len(role.path) > 1}
  for path, opt_path in others.items():
    _check_other(path, opt_path, subtrees, roots, refuse_known)
  _check_coverage(roles, layout)


def _check_boxes(leaves, prefix, refuse_known):
  """The optimizer's leaves are all boxed or all plain; sm3's box holds a list."""
  boxed, plain = layouts.boxed_and_plain(leaves, prefix)
  if boxed and plain:
    refuse_known(plain[0])
  layouts.refuse_mixture(boxed, plain)


def _check_shape(path, weight_path, leaf, weight, refuse_known):
  """A moment has the shape of its weight."""
  if not abstract_state.is_array(leaf) or not abstract_state.is_array(weight):
    return
  if tuple(weight.shape) != tuple(leaf.shape):
    refuse_known(path)
    raise errors.MomentError(
        path,
        f"the shape of its weight {'/'.join(weight_path)}, {tuple(weight.shape)}",
        f"{tuple(leaf.shape)}",
        "The checkpoint is damaged, or its optimizer is of an unknown kind: take the weights with --params_only.",
    )


def _check_other(path, opt_path, subtrees, roots, refuse_known):
  """A leaf of no weight is in no params-like subtree, and does not look like one of its own."""
  subtree = next((opt_path[:i] for i in range(1, len(opt_path)) if opt_path[:i] in subtrees), None)
  found = roots & set(opt_path[:-1])
  if subtree is None and not found:
    return
  refuse_known(path)
  if subtree is not None:
    raise errors.MomentError(
        path,
        f"the path of a weight below {'/'.join(subtree)}",
        "a leaf that no weight has",
        "The checkpoint is damaged, or its optimizer belongs to another model.",
    )
  raise errors.MomentError(
      path,
      "below a params-like optimizer subtree, the paths of weights",
      f"{min(found)}/… matching no weight",
      "The checkpoint is damaged, or its optimizer is of an unknown kind: take the weights with --params_only.",
  )


def _check_coverage(roles, layout):
  """A params-like subtree that is not masked has a moment for every weight."""
  of_params = [role for role in roles.by_path.values() if getattr(role, "collection", None) == roles_lib.PARAMS]
  weights = {role.path for role in of_params if role.subtree is None}
  moments = {}
  for role in of_params:
    if role.subtree is not None:
      moments.setdefault(role.subtree, set()).add(role.path)
  for node, paths in moments.items():
    if node not in roles.masked_subtrees and (missing := weights - paths):
      raise errors.MomentError(
          roles_lib.write(Variable(roles_lib.PARAMS, min(missing), node), layout),
          f"an optimizer leaf for the weight {'/'.join(min(missing))}",
          "none",
          "The checkpoint is damaged: the optimizer has lost it.",
      )


def _refuse_known(path, leaves, layout):
  """Refuses by name the optimizers that are known not to follow the weights."""
  if not layouts.below(path, layout.opt_state):
    return
  end = -1 if layout.boxed_optimizer else None
  opt_path = lambda leaf_path: leaf_path[len(layout.opt_state) : end]
  opt_leaves = {opt_path(other): leaf for other, leaf in leaves.items() if layouts.below(other, layout.opt_state)}
  if name := optimizer_tree.without_weights_shapes(opt_path(path), opt_leaves):
    raise errors.MomentError(
        path,
        "optimizer state in the shapes of the weights, as all of MaxText's optimizers have it",
        f"that of {name}",
        "Take the weights alone with --params_only.",
    )
