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

"""Stops conversions at random, on every way of moving bytes, and looks at what is left.

  python tests/campaigns/linen_nnx_converter_kill_campaign.py --runs=400 --seed=1

Each run picks a way and a fault, stops a conversion, and then requires: the source's files are unchanged, content and
time of modification; the target does not exist, or is whole (with --overwrite: it is the old one or the new one, whole);
the next run of the same command succeeds without any cleaning, and leaves nothing beside the target. Exit code and
message must say what stood there, wherever the run was able to say anything.

The conversion runs in a fork of this process, which has imported everything but has started no thread (which is checked),
so that a run costs no imports. Whatever uses TensorStore or JAX is forked too.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

# A process with threads cannot be forked safely, and importing NumPy would start OpenBLAS's.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
sys.path.append(str(pathlib.Path(__file__).parents[1] / "unit"))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
from absl import logging
import jax
import linen_nnx_converter_forks as forks
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import __main__ as command
from maxtext.checkpoint_conversion.linen_nnx_converter import conversion
from maxtext.checkpoint_conversion.linen_nnx_converter import progress
from maxtext.checkpoint_conversion.linen_nnx_converter.command import stopping
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target

del conversion, progress, stopping  # Imported here so that the forks need not.

_RUNS = flags.DEFINE_integer("runs", 400, "How many conversions to stop.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 1, "Of the choice of ways, faults and moments.")

# What each way of moving bytes is called, with its source and its flags.
WAYS = {
    "by reference": ("unscanned", "--scan_layers"),
    "by reference, copied": ("unscanned", "--scan_layers", "--copy_mode=copy"),
    "raw": ("unscanned", "--params_only", "--scan_layers"),
    "streamed": ("scanned", "--noscan_layers"),
    "plain zarr, by reference": ("plain_unscanned", "--scan_layers"),
    "plain zarr, streamed": ("plain_scanned", "--noscan_layers"),
}
MOMENT, OPERATION, RACE = "kill -9 at a moment", "kill -9 before a file operation", "two at once"
TERMINATED, INTERRUPTED, BACKGROUND = "SIGTERM", "SIGINT", "SIGTERM to a background job"
BURST, UNHEARD = "ten signals in 0.5 s", "SIGTERM, streams closed or full"
STOPS = (TERMINATED, INTERRUPTED, BACKGROUND, BURST, UNHEARD)
FAULTS = (MOMENT, MOMENT, OPERATION, OPERATION, *STOPS, RACE)  # Chosen among evenly.
_BROKEN = "not whole"


@dataclasses.dataclass(frozen=True)
class Normal:
  """What a conversion is when nothing stops it.

  Attributes:
    seconds: how long it takes.
    operations: how many file operations of Python's it has, at the target.
    digest: of its result.
  """

  seconds: float
  operations: int
  digest: str


class Campaign:
  """Sources in a folder, and runs in others beside them."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.log = folder, folder / "log"
    self._apart(self._save_sources)
    self.before = util.snapshot(folder / "sources")
    self.normal = {way: self._normal(way) for way in WAYS}
    self.old = self.digest(self._convert_to("old", ["unscanned", "--params_only", "--noscan_layers"]))

  def run(self, number: int, way: str, fault: str, overwrite: bool, at: float) -> str:
    """One run. Returns what stood at the target after the fault: nothing, the old one or the new one.

    Raises:
      AssertionError: something was lost.
    """
    target = self.folder / f"run_{number}" / "target"
    if overwrite:
      shutil.copytree(self.folder / "old" / "target", target)
    code = self._stop(way, target, fault, at, *(["--overwrite"] if overwrite else []))
    said = self.log.read_text()
    found = self._found(way, target)
    assert found in (("old", "new") if overwrite else ("nothing", "new")), f"the target is {found}"
    if fault in STOPS:
      self._check_what_was_said(code, said, found, target, may_be_silent=fault == UNHEARD)
    listing = set(os.listdir(target.parent)) if target.parent.exists() else set()
    assert listing <= {"target", f"target{atomic_target.SUFFIX}"}, f"left behind: {listing}"
    if fault in (*STOPS, RACE):
      assert listing <= {"target"}, f"left behind: {listing}"
    assert self._apart(self._command(way, target, "--overwrite")) == 0, f"the next run: {self.log.read_text()}"
    assert self._found(way, target) == "new", "the next run's target is not whole"
    assert os.listdir(target.parent) == ["target"], f"left behind by the next run: {os.listdir(target.parent)}"
    assert util.snapshot(self.folder / "sources") == self.before, "the source was changed"
    shutil.rmtree(target.parent)
    return found

  def digest(self, checkpoint: pathlib.Path) -> str:
    """A digest of a checkpoint's whole tree, to the bit."""
    result = self.folder / "digest"
    result.unlink(missing_ok=True)

    def load():
      flat = util.flat(converter.load_checkpoint(checkpoint))
      result.write_text(hashlib.sha256(repr(sorted(flat.items())).encode()).hexdigest())
      return 0

    return result.read_text() if self._apart(load) == 0 else _BROKEN

  def _stop(self, way, target, fault, at, *options) -> int:
    """Stops a conversion, and returns its exit code."""
    normal = self.normal[way]
    if fault == RACE:
      pids = [forks.fork(self._command(way, target, *options), self.folder / f"log{i}") for i in range(2)]
      codes = sorted(map(forks.wait, pids))
      assert codes in ([0, 0], [0, 1]), f"exit codes {codes}"
      for i in range(2):
        self._check_output(self.folder / f"log{i}")
      return 0
    if fault == OPERATION:
      stop_at = int(at * normal.operations)
      code = forks.wait(forks.fork(self._command(way, target, *options, stop_at=stop_at), self.log))
      assert code in (128 + signal.SIGKILL, 0), f"exit code {code}: {self.log.read_text()}"
      return code
    prepare = {BACKGROUND: forks.ignore_ctrl_c, UNHEARD: lambda: forks.make_deaf(at)}.get(fault, lambda: None)
    pid = forks.fork(self._command(way, target, *options), self.log, prepare)
    time.sleep(at * 1.2 * normal.seconds)
    if fault == MOMENT:
      forks.kill(pid)
    else:
      self._send(pid, fault, at)
    code = forks.wait(pid)
    assert code in (
        (-signal.SIGKILL, 0) if fault == MOMENT else (command.INTERRUPTED, 0)
    ), f"exit code {code}: {self.log.read_text()}"
    self._check_output(self.log)
    return code

  def _send(self, pid, fault, at):
    os.kill(pid, signal.SIGINT if fault == INTERRUPTED else signal.SIGTERM)
    chooser = random.Random(at)
    for _ in range(9 if fault == BURST else 0):
      time.sleep(chooser.random() * 0.1)
      os.kill(pid, chooser.choice((signal.SIGINT, signal.SIGTERM)))  # It is not waited for yet, so it is there.

  def _check_what_was_said(self, code, said, found, target, may_be_silent):
    assert (code == 0) == (found == "new"), f"exit code {code}, and the target is {found}: {said}"
    sentences = {
        "new": ("converted ", f"{target} is there, complete."),
        "old": (f"{target} is what it was.", "nothing was made."),
        "nothing": (f"nothing was left at {target}.", "nothing was made."),
    }[found]
    began = (self.folder / "began").exists()
    is_silent = not said.strip() and (may_be_silent or not began)
    assert is_silent or any(sentence in said for sentence in sentences), f"the target is {found}, said was: {said}"

  def _check_output(self, log):
    lines = [line for line in log.read_text().splitlines() if line]
    # A stop may come right after the summary, which standard error has where standard output is closed.
    said_later = lines[1:] if lines and lines[0].startswith("converted ") else lines
    assert len(said_later) <= 1, f"more than one line: {lines}"

  def _found(self, way, target) -> str:
    if not target.exists():
      return "nothing"
    return {self.normal[way].digest: "new", self.old: "old"}.get(self.digest(target), _BROKEN)

  def _command(self, way, target, *more, stop_at=None):
    source, *options = WAYS[way] if isinstance(way, str) else way
    paths = [f"--source_path={self.folder / 'sources' / source}", f"--target_path={target}"]
    (self.folder / "began").unlink(missing_ok=True)

    def run():
      count = forks.count_operations(str(target), stop_at)
      sys.argv = ["", *paths, *options, *more]
      (self.folder / "began").touch()
      try:
        command.console_main()
      except SystemExit as e:
        if count[0]:  # Of the two processes, the one that works.
          (self.folder / "count").write_text(str(count[0]))
        return e.code

    return run

  def _apart(self, function) -> int:
    return forks.wait(forks.fork(function, self.log))

  def _convert_to(self, name, way) -> pathlib.Path:
    target = self.folder / name / "target"
    assert self._apart(self._command(way, target)) == 0, self.log.read_text()
    return target

  def _normal(self, way) -> Normal:
    begin = time.monotonic()
    target = self._convert_to("normal", WAYS[way])
    normal = Normal(time.monotonic() - begin, int((self.folder / "count").read_text()), self.digest(target))
    assert normal.digest != _BROKEN, self.log.read_text()
    print(f"{way}: {self.log_line(target)}", flush=True)
    shutil.rmtree(target)
    return normal

  def log_line(self, target) -> str:
    files = [path for path in target.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"

  def _save_sources(self) -> int:
    for name, tree in (("unscanned", unscanned()), ("scanned", scanned())):
      for prefix, use_ocdbt in (("", True), ("plain_", False)):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)) as checkpointer:
          checkpointer.save(self.folder / "sources" / f"{prefix}{name}", args=ocp.args.PyTreeSave(tree))
    return 0


def unscanned(layers=4, size=256):
  """A train state of some MiB that does not compress."""
  bits = np.random.default_rng(0)
  array = lambda: bits.integers(0, 2**15, (size, size)).astype(np.int16).view(jax.numpy.bfloat16.dtype)
  params = {"decoder": {f"layers_{i}": {"wi_0": array(), "wo": array()} for i in range(layers)}}
  return util.linen(params | {"token_embedder": {"embedding": array()}})


def scanned():
  return converter.convert_nnx_to_linen(converter.convert_linen_to_nnx(unscanned()))


def main(argv):
  del argv
  logging.set_verbosity(logging.FATAL)
  chooser = random.Random(_SEED.value)
  found, losses = collections.Counter(), 0
  with tempfile.TemporaryDirectory() as folder:
    campaign = Campaign(pathlib.Path(folder).resolve())
    for number in range(_RUNS.value):
      way = list(WAYS)[number % len(WAYS)]
      fault, overwrite, at = chooser.choice(FAULTS), chooser.random() < 0.4, chooser.random()
      label = f"seed {_SEED.value} run {number}: {way}; {fault} at {at:.3f}{'; --overwrite' if overwrite else ''}"
      try:
        outcome = campaign.run(number, way, fault, overwrite, at)
      except AssertionError as e:
        outcome, losses = "LOSS", losses + 1
        print(f"{label}: LOSS: {e}")
      else:
        print(f"{label}: {outcome}")
      sys.stdout.flush()
      found[way, fault, outcome] += 1
  print("\nway; fault; what stood at the target; runs")
  for key, count in sorted(found.items()):
    print("; ".join((*key, str(count))))
  print(f"{_RUNS.value} runs with seed {_SEED.value}: {losses} losses")
  return 1 if losses else 0


if __name__ == "__main__":
  app.run(main)
