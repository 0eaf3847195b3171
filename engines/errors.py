"""Errors that reach a user as one line on stderr and exit status 1.

Wrong arguments to Python functions raise ValueError or TypeError; these classes are for what a
caller cannot check beforehand: files, budgets, devices, builds.
"""


def first_line(error: Exception) -> str:
    """What a library said in one line of a message: the first of its text, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(text: str) -> str:
    """A text of somebody's for a message, cut to 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."


class TmpDiffError(Exception):
    """Root of every error this project raises on purpose; its text is one actionable line."""


class BundleError(TmpDiffError):
    """A bundle folder is missing, damaged, altered, of a newer format, or unsafe to read."""


class ScheduleError(TmpDiffError):
    """A schedule is malformed or belongs to another bundle, step count or set of precisions."""


class SamplerError(TmpDiffError):
    """A scheduler cannot be compiled to a table, or a table document is malformed."""


class BackendError(TmpDiffError):
    """A backend, its library or a device is not available, or an engine failed to load or run."""


class PromptError(TmpDiffError):
    """A prompt or prompt file cannot be used."""


class BudgetError(TmpDiffError):
    """No schedule meets the budget; the text names the nearest one that can be met."""


class BuildError(TmpDiffError):
    """A pipeline cannot be exported or an engine missed its accuracy floor."""
