"""As many layers on GPUs as fit, the rest on the CPU: python devices.py MODEL [DEVICE]."""

import sys

import squall

model, device, *_ = [*sys.argv[1:], "auto"]  # or "cuda:0=16;cpu"
with squall.Model.open(model, device=device) as opened:
    print(opened.generate("Once upon a time", max_tokens=16, temperature=0).read())
