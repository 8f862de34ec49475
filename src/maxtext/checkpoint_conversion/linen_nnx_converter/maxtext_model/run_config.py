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

"""What a MaxText config says. Imports MaxText, but only when a config is given."""

from collections.abc import Sequence
import dataclasses
import functools
import inspect
import os
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import pipelines
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases


def load(arguments: Sequence[str]) -> Any:
  """Reads a config as MaxText's own commands do: `base.yml model_name=… scan_layers=…`.

  Args:
    arguments: a config's path, or its name in MaxText's configs folder, and settings that override it.

  Raises:
    ConfigError: MaxText cannot read it.
  """
  for number, argument in enumerate(arguments):
    if "=" not in argument and (number or not (argument.endswith((".yml", ".yaml")) or os.path.isfile(argument))):
      expected = "a config, such as base.yml, or a setting of it, such as scan_layers=False"
      raise errors.ConfigError(argument, expected, "neither", "--help shows how to give paths.")
  # pylint: disable=import-outside-toplevel
  try:
    from maxtext.configs import pyconfig
    from maxtext.utils import globals as maxtext_globals

    name, *overrides = arguments
    packaged = os.path.join(maxtext_globals.MAXTEXT_CONFIGS_DIR, name)
    path = name if os.path.exists(name) or not os.path.exists(packaged) else packaged
    return pyconfig.initialize(["linen_nnx_converter", path, *overrides])
  except Exception as e:  # Of a config, or of a MaxText without its dependencies.  pylint: disable=broad-except
    raise errors.ConfigError(
        " ".join(arguments),
        "a config that the installed MaxText can read",
        errors.named(e, 500),
        "Run in MaxText's environment, and check the config and its settings.",
    ) from e


def check(config: Any):
  """Checks that a config is one of MaxText's, or None.

  Raises:
    ConfigError: it is not.
  """
  if config is not None and not hasattr(config, "param_scan_axis"):
    raise errors.ConfigError(
        "config", "what MaxText's pyconfig.initialize returns", errors.shown(config), "Give that, or None."
    )


def version() -> releases.Version:
  """The version of the installed MaxText."""
  import maxtext  # pylint: disable=import-outside-toplevel

  return releases.parse(maxtext.__version__)


def trainer(config: Any, release: releases.Version) -> str:
  """Which trainer the config runs in a release that may have both."""
  if release > releases.LINEN_UNTIL:
    return "nnx"
  return "nnx" if getattr(config, "pure_nnx", False) else "linen"


def decoder(config: Any) -> decoder_families.Decoder:
  """The decoder's layers, as the config has them."""
  block = config.decoder_block
  return decoder_families.Decoder(
      getattr(block, "value", block),
      config.num_decoder_layers,
      getattr(config, "first_num_dense_layers", 0),
      getattr(config, "first_num_hash_layers", 0),
      getattr(config, "inhomogeneous_layer_cycle_interval", 1),
      config.model_name,
      engram_layers=tuple(getattr(config, "engram_layers", None) or ()),
      pipeline=_pipeline(config),
  )


def _pipeline(config) -> pipelines.Pipeline | None:
  """The config's pipeline, with the numbers that MaxText has worked out."""
  if not getattr(config, "using_pipeline_parallelism", False):
    return None
  return pipelines.Pipeline(
      int(config.ici_pipeline_parallelism * config.dcn_pipeline_parallelism),
      config.num_pipeline_repeats,
      config.num_layers_per_pipeline_stage,
      bool(config.scan_layers_per_stage),
  )


def adamw_mask(config: Any) -> bool:
  """Whether its optimizer is adamw with a mask of the weight decay."""
  return getattr(config, "opt_type", "") == "adamw" and bool(getattr(config, "adamw_mask", None))


def run(config: Any, maxtext_release: str | None) -> planner.Run:
  """The run of a config, in this or else the installed release."""
  release = releases.parse(maxtext_release) if maxtext_release else version()
  has_clip = getattr(config, "gradient_clipping_threshold", 0) > 0
  return planner.Run(release, trainer(config, release), decoder(config), adamw_mask(config), has_clip)


def _check_tunix(config):
  """Checks that Tunix would resume a plain optimizer with this config."""
  if getattr(config, "teacher_overrides", None):
    raise errors.ConfigError(
        "teacher_overrides",
        "none, for --target_layout=tunix",
        "MaxText's distillation, which resumes steps of its own alone",
        "Start it from the weights: leave out --target_layout, and name the target in student_overrides.",
    )
  micro_batches = getattr(config, "gradient_accumulation_steps", 1)
  if micro_batches > 1:
    raise errors.ConfigError(
        "gradient_accumulation_steps",
        "1, for --target_layout=tunix",
        f"{micro_batches}, with which Tunix's optimizer keeps gradients too, of which MaxText has none",
        "Resume with gradient_accumulation_steps=1.",
    )


def with_config(options: options_lib.Options, config: Any) -> options_lib.Options:
  """The options, completed by what the config says.

  Of `checkpoint_storage_*`, only formats that the config turns off count, because MaxText reads any and has them all on
  by default. Its size of data files is for saving; giving linked files another size would mean copying them.

  Raises:
    ConfigError: an option contradicts the config.
  """
  if options.target_layout == "tunix":
    _check_tunix(config)
  wanted = {name: getattr(config, name) for name in ("scan_layers", "param_scan_axis")}
  if options.lora_restore_path and (alpha := getattr(getattr(config, "lora", None), "lora_alpha", None)):
    wanted["lora_alpha"] = alpha
  for name, value in wanted.items():
    if getattr(options, name) not in (None, value):
      raise errors.ConfigError(
          f"--{name}={getattr(options, name)}",
          f"{name}={value}, as the config says",
          f"{getattr(options, name)}",
          "Give it once, to the config.",
      )
  off = [name for name in ("use_ocdbt", "use_zarr3") if not getattr(config, f"checkpoint_storage_{name}", True)]
  formats: dict[str, Any] = {name: False for name in off if getattr(options, name) is None}
  return dataclasses.replace(options, **wanted, **formats)


def source_path(config: Any) -> str | None:
  """The checkpoint that a run with this config would load."""
  return config.load_full_state_path or config.load_parameters_path or None


def target_path(config: Any) -> str | None:
  """The checkpoints folder that a run with this config resumes from."""
  if not config.base_output_directory or not config.run_name:
    return None
  return os.path.join(config.base_output_directory, config.run_name, "checkpoints")


def saved_state(config: Any, trainer_name: str) -> abstract_state.AbstractState:
  """The abstract state of what the installed MaxText's trainer saves, by tracing: no weight is made.

  Args:
    config: the config, including its optimizer.
    trainer_name: `linen` or `nnx`.

  Raises:
    ConfigError: MaxText cannot trace the model.
  """
  try:
    tree = _linen_tree(config) if trainer_name == "linen" else saved_by_nnx(nnx_state(config))
  except Exception as e:  # Whatever a model raises while it is traced.  pylint: disable=broad-except
    raise _untraceable(config, e, "Check the config, or pass --nocheck_model.") from e
  return abstract_state.abstract(abstract_state.flatten(tree))


# pylint: disable=import-outside-toplevel
def rng_state(config: Any, prng_impl: str) -> dict[abstract_state.Path, Any]:
  """The RNG state of a new NNX model of the config and its seed, by path inside the model.

  No weight is made: the whole model is traced, but what its RNG state does not need is never compiled.

  Args:
    config: the config.
    prng_impl: JAX's name of the trainer's generator.

  Raises:
    ConfigError: MaxText cannot make the model.
  """
  try:
    return _rng_state(config, prng_impl)
  except Exception as e:  # Whatever a model raises while it is traced.  pylint: disable=broad-except
    raise _untraceable(config, e, "Check the config, or leave out --init_rngs.") from e


def _rng_state(config, prng_impl) -> dict[abstract_state.Path, Any]:
  # pylint: disable=import-outside-toplevel
  from flax import nnx
  import jax

  from maxtext.utils import model_creation_utils

  mesh = device_mesh(config)
  create_model = model_creation_utils.get_nnx_create_model_fn(config, mesh)
  with jax.default_prng_impl(prng_impl), mesh, nnx.logical_axis_rules(config.logical_axis_rules):
    state = jax.jit(lambda: nnx.state(create_model(), nnx.RngState))()
  return dict(abstract_state.flatten(state.to_pure_dict()).leaves)


def _untraceable(config, e, remedy) -> errors.ConfigError:
  return errors.ConfigError(
      f"model_name={config.model_name}",
      "a model that the installed MaxText can trace",
      errors.named(e, 500),
      remedy,
  )


def _optimizer(config, model, mesh):
  """The trainer's optax transformation, whose arguments differ from release to release."""
  from maxtext.utils import train_utils

  make = train_utils.create_training_optimizer
  return make(config, model, **({"mesh": mesh} if "mesh" in inspect.signature(make).parameters else {}))[1]


def device_mesh(config: Any) -> Any:
  """The mesh of the local devices, as the config lays them out."""
  import jax

  from maxtext.utils import maxtext_utils

  return jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)


def _linen_tree(config) -> dict[str, Any]:
  from flax.core import meta
  import jax

  from maxtext.utils import maxtext_utils
  from maxtext.utils import model_creation_utils

  mesh = device_mesh(config)
  model = model_creation_utils.from_config(config, mesh=mesh)
  tx = _optimizer(config, model, mesh)
  init = functools.partial(maxtext_utils.init_initial_state, model, tx, config, True, jax.random.PRNGKey(0))
  with mesh:
    state = meta.unbox(jax.eval_shape(init))
  return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def saved_by_nnx(state: Any) -> dict[str, Any]:
  """What the installed MaxText's NNX trainer saves of its state; 0.2.3's leaves out RNG streams and the like."""
  from maxtext.common import train_state_nnx

  if hasattr(train_state_nnx, "to_checkpoint_dict"):
    return train_state_nnx.to_checkpoint_dict(state)
  return train_state_nnx.to_linen_checkpoint_dict(state.to_pure_dict())


def nnx_state(config: Any) -> Any:
  """The abstract `nnx.State` of the installed MaxText's `TrainStateNNX`; the model is traced once."""
  from flax import nnx

  from maxtext.common import train_state_nnx
  from maxtext.utils import model_creation_utils

  mesh = device_mesh(config)
  _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
  tx = _optimizer(config, model, mesh)
  train_state = lambda model: train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))
  with mesh, nnx.logical_axis_rules(config.logical_axis_rules):
    return nnx.state(nnx.eval_shape(train_state, model))
