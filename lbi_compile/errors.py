"""Every error of the project: one class per condition, each saying what was found, expected, and what to do."""

from __future__ import annotations

__all__ = [
    "BatchCouplingError",
    "CaptureError",
    "CheckpointError",
    "CorpusError",
    "DataDependentControlFlowError",
    "DistributedError",
    "DoubleBackwardError",
    "EngineError",
    "ExampleInputsError",
    "FutureLeakError",
    "InterfaceError",
    "LBIError",
    "LatentWidthError",
    "MeshError",
    "ModelSourceError",
    "NoFloatPathError",
    "NoSeparatorError",
    "NotAModuleError",
    "NotBuiltError",
    "OptionError",
    "PlanError",
    "RankLostError",
    "ReadoutError",
    "RegionsError",
    "ScanShapeError",
    "ShapeNotCapturedError",
    "StaleCaptureError",
    "TargetError",
    "TooManyRegionsError",
]


class LBIError(Exception):
    """Base of all errors raised by ``lbi_compile``.

    Args:
        found: What the program met, with the offending value.
        expected: What would have been right.
        do: What the caller can do about it.
    """

    def __init__(self, found: str, *, expected: str, do: str) -> None:
        super().__init__(f"found: {found}\n  expected: {expected}\n  what to do: {do}")
        self.found, self.expected, self.do = found, expected, do

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.expected, self.do)


def _rebuild(cls: type[LBIError], found: str, expected: str, do: str) -> LBIError:
    return cls(found, expected=expected, do=do)


class NotAModuleError(LBIError):
    """The model is no ``torch.nn.Module``."""


class OptionError(LBIError):
    """An option has a value that does not exist or does not go with another one."""


class RegionsError(LBIError):
    """``regions`` is no positive number of regions."""


class TooManyRegionsError(RegionsError):
    """More regions were asked for than the model has places to cut."""


class LatentWidthError(LBIError):
    """``r`` is no width a latent can have."""


class ExampleInputsError(LBIError):
    """The example inputs do not fit the model, or none can be found."""


class CaptureError(LBIError):
    """``torch.export`` could not capture the model."""


class DataDependentControlFlowError(CaptureError):
    """The model branches in Python on values of tensors."""


class ShapeNotCapturedError(LBIError):
    """The model is called with shapes its capture does not cover."""


class NoFloatPathError(LBIError):
    """No differentiable path leads from an input through a parameter to an output."""


class NoSeparatorError(LBIError):
    """A boundary is no separator of the graph: a value reaches past it by another way."""


class InterfaceError(LBIError):
    """The interface does not suit the shapes that cross the boundaries."""


class ReadoutError(LBIError):
    """The readout does not suit the model or the interface."""


class FutureLeakError(LBIError):
    """The bounded model would let an output position see later inputs that the model does not see."""


class BatchCouplingError(LBIError):
    """A region mixes samples, so per-sample interface Jacobians do not exist."""


class EngineError(LBIError):
    """The engine that was asked for cannot run this model."""


class DoubleBackwardError(LBIError):
    """The gradient of a gradient was asked for through a bounded backward."""


class StaleCaptureError(LBIError):
    """The model changed after it was transformed."""


class PlanError(LBIError):
    """A plan does not belong to the model, or its text cannot be read."""


class NotBuiltError(LBIError):
    """The bounded model has seen no inputs yet, so its interfaces do not exist."""


class TargetError(LBIError):
    """The targets are no classes or class probabilities that fit the logits."""


class ModelSourceError(LBIError):
    """The command line names a model that cannot be loaded."""


class ScanShapeError(LBIError):
    """The tensors of a scan do not fit together in shape, dtype or device."""


class CorpusError(LBIError):
    """The demo finds too little text to train on."""


class MeshError(LBIError):
    """The device mesh does not suit the bounded model."""


class DistributedError(LBIError):
    """A bounded model, or something asked of it, cannot be spread over ranks."""


class RankLostError(LBIError):
    """Another rank stopped taking part in training."""


class CheckpointError(LBIError):
    """A folder holds no whole checkpoint, or one of another model."""
