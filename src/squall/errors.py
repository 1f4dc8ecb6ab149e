"""Every error Squall raises on purpose; down to InvalidRequest they are ValueErrors too.

SquallError
├── ModelNotFound        no such file, folder or embedded model
│   └── UnknownAdapter   no adapter has this name
├── InvalidCheckpoint    a model file is malformed, truncated or inconsistent
├── UnsupportedModel     well-formed, but an architecture, field or number format we do not run
├── InvalidRequest       a caller's argument is out of range
│   ├── ContextLengthExceeded
│   └── TemplateError    a chat template is missing, malformed, or broke its limits
├── SamplingFailed       no token can be chosen for this request
├── QueueFull            too much waits already; says when to try again
├── EngineStopped        the engine is shutting down, or an error in a step ended it
└── OutOfMemory          the KV cache or the buffers do not fit
"""


class SquallError(Exception):
    """Base of all errors raised by Squall."""


class ModelNotFound(SquallError, ValueError):
    """No such file, folder or embedded model."""


class UnknownAdapter(ModelNotFound):
    """No adapter has this name."""


class InvalidCheckpoint(SquallError, ValueError):
    """A model file is malformed, truncated or inconsistent."""


class UnsupportedModel(SquallError, ValueError):
    """A well-formed checkpoint that Squall cannot run: architecture, field or number format."""


class InvalidRequest(SquallError, ValueError):
    """An argument is out of range."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the context."""


class TemplateError(InvalidRequest):
    """A chat template is missing, malformed, or broke its limits."""


class SamplingFailed(SquallError):
    """No token can be chosen: nothing is possible, or a logits processor failed."""


class QueueFull(SquallError):
    """Too many requests wait already; `retry_after_s` is a guess when there is room."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(SquallError):
    """The engine is shutting down, or an error in a step ended it."""


class OutOfMemory(SquallError):
    """The KV cache or the buffers do not fit in memory."""
