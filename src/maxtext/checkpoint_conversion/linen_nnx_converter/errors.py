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

"""What the converter refuses, with one class for each cause.

Every message is one line: which path, what was expected there, what was found, and what to do.
"""

# How TensorStore's ValueErrors begin that say nothing of the data. Others may be of damage.
_NO_ACCESS = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)
# The packages by which remote storage is reached. What they raise, once they have tried again for a while, is of no class
# that another package knows.
_OF_STORES = frozenset({"aiohttp", "gcsfs", "google", "requests"})
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def one_line(e: BaseException, most: int = 300) -> str:
  """What an exception of a library says, in one line of at most so many characters: its beginning and its end."""
  text = " ".join(str(e).split())
  return text if len(text) <= most else f"{text[: most // 2 - 2]} … {text[1 - most // 2 :]}"


def named(e: BaseException, most: int = 300) -> str:
  """An exception of a library, and what it says, if anything, as `one_line` does."""
  return ": ".join(filter(None, (type(e).__name__, one_line(e, most))))


def escaped(text: str) -> str:
  """A text in one line, even if a path in it has line breaks."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, most: int = 100) -> str:
  """A value that is not what it should be, in at most so many characters: it may be a whole model."""
  text = repr(value)
  return text if len(text) <= most else f"{text[: most - 1]}…"


class ConversionError(ValueError):
  """A conversion that would need guessing, or whose input is damaged.

  Attributes:
    path, expected, found, remedy: the parts of the message, as they were given.
    REMEDY: what the user can do, unless the instance says otherwise.
  """

  REMEDY = ""

  def __init__(self, path, expected: str, found: str, remedy: str | None = None):
    """Builds the one-line message.

    Args:
      path: a leaf path (a tuple of strings), or the path of a file or folder.
      expected: what the converter needs at `path`.
      found: what is there.
      remedy: what the user can do about it; None is the class's remedy.
    """
    self.path = "/".join(path) if isinstance(path, tuple) else str(path)
    self.expected, self.found = expected, found
    self.remedy = self.REMEDY if remedy is None else remedy
    super().__init__(escaped(f"{self.path}: expected {expected}, found {found}. {self.remedy}"))

  def __reduce__(self):
    # Exceptions are copied and pickled by their `args`, which hold only the message.
    return type(self), (self.path, self.expected, self.found, self.remedy), self.__dict__


class OptionError(ConversionError):
  """An option that there is not, or a value that it cannot have."""

  REMEDY = "Give one of these values."


class SourceNotFoundError(ConversionError):
  """The source path does not exist."""


class NotACheckpointError(ConversionError):
  """The source is not an Orbax checkpoint of a pytree."""


class UnfinishedCheckpointError(ConversionError):
  """The source was never committed, or lacks a file that its metadata names."""

  REMEDY = "The checkpoint is damaged or was never committed: use another step."


class DamagedSourceError(ConversionError):
  """An array of the source cannot be read."""

  REMEDY = "The checkpoint is damaged: use another step."


class AccessError(ConversionError):
  """A file or a store cannot be reached: no permission, no network. That says nothing of what is stored there."""


class ForeignFileError(ConversionError):
  """The source holds a link, a pipe or a device, or refers to a file outside itself."""


class SourceChangedError(ConversionError):
  """A file of the source was changed while the conversion ran."""


class TargetError(ConversionError):
  """The target exists, overlaps the source, or cannot be written."""

  REMEDY = "Choose another --target_path."


class PathNameError(ConversionError):
  """A folder's name that Orbax or TensorStore cannot read or write, or would take for another."""


class LayoutError(ConversionError):
  """The tree is of no known state layout, or fits two."""


class DirectionError(ConversionError):
  """The direction contradicts what the source is."""


class ConfigError(ConversionError):
  """A MaxText config that cannot be read, or that contradicts the checkpoint."""


class UnaccountedLeafError(ConversionError):
  """A leaf that no rule of the layout accounts for."""

  REMEDY = "This is a defect of the converter: please report it."


class LayerStackError(ConversionError):
  """A stack of layers with a layer missing, or whose layers are not alike."""


class MomentError(ConversionError):
  """A params-like optimizer subtree that does not match the params."""


class PathCollisionError(ConversionError):
  """Two leaves that would land on one path."""


class StepError(ConversionError):
  """A step that the target's dtype cannot hold."""


class VerificationError(ConversionError):
  """The target that was written differs from what the plan says."""

  REMEDY = "Nothing was committed. Check the disk and convert again."


def is_a_stores(e: BaseException) -> bool:
  """Whether an exception says that remote storage gives no answer, or none but that it cannot."""
  is_this_machines = "os_error_code" in str(e)  # So TensorStore quotes it, for example of a full disk.
  return type(e).__module__.split(".")[0] in _OF_STORES or (_says_no_access(e) and not is_this_machines)


def check_access(path, e: Exception):
  """Tells failures to access data apart from faults in the data.

  Args:
    path: what was read, as for a `ConversionError`.
    e: what the system or TensorStore raised.

  Raises:
    AccessError: `e` says nothing about the data. (An absent file does.)
  """
  is_the_systems = isinstance(e, OSError) and not isinstance(e, _ABSENT)
  if is_the_systems or is_a_stores(e) or _says_no_access(e):
    raise AccessError(
        getattr(e, "filename", None) or path,
        "a path that can be read from here",
        (getattr(e, "strerror", None) or one_line(e)).lower(),
        "Check its permissions, or the network and the credentials, and try again.",
    ) from e


def _says_no_access(e) -> bool:
  return isinstance(e, ValueError) and str(e).startswith(_NO_ACCESS)
