"""Predictions for the figures of the GPU benchmark, made before any of them was measured."""

from dataclasses import dataclass

READING = "reading of the code"
SCALING = "scaling.md"
PACKING = "packing.md"
FLOOR = "gpu.md"


@dataclass(frozen=True)
class Prediction:
    """A range for a figure.

    Attributes:
        part: the letter of the part.
        figure: the name of the figure.
        low: the lower end; None if the prediction is only "at most ``high``".
        high: the upper end; None if the prediction is only "at least ``low``".
        source: the text that makes the prediction.
    """

    part: str
    figure: str
    low: float | None
    high: float | None
    source: str

    @property
    def text(self) -> str:
        """The range in words."""
        if self.low is None:
            return f"at most {self.high:,g}"
        if self.high is None:
            return f"at least {self.low:,g}"
        return f"{self.low:,g}" if self.low == self.high else f"{self.low:,g} to {self.high:,g}"

    def ratio(self, measured: float) -> float | None:
        """Measured / nearer end of the range; 1 inside the range; None if that end is 0."""
        if self.low is not None and measured < self.low:
            nearest = self.low
        elif self.high is not None and measured > self.high:
            nearest = self.high
        else:
            return 1.0
        return measured / nearest if nearest else None


PREDICTIONS = (
    Prediction("b", "time / three products, d = 896", 1.30, 1.33, FLOOR),
    Prediction("b", "time / three products, d = 2048", 1.14, 1.20, FLOOR),
    Prediction("b", "adpa at d = 4096, V = 131072, by 8·N·d·V", 698, None, "Liger's README"),
    Prediction("c", "copy", 3000, 3000, FLOOR),
    Prediction("c", "bfloat16 product", 790, 790, FLOOR),
    Prediction("c", "float32 product", 47, 47, READING),
    Prediction("d", "1.5B: decoder, FLOP/s", 396, 396, SCALING),
    Prediction("d", "7B: decoder, FLOP/s", 396, 396, SCALING),
    Prediction("d", "1.5B: head, FLOP/s", 495, 495, SCALING),
    Prediction("d", "1.5B: head product in float32 / scoring", 0.38, 0.38, READING),
    Prediction("d", "1.5B: teacher rows / head product", 0.5, 0.5, READING),
    Prediction("d", "1.5B: loading", 2, 2, SCALING),
    Prediction("e", "training, FLOP/s", 297, 297, SCALING),
    Prediction("e", "as it is / float32, speed", 5, 7, READING),
    Prediction("e", "boolean mask / micro-batch, time", 0.10, 0.20, READING),
    Prediction("e", "cuDNN, a new shape", 23, 37, READING),
    Prediction("e", "packing sequences / as it is, speed", 1.71, 1.71, PACKING),
    Prediction("e", "packing prompts / as it is, speed", 2.27, 2.27, PACKING),
    Prediction("e", "host waits a micro-batch", None, 1, READING),
    Prediction("f", "transformers, batches by default", 150, 150, READING),
)
