"""A picture in mistral.rs's words: python image_runner.py FLUX [PROMPT]."""

import sys

from squall import DiffusionArchitecture, ImageGenerationResponseFormat, Runner, Which

model, prompt, *_ = [*sys.argv[1:], "A vibrant sunset in the mountains, 4k, high quality."]

which = Which.DiffusionPlain(model, DiffusionArchitecture.FluxOffloaded)
with Runner(which, image_folder="images") as runner:
    response = runner.generate_image(
        prompt, ImageGenerationResponseFormat.Url, height=256, width=256
    )
    print(response.data[0].url)
