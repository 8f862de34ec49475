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


"""Measures what the other benchmark has no room for, each job's processes one at a time, and prints a table for each.

- `hosts`: DeepSeek-V3 671B with adamw, as 512 hosts write it, is inspected, planned, and converted by reference.
- `processes`: what is streamed, by one process and by several.
- `cores`: what is streamed, on one core and on several, with several memory budgets.
- `maxtext`: two conversions of MaxText's own, beside this converter's, and whether the results are the same to the bit.
  Needs `--maxtext_python`, a Python with MaxText 0.2.4's trainer.

`--docs` has the tables put into performance.md.

usage: uv run benchmarks/linen_nnx_converter_scale_benchmark.py [--jobs=hosts …] [--docs=docs]

Data is made in a temporary folder below `--scratch`, of which 12 GiB must be free. A process that takes more than
`--memory_limit_gib`, or nearly all that the machine has left, is ended, and its row says so.
"""

from collections.abc import Iterator
import json
import os
import pathlib
import subprocess
import tempfile
import textwrap

from absl import app
from absl import flags
import page
import report
import runs

_DOCS = flags.DEFINE_string("docs", None, "A folder whose performance.md gets the results.")
_SCRATCH = flags.DEFINE_string("scratch", None, "Where to make data; unset, the system's temporary folder.")
_LIMIT = flags.DEFINE_float("memory_limit_gib", 20.0, "GiB of resident memory at which a process is ended.")
_GIB = flags.DEFINE_float("gib", 4.0, "GiB of the arrays of what is streamed.")
_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of MaxText's model, of 64 MiB each.")
_PYTHON = flags.DEFINE_string("maxtext_python", os.environ.get("MAXTEXT_PYTHON"), "A Python with MaxText's trainer.")

_HEADINGS = ("Job", "Way", *report.FIGURES)
_UNSCANNED = "--scan_layers=False"
_BUDGETS = 0.5, 1, 2, 4  # GiB.
_DIGESTS = "linen_nnx_converter_digests.json"

_SHARDS = 16
_MODEL = {
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "steps": 1,
    "checkpoint_period": 1,
    "async_checkpointing": False,
    "attention": "dot_product",
    "base_emb_dim": 1024,
    "base_mlp_dim": 4096,
    "base_num_query_heads": 8,
    "base_num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 256,
    "max_target_length": 16,
    "max_prefill_predict_length": 8,
    "per_device_batch_size": 1,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "enable_checkpoint_cloud_logger": False,
    **{name: False for name in ("enable_nnx", "pure_nnx", "pure_nnx_decoder")},
}

Rows = Iterator[tuple[str, str, runs.Run]]


def hosts(scratch: runs.Scratch) -> Rows:
  """DeepSeek-V3 671B with adamw, of 512 hosts."""
  with scratch.source("deepseek3_data") as source:
    yield "inspect", "", scratch.inspect(source)
    yield "Linen -> NNX", "`--dry_run`", scratch.convert(source, "--dry_run")
    yield "Linen -> NNX", "by reference, not verified", scratch.convert(source, "--noverify")
    yield "Linen -> NNX", "by reference, verified", scratch.convert(source)
    yield "scanned -> unscanned", "`--dry_run`", scratch.convert(source, "--dry_run", _UNSCANNED)


def processes(scratch: runs.Scratch) -> Rows:
  """One process and several on this machine."""
  target, first = scratch.folder / "target", None
  with _streamed(scratch) as source:
    for count in (1, 2, 4):
      job = ("convert",) if count == 1 else ("together", str(count))
      with scratch.made("target", runs.converter(source, target, _UNSCANNED, job=job), source) as run:
        digests = None if run.failure else json.loads((target / _DIGESTS).read_text())["leaves"]
        first = first or digests
        bits = "the same bits" if digests == first else "OTHER BITS"
        yield f"{_GIB.value:g} GiB normal: scanned -> unscanned", f"processes: {count}, {bits}", run


def cores(scratch: runs.Scratch) -> Rows:
  """One core and several."""
  target, there = scratch.folder / "target", sorted(os.sched_getaffinity(0))
  with _streamed(scratch) as source:
    for count in sorted({1, 2, len(there) // 2, len(there)} - {0}):
      for gib in _BUDGETS:
        command = runs.converter(source, target, _UNSCANNED, f"--memory_budget_gib={gib}")
        allowed = ["taskset", "-c", ",".join(map(str, there[:count])), *command]
        with scratch.made("target", allowed, source) as run:
          yield f"{_GIB.value:g} GiB normal: scanned -> unscanned", f"cores: {count}, memory budget: {gib} GiB", run


def maxtext(scratch: runs.Scratch) -> Rows:
  """MaxText's own conversions, of a checkpoint that its trainer writes."""
  trained, theirs = scratch.folder / "trained", scratch.folder / "theirs"
  command = _maxtext_command("trainers.pre_train.train", run_name="run", base_output_directory=trained)
  with scratch.made("trained", command) as run:
    if run.failure:
      raise runs.NoCheckpointError(f"MaxText's checkpoint: {run.failure}")
    source = trained / "run/checkpoints/0"
    command = _maxtext_command(
        "utils.generate_param_only_checkpoint",
        run_name="run",
        base_output_directory=theirs,
        load_full_state_path=source / "items",
        force_unroll=True,
    )
    size = f"{_LAYERS.value / 16:g} GiB of params alone, bfloat16"
    job = f"{size}, unscanned", "MaxText's generate_param_only_checkpoint", command
    yield from _beside(scratch, source, job, theirs / "run/checkpoints/0", _UNSCANNED)
    command = _maxtext_command(
        "checkpoint_conversion.reshard_checkpoint",
        run_name="run",
        base_output_directory=theirs,
        load_parameters_path=source / "items",
        weight_dtype="bfloat16",
        ici_fsdp_parallelism=_SHARDS,
    )
    command.append(f"--simulated_cpu_devices_count={_SHARDS}")
    job = f"{size}, in {_SHARDS} chunks", "MaxText's reshard_checkpoint", command
    largest = 2 * _MODEL["base_emb_dim"] * _LAYERS.value * _MODEL["base_mlp_dim"]
    yield from _beside(scratch, source, job, theirs / "0", f"--chunk_byte_size={largest // _SHARDS}")


def _beside(scratch, source, job, made, *arguments) -> Rows:
  """A command, what the converter is told to make the same, and whether it is."""
  name, way, command = job
  ours = scratch.folder / "ours"
  chosen = "--direction=linen_to_linen", "--params_only", "--weight_dtype=bfloat16", *arguments
  with scratch.made("theirs", command, source) as run:
    yield name, way, run
    with scratch.made("ours", runs.converter(source, ours, *chosen), source) as our_run:
      yield name, "this converter, verified", our_run
      yield name, "comparator: all bits are the same", scratch.compare(ours, made)


def _maxtext_command(module: str, **settings) -> list[str]:
  python = _PYTHON.value
  if not python:
    raise app.UsageError("--maxtext_python: expected a Python with MaxText's trainer, found none.")
  find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
  package = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
  chosen = _MODEL | {"base_num_decoder_layers": _LAYERS.value} | settings
  # Without Google's cloud, MaxText does not ask for JetStream, which resharding has no use for.
  command = ["env", "JAX_PLATFORMS=cpu", "DECOUPLE_GCLOUD=TRUE", python, "-m", f"maxtext.{module}"]
  return [*command, f"{package}/configs/base.yml", *(f"{name}={value}" for name, value in chosen.items())]


def _streamed(scratch):
  return scratch.source(gib=_GIB.value, is_scanned=True, leaf_mib=128, is_normal=True)


_COLUMNS = ("Job", "Way", "Beyond start", "CPU s", "Peak RSS, MiB")
_JOBS = {
    "hosts": (hosts, (*_COLUMNS, "New, MiB")),
    "processes": (processes, _COLUMNS),
    "cores": (cores, _COLUMNS),
    "maxtext": (maxtext, ("Job", "Way", "Seconds", "CPU s", "Peak RSS, MiB")),
}
_CHOSEN = flags.DEFINE_multi_enum("jobs", list(_JOBS), list(_JOBS), "Which to measure.")


def _measured(rows: Rows, columns) -> str:
  """The table of what rows take, and what the last dry run estimates."""
  machine, said = report.machine(), []

  def lines():
    for job, way, run in rows:
      said.append(run.said)
      yield job, way, *report.cells(run)

  measured, why = report.printed(_HEADINGS, lines())
  chosen = [[dict(zip(_HEADINGS, cells))[name] for name in columns] for cells in measured]
  costs = [text for text in said if text.startswith("cost: ")]
  cost = "\n\n" + textwrap.fill(f"The last one's {costs[-1]}.", 120) if costs else ""
  return f"{machine}.\n\n{page.table([columns, *chosen])}{why}{cost}"


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown: {argv[1:]}")
  for name in dict.fromkeys(_CHOSEN.value):
    rows, columns = _JOBS[name]
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
      text = _measured(rows(runs.Scratch(pathlib.Path(folder), _LIMIT.value * runs.GIB)), columns)
    if _DOCS.value:
      report.write(pathlib.Path(_DOCS.value), name, text)


if __name__ == "__main__":
  app.run(main)
