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

"""The goal of a conversion: what the target is to be, as options, run and the source's layout determine it."""

import dataclasses

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix_target

# Earlier releases hand wrapped Linen models to Tunix, and have no training engine.
_SINCE = {"tunix": (0, 2, 4), "training_engine": (0, 2, 5)}
_BOXES = {"plain": (False, False), "boxed": (True, False), "all_boxed": (True, True)}  # The model's, the optimizer's.


@dataclasses.dataclass(frozen=True)
class Run:
  """The run that will resume from the target, as far as it is known.

  Attributes:
    release: its MaxText release; with it, `auto` goes to what that release reads.
    trainer: which of the release's trainers, `linen` or `nnx`; None is the Linen trainer as long as there is one.
    decoder: the decoder of the model's config, which determines how its layers are scanned.
    adamw_mask: whether the optimizer is adamw with masked weight decay, which NNX does not show. The record of an earlier
      conversion takes precedence.
    clips_gradients: whether `gradient_clipping_threshold` is above 0, as in MaxText's own defaults.
  """

  release: releases.Version | None = None
  trainer: str | None = None
  decoder: decoder_families.Decoder | None = None
  adamw_mask: bool = False
  clips_gradients: bool = True


@dataclasses.dataclass(frozen=True)
class Goal:
  """What the target is to be.

  Attributes:
    layout: its state layout.
    scan_layers: whether its layers are scanned; None keeps what each stack of layers is.
    keeps_pipelines: whether a pipeline stays as it is unless a config says otherwise.
    layer_naming: how unscanned layers are named, `flat` or `nested`.
    param_scan_axis: the layer axis of scanned Params, in the source and in the target.
    keeps_form: whether what was not asked for stays as it is: within Linen, the form of a nested optimizer.
    release: the release whose form the target takes, or None.
    decoder: the decoder of the model's config, or None.
    schedule: how the decoder's layers are written, if its config says.
    params_only: whether to leave out all but the params collection.
    keeps_nnx_aux: whether NNX state that is not a Param is kept.
    weight_dtype: what the Params are cast to, or None.
    optimizer_dtype: what the optimizer's moments are cast to, or None.
    adamw_mask: as in `Run`.
    is_tunix: whether it is for Tunix's trainer or MaxText's training engine, whose states have one layout.
  """

  layout: layouts.StateLayout
  scan_layers: bool | None
  keeps_pipelines: bool
  layer_naming: str
  param_scan_axis: int
  keeps_form: bool
  release: releases.Version | None
  decoder: decoder_families.Decoder | None
  schedule: layer_stacks.Schedule | None
  params_only: bool
  keeps_nnx_aux: bool
  weight_dtype: str | None
  optimizer_dtype: str | None
  adamw_mask: bool
  is_tunix: bool


def set_goal(source: layouts.StateLayout, options: options_lib.PlanOptions, run: Run) -> Goal:
  """The goal of a conversion from a layout.

  Raises:
    DirectionError: the direction starts from another framework, or the release has no such trainer.
    LayoutError: the source is not a single train state, and more than its params is asked for; or source and target
      would both be Tunix's.
    OptionError: the target has not the boxes that are asked for.
    LayerStackError: MaxText itself could not scan this number of layers.
  """
  _refuse_apart(source, options.params_only)
  is_tunix = options.target_layout != "maxtext"
  if is_tunix:
    _check_tunix(source, options.target_layout, run)
  reads = releases.find(run.release, "nnx" if is_tunix else run.trainer) if run.release else None
  takes_release_form = reads is not None and options.direction == "auto"
  if is_tunix:
    layout = tunix_target.layout(options.target_layout, run.clips_gradients)
  else:
    layout = reads.layout if reads is not None and takes_release_form else _layout(source, options)
  _refuse_boxes(layout, options.nnx_values)
  scan_layers = options.scan_layers
  if scan_layers is None and (source.framework, layout.framework) == ("linen", "nnx") and not is_tunix:
    scan_layers = True
  default_naming = layer_stacks.FLAT if layout.framework == "linen" or is_tunix else layer_stacks.NESTED
  decoder = decoder_families.for_release(run.decoder, run.release) if run.decoder and run.release else run.decoder
  return Goal(
      layout,
      scan_layers,
      options.scan_layers is None or (decoder is not None and not decoder.known_order),
      options.layer_naming or (reads.layer_naming if reads else default_naming),
      1 if options.param_scan_axis is None else options.param_scan_axis,
      keeps_form=source.framework == layout.framework and not takes_release_form and not is_tunix,
      release=run.release if takes_release_form else None,
      decoder=decoder,
      schedule=_schedule(decoder, scan_layers, run.release, reads),
      params_only=options.params_only,
      keeps_nnx_aux=options.nnx_aux == "keep",
      weight_dtype=options.weight_dtype,
      optimizer_dtype=options.optimizer_dtype,
      adamw_mask=run.adamw_mask,
      is_tunix=is_tunix,
  )


def _check_tunix(source, target_layout, run):
  """Refuses sources that have this layout already, and releases that do not resume from it."""
  if layouts.is_tunix(source):
    raise errors.LayoutError(
        (source.variables[0],),
        f"a state of MaxText's trainers, for --target_layout={target_layout}",
        "one in Tunix's layout",
        "Convert it to MaxText's first: leave out --target_layout.",
    )
  if run.release is not None and run.release < _SINCE[target_layout]:
    raise errors.DirectionError(
        "--maxtext_release",
        f"{'.'.join(map(str, _SINCE[target_layout]))} or later, for --target_layout={target_layout}",
        ".".join(map(str, run.release)),
        "Give the release that resumes from it.",
    )


def _refuse_boxes(layout, nnx_values):
  """Refuses boxes that the layout, of Linen or of what a release reads, does not have."""
  if nnx_values is not None and (layout.framework != "nnx" or layouts.with_boxes(layout, *_BOXES[nnx_values]) != layout):
    raise errors.OptionError(
        f"--nnx_values={nnx_values}",
        "a target with such boxes",
        f"the layout {layout}",
        "Leave it out, or give --direction too, of one that ends in NNX.",
    )


def _refuse_apart(source, params_only):
  """Refuses what belongs to no single train state, unless only the params are asked for."""
  if source.apart and not params_only:
    raise errors.LayoutError(
        (min(source.apart),),
        "one train state",
        f"a {source}: a train state for each replica, and an outer optimizer",
        "Convert its outer params with --params_only: no other layout has a place for the rest.",
    )


def _schedule(decoder, scan_layers, release, reads) -> layer_stacks.Schedule | None:
  """The schedule of the config's decoder, if it has one and one is asked for."""
  if decoder is None or not decoder.known_order or scan_layers is None or release is None or reads is None:
    return None
  if decoder.proven is not None:
    return decoder.proven[scan_layers]
  return decoder_families.schedule(decoder, scan_layers, reads.trainer, release)


def _layout(source, options) -> layouts.StateLayout:
  """The layout to write where no release determines it."""
  if options.direction == "auto" and options.params_only and options.nnx_values is None:
    return layouts.LINEN  # From which `load_parameters_path` takes weights in every release, with either trainer.
  if options.direction == "auto" and layouts.is_tunix(source):
    return layouts.LINEN_OF_NNX
  if _framework(source, options.direction) == "linen":
    return source if source.framework == "linen" and not source.apart else layouts.LINEN
  is_nnx = source.framework == "nnx"
  as_they_are = (source.boxed_variables, source.boxed_optimizer) if is_nnx else _BOXES["boxed"]
  boxes = _BOXES.get(options.nnx_values, as_they_are)
  if not options.params_only and not (is_nnx and source.opt_state is None):
    return layouts.with_boxes(layouts.NNX_PLAIN, *boxes)
  keeps = is_nnx and source.opt_state is None and not layouts.is_tunix(source)
  return layouts.with_boxes(source if keeps else layouts.NNX_PARAMS_ONLY, *boxes)


def _framework(source, direction) -> str:
  """The framework to convert to; refuses a direction that starts from another."""
  if direction == "auto":
    return "nnx" if source.framework == "linen" else "linen"
  begin, end = direction.split("_to_")
  if begin != source.framework:
    raise errors.DirectionError(
        f"--direction={direction}",
        f"a source of {begin.replace('nnx', 'NNX').replace('linen', 'Linen')}",
        f"the layout {source}",
        "Leave out --direction, or give the one that starts from this layout.",
    )
  return end
