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

"""Draws seconds and memory against the size of the checkpoint."""

from collections.abc import Mapping, Sequence
import pathlib

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # pylint: disable=wrong-import-position
import runs  # pylint: disable=wrong-import-position

_FAILED = "x"


def draw(path: pathlib.Path, sizes: Sequence[float], curves: Mapping[str, Sequence[runs.Run]]):
  """Draws two panels, of one curve for each way. A run that came to no end is a cross where it was ended."""
  pyplot.rcParams.update({"svg.hashsalt": "", "font.size": 9})  # The same figures give the same file.
  figure, (seconds, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
  for name, curve in curves.items():
    style = {"marker": "o", "markersize": 3, "linestyle": "--" if name.startswith("straightforward") else "-"}
    _curve(seconds, sizes[: len(curve)], [run.seconds for run in curve], curve, label=name, **style)
    _curve(memory, sizes[: len(curve)], [run.rss / runs.GIB for run in curve], curve, label=name, **style)
  for axes, label in ((seconds, "seconds, process start included"), (memory, "peak resident memory, GiB")):
    axes.set(xscale="log", yscale="log", xlabel="size of the checkpoint, GiB", ylabel=label)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter("{x:g}")
  figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
  figure.savefig(path, metadata={"Date": None})


def _curve(axes, sizes, values, curve, **style):
  (line,) = axes.plot(sizes, values, **style)
  ended = [(size, value) for size, value, run in zip(sizes, values, curve) if run.failure]
  if ended:
    axes.plot(*zip(*ended), _FAILED, color=line.get_color(), markersize=9, markeredgewidth=2)
