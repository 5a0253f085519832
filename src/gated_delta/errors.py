"""Every error this package raises about its inputs: which argument, what it was, what it must be."""


class GatedDeltaError(Exception):
    """Base of all errors raised by gated_delta."""


class ArgumentError(GatedDeltaError):
    """An argument of ``where`` that cannot be used: ``argument`` is ``was``, and must be ``must``."""

    def __init__(self, where: str, argument: str, was: object, must: str) -> None:
        self.where, self.argument, self.was, self.must = where, argument, was, must
        super().__init__(f"{where}: {argument} is {was}; it must be {must}")

    def __reduce__(self) -> tuple[type["ArgumentError"], tuple[str, str, object, str]]:
        return type(self), (self.where, self.argument, self.was, self.must)


class ShapeError(ArgumentError, ValueError):
    """Rank or size of a tensor."""


class LayoutError(ArgumentError, ValueError):
    """Strides of a tensor."""


class DeviceError(ArgumentError, ValueError):
    """A tensor on another device than the rest."""


class DtypeError(ArgumentError, TypeError):
    """Dtype of a tensor, or a value that is no tensor where one is needed."""


class OptionError(ArgumentError, ValueError):
    """A number, a word, or a combination of arguments."""


class GradientError(ArgumentError, ValueError):
    """An input that asks for a gradient where the operator has none."""


class DataError(ArgumentError, ValueError):
    """Values inside a tensor; found in checked mode only."""


class BackendError(ArgumentError, ValueError):
    """A backend that does not exist or cannot serve the call."""


class PoolError(ArgumentError, ValueError):
    """Slots of a state pool: none left, or not allocated."""


class WarmupError(GatedDeltaError, RuntimeError):
    """A process that compiles kernels failed."""
