"""The engine's errors.

PenstockError
 ├─ CheckpointError   the model folder cannot be served: names the file or tensor, then the way out
 ├─ ConfigError       an option cannot be met on this machine: names the option, then the way out
 └─ EngineError       our fault; never raised for what a request or a checkpoint contains
"""


class PenstockError(Exception):
    """Root of all errors that a person may read."""


class CheckpointError(PenstockError, ValueError):
    """A model folder that cannot be served."""


class ConfigError(PenstockError, ValueError):
    """An option that cannot be met."""


class EngineError(PenstockError, RuntimeError):
    """A fault of the engine itself."""
