"""`squall` with a model that paints gradients in place of FLUX: python painter.py run FOLDER ..."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from squall.diffusion.model import ImageModel
from squall.diffusion.request import Picture, PictureRequest
from squall.errors import InvalidRequest
from squall.opening import Opening
from squall.quant import FormatTotal

SECONDS = {"a slow cat": 1.0, "stuck": 0.5}  # of a step


class Painter:
    """A pipeline."""

    steps, guidance, max_prompt = 4, 3.5, 32
    formats = (FormatTotal("q4_k", 2, 512, 288),)
    asked: list[PictureRequest]

    def __init__(self) -> None:
        self.asked = []

    def check(self, request: PictureRequest) -> None:
        if len(request.prompt) > self.max_prompt:
            raise InvalidRequest(f"the prompt has more than {self.max_prompt} tokens")

    def paint(self, request: PictureRequest, on_step: Callable[[int, int], None]) -> Picture:
        assert request.seed is not None
        self.asked.append(request)
        steps = request.steps or self.steps
        for step in range(steps + 1):
            on_step(step, steps)
            time.sleep(SECONDS.get(request.prompt, 0))
            if request.prompt == "stuck" and step:
                time.sleep(60)
        seed = request.seed % 256
        columns = np.arange(request.width) + seed
        pixels = np.zeros((request.height, request.width, 3), np.uint8)
        pixels[..., 0] = columns % 256
        return Picture(
            pixels, request.seed, steps, ("a note",) if "noted" in request.prompt else ()
        )

    def close(self) -> None:
        """Nothing."""


def write_model(folder: Path) -> Path:
    """What is known to be a model of pictures, and no more."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder


def opened(opening: Opening, **_: object) -> ImageModel:
    """In place of `ImageModel.open_with`."""
    return ImageModel(Painter(), path=Path(str(opening.path)))


def main() -> None:
    from squall import cli

    ImageModel.open_with = opened  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    main()
