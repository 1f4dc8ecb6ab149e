"""A picture of a text, and another one of that: python pictures.py FLUX [PROMPT]."""

import sys

import squall


def told(done: int, whole: int) -> None:
    print(f"step {done} of {whole}", file=sys.stderr)


model, prompt, *_ = [*sys.argv[1:], "A lighthouse at dawn."]

with squall.ImageModel.open(model) as painter:
    (picture,) = painter.generate(prompt, width=256, height=256, seed=1, progress=told)
    picture.save("picture.png")
    request = squall.PictureRequest(
        prompt=f"{prompt} In oil.", width=256, height=256, image=picture.pixels, strength=0.7
    )
    painting = painter.submit(request)  # painting.cancel() would end it
    painting.result().save("other.png")
    print(f"picture.png of seed {picture.seed}, other.png of seed {painting.request.seed}")
