"""Errors that a user can act on.

Every message says what was expected, what came, and what to do. The command lines print them without a traceback.
"""


class AutoLoRAError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(AutoLoRAError):
    """The configuration is wrong; the message lists every fault found."""


class DataError(AutoLoRAError):
    """A data file is missing, truncated or malformed, or a split is empty."""


class BackboneError(AutoLoRAError):
    """A pretrained model cannot be found, verified or used for the task."""


class TargetError(AutoLoRAError):
    """A pattern that selects modules matches nothing, or modules that cannot be adapted."""


class AdapterError(AutoLoRAError):
    """A bank has no adapter of this name, or has one already, or cannot hold it."""


class PlanError(AutoLoRAError):
    """A rank plan or a budget is impossible for the model."""


class NonFiniteLossError(AutoLoRAError):
    """The training loss became NaN or infinite."""


class CheckpointError(AutoLoRAError):
    """A checkpoint is refused: it carries code, or belongs to another run."""


class BusyError(AutoLoRAError):
    """Another process works on the same run directory."""


class ExportError(AutoLoRAError):
    """A model cannot be written in a format, or would compute something else there."""


class ServiceError(AutoLoRAError):
    """A service wants an account, cannot be reached, or refuses what it is sent."""


class PathError(AutoLoRAError):
    """A file or folder cannot be made where it was asked for."""


class DiskFullError(AutoLoRAError):
    """There is no space left for a file that has to be written."""
