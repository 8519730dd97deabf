"""Every error and warning that edgegen raises on purpose.

    EdgegenError
    ├── UsageError(ValueError)         the user asked for something that cannot be: one line, exit code 2
    │   ├── ModelError                 model or weights that cannot be loaded
    │   ├── DataError                  data that cannot be read or must not be used
    │   ├── RecipeError                unknown pass, unknown option, value out of range
    │   ├── TargetError                unknown target or a target file with errors
    │   ├── BundleError                a bundle that is damaged or not one
    │   ├── BudgetError                no candidate meets the budget; names the nearest one
    │   └── MissingExtra               an optional dependency is absent; carries the exact command
    ├── PassError(RuntimeError)        a pass failed; says which pass and which had run before
    ├── TargetUnavailable(RuntimeError)  the device is not here: "not measured: reason"
    └── RuntimeFailed(RuntimeError)    a runtime crashed, ran out of time or memory, or gave wrong results
        └── Unsupported                a runtime refuses a graph before any work: operator, layer, cure

    EdgegenWarning(UserWarning)
    └── NothingChanged                 a pass ran and changed nothing
"""


class EdgegenError(Exception):
    """Base of all errors raised on purpose; the command line prints them as one line."""


class UsageError(EdgegenError, ValueError):
    """Bad input. Message: what, got, allowed, what to do."""


class ModelError(UsageError):
    """A model or its weights cannot be loaded."""


class DataError(UsageError):
    """Data that cannot be read, or must not be used for this purpose."""


class RecipeError(UsageError):
    """A recipe names an unknown pass or option, or a value is out of range."""


class TargetError(UsageError):
    """An unknown target, or a target file with errors."""


class BundleError(UsageError):
    """A bundle is damaged, or the folder is not a bundle."""


class BudgetError(UsageError):
    """No candidate meets the budget; the message names the nearest one and the constraint that binds."""


class MissingExtra(UsageError):
    """An optional dependency is absent; the message carries the exact install command."""

    def __init__(self, package: str, why: str, extra: str):
        super().__init__(f"{package} is not installed; it is needed {why}: pip install 'edgegen[{extra}]'")
        self.package, self.extra = package, extra



class PassError(EdgegenError, RuntimeError):
    """A pass failed; the message says which, and which passes had already run."""


class TargetUnavailable(EdgegenError, RuntimeError):
    """The device cannot be reached from here."""


class RuntimeFailed(EdgegenError, RuntimeError):
    """A runtime crashed, ran out of time or memory, or gave wrong results. A result, not the end."""


class Unsupported(RuntimeFailed):
    """A runtime refuses a graph before any work; the message has operator, layer and cure."""


class EdgegenWarning(UserWarning):
    """Base of all warnings."""


class NothingChanged(EdgegenWarning):
    """A pass ran and changed nothing."""
