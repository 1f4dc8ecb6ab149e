"""From a prompt to a picture: its text as rows, steps from noise to latents, and pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from squall import encoder, executors
from squall.checkpoints import Checkpoint
from squall.diffusion import noise, transformer, vae
from squall.diffusion.files import find, open_part
from squall.diffusion.parts import Network
from squall.diffusion.prompts import ClipTokens, T5Tokens
from squall.diffusion.request import MULTIPLE, Picture, PictureRequest, Pixels, fitted
from squall.diffusion.schedule import Schedule, first_step, sinusoid
from squall.errors import InvalidCheckpoint, InvalidRequest, OutOfMemory, UnsupportedModel
from squall.executors import Placement, ThreadPool, devices
from squall.executors.base import summed
from squall.files import read_json
from squall.opening import Opening
from squall.program import Program
from squall.quant import FormatTotal, Plan
from squall.recipes.encoders import load_clip, load_t5
from squall.recipes.flux import alone, load_flux
from squall.recipes.vae import load_vae
from squall.spec import AutoEncoder, Encoder, Flux
from squall.vision.sight import Kept
from squall.weights import Progress, WeightStore

Floats = NDArray[np.float32]
FLUX, T5, CLIP, VAE = "transformer", "T5", "CLIP", "autoencoder"
OFFLOADED = "flux-offloaded"
ARCHITECTURES = ("flux", OFFLOADED)
OPTIONS = frozenset((
    "path", "threads", "device", "exact", "isq", "topology", "dtype", "weights", "hub", "progress",
    "architecture", "t5", "clip", "vae", "command",
))  # fmt: skip
STEPS, GUIDED_STEPS, GUIDANCE = 4, 50, 4.0
PROMPT, GUIDED_PROMPT = 256, 512
# What T5 made of prompts is kept up to here.
KEPT_BYTES = 64 << 20
# Of the free memory, what is not planned with.
MARGIN = 0.05
_NO_SIZE = "no size would fit; quantize the model (isq), or open it as flux-offloaded"


@dataclass(frozen=True, slots=True)
class Specs:
    """What the networks are, and how prompts become their tokens."""

    t5: Encoder
    clip: Encoder
    flux: Flux
    vae: AutoEncoder
    t5_tokens: T5Tokens
    clip_tokens: ClipTokens

    def __post_init__(self) -> None:
        """Raises InvalidCheckpoint for parts of different models."""
        wanted = {
            "T5": (self.t5.hidden, self.flux.text),
            "CLIP": (self.clip.hidden, self.flux.pooled),
            "autoencoder": (4 * self.vae.latent, self.flux.patch),
        }
        for name, (width, asked) in wanted.items():
            if width != asked:
                raise InvalidCheckpoint(
                    f"the {name} gives rows of {width} values, the transformer reads {asked}; "
                    "they are of different models"
                )

    @property
    def scale(self) -> int:
        """Pixels to a latent, in height and width."""
        return 1 << len(self.vae.widths) - 1


class FluxPipeline:
    """Makes pictures with FLUX.1.

    steps, guidance: the defaults; without guidance it takes none. max_prompt: in tokens.
    parts: what every picture takes. encoder: for pictures to begin with.
    free_bytes: what the device has left, if that is known.
    """

    def __init__(
        self, specs: Specs, parts: Mapping[str, Network], encoder: Network, schedule: Schedule,
        free_bytes: Callable[[], int | None],
    ) -> None:  # fmt: skip
        guided = specs.flux.guidance
        self.steps = GUIDED_STEPS if guided else STEPS
        self.guidance = GUIDANCE if guided else None
        self.max_prompt = GUIDED_PROMPT if guided else PROMPT
        self.parts, self._encoder = parts, encoder
        self._specs, self._schedule, self._texts = specs, schedule, Kept(KEPT_BYTES)
        self._free_bytes, self._budget = free_bytes, free_bytes()

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        """What the matrices of all parts are in memory."""
        return summed(total for part in self.parts.values() for total in part.formats)

    def close(self) -> None:
        """Free all weights."""
        for part in self.parts.values():
            part.free()

    def load(self, progress: Progress | None) -> None:
        """Keep weights in memory: the transformer's, and with room for a picture the others'."""
        flux, kept, free = self.parts[FLUX], list(self.parts.values()), self._free_bytes()
        if free is not None:
            free = int(free * (1 - MARGIN))
            if flux.weight_bytes > free:
                raise OutOfMemory(
                    f"the transformer takes {_gib(flux.weight_bytes)}, and {_gib(free)} are free; "
                    "quantize it (isq), or open it as flux-offloaded"
                )
            runs = self.needs(PictureRequest(prompt="any"), loaded=True)
            if sum(part.weight_bytes for part in kept) + runs > free:
                kept = [flux]
        done, whole = 0, sum(part.stored_bytes for part in kept)
        for part in kept:
            part.load(None if progress is None else partial(_told, progress, done, whole))
            done += part.stored_bytes
        self._budget = self._free_bytes()

    # ---- what can be made ----

    def check(self, request: PictureRequest) -> None:
        """Raises InvalidRequest for what cannot be made, and OutOfMemory for what does not fit."""
        least = 2 * self._specs.scale
        if request.width % least or request.height % least:
            raise InvalidRequest(f"this model makes pictures of multiples of {least} pixels")
        if (image := request.image) is not None:
            shape = image.shape if isinstance(image, np.ndarray) else ()
            if len(shape) != 3 or shape[2] != 3 or not all(shape) or image.dtype != np.uint8:
                raise InvalidRequest("image must be uint8 [height, width, 3]")
        self._text_ids(request.prompt)
        self._check_memory(request, self._budget)

    def _check_memory(self, request: PictureRequest, free: int | None) -> None:
        if free is None or self.needs(request) <= free * (1 - MARGIN):
            return
        edges = request.width // MULTIPLE, request.height // MULTIPLE
        sizes = ([edge * n // 16 * MULTIPLE for edge in edges] for n in range(15, 0, -1))
        smaller = (replace(request, width=w, height=h) for w, h in sizes if w and h)
        fits = (one for one in smaller if self.needs(one) <= free * (1 - MARGIN))
        found = next((f"{one.width}x{one.height} would fit" for one in fits), _NO_SIZE)
        raise OutOfMemory(
            f"a picture of {request.width}x{request.height} needs {_gib(self.needs(request))}, and "
            f"{_gib(free)} are free; {found}"
        )

    def needs(self, request: PictureRequest, *, loaded: bool = False) -> int:
        """About how much more memory the hungriest of its phases takes. loaded: if all were so."""
        lines, columns = self._size(request)
        places, text, vae = lines * columns, self.max_prompt, self._specs.vae
        rows = {"picture": places // 4, "text": text, "all": places // 4 + text, "one": 1}
        rows |= {f"s{i}": places << 2 * i for i in range(len(vae.widths))}
        rows["tokens"] = max(text, self._specs.clip.positions)
        used = [*self.parts.values(), *([] if request.image is None else [self._encoder])]
        return max(part.needs(rows, loaded=loaded) for part in used)

    def _size(self, request: PictureRequest) -> tuple[int, int]:
        """Lines and columns of latents."""
        return request.height // self._specs.scale, request.width // self._specs.scale

    # ---- making it ----

    def paint(self, request: PictureRequest, on_step: Callable[[int, int], None]) -> Picture:
        """Make it. on_step: called often, with steps done and in all; what it raises ends it.

        Steps are -1 while the text is read.
        """
        steps, first = request.steps or self.steps, 0
        if request.image is not None:
            first = first_step(steps, request.strength)

        def tell(step: int = -1) -> None:
            on_step(step, steps - first)

        self._check_memory(request, self._free_bytes())
        states = self._states(request.prompt, tell)
        pooled, notes = self._pooled(request.prompt, tell)
        lines, columns = self._size(request)
        sigmas = self._schedule.sigmas(steps, lines * columns // 4)[first:]
        latents = noise.packed(request.seed or 0, self._specs.vae.latent, lines, columns)
        if request.image is not None:
            shown, share = self._encode(request, request.image, tell), np.float32(sigmas[0])
            latents = share * latents + (1 - share) * shown
        guidance = self.guidance if request.guidance is None else request.guidance
        given: dict[str, NDArray[Any]] = {"text": states, "pooled": pooled, "picture": latents}
        given |= {} if guidance is None else {"guidance": sinusoid(guidance)}
        given |= transformer.inputs(len(states), lines // 2, columns // 2)
        self._step(given, sigmas, tell)
        pixels = self._decode(request, latents, partial(tell, steps - first))
        return Picture(pixels, request.seed or 0, steps, notes)

    def _step(
        self, given: Mapping[str, NDArray[Any]], sigmas: Sequence[float],
        tell: Callable[[int], None],
    ) -> None:  # fmt: skip
        """All steps, each of which changes the latents."""
        latents, step = given["picture"], 0
        first = {**given, "time": sinusoid(sigmas[0])}
        with self.parts[FLUX].opened(first, lambda: tell(step)) as run:
            for step, (t, following) in enumerate(pairwise(sigmas)):
                tell(step)
                velocity = run({**given, "time": sinusoid(t)})["velocity"]
                latents += np.float32(following - t) * velocity
                _check_finite(latents, f"step {step + 1} of {len(sigmas) - 1}")

    def _text_ids(self, prompt: str) -> list[int]:
        tokens = self._specs.t5_tokens
        return tokens.pad(tokens.encode(prompt), self.max_prompt)

    def _states(self, prompt: str, tell: Callable[[], None]) -> Floats:
        """The text, a row for each token of T5."""
        inputs = encoder.inputs(self._specs.t5, self._text_ids(prompt), causal=False)
        run = partial(self.parts[T5].run, inputs, tell)
        return self._texts.get(inputs["tokens"].tobytes(), run)

    def _pooled(self, prompt: str, tell: Callable[[], None]) -> tuple[Floats, tuple[str, ...]]:
        """The text as one row of CLIP's, and whether it did not read all."""
        tokens, spec = self._specs.clip_tokens, self._specs.clip
        whole = tokens.encode(prompt)
        ids = tokens.pad(whole, spec.positions)
        states = self.parts[CLIP].run(encoder.inputs(spec, ids, causal=True), tell)
        row = tokens.pooled_row(ids)
        note = f"CLIP read {len(ids)} of the prompt's {len(whole)} tokens; T5 read all of them"
        return states[row : row + 1], (note,) if len(whole) > len(ids) else ()

    def _encode(self, request: PictureRequest, image: Pixels, tell: Callable[[], None]) -> Floats:
        """A picture as packed latents: as large as needed, and its middle."""
        spec = self._specs.vae
        shown = fitted(Image.fromarray(image), request.width, request.height)
        pixels = shown.astype(np.float32).reshape(-1, 3) / np.float32(127.5) - 1
        lines, columns = self._size(request)
        inputs = {vae.PIXELS: pixels, **vae.encoder_inputs(spec, lines, columns)}
        means = self._encoder.run(inputs, tell)[:, : spec.latent]
        latents = (means - np.float32(spec.shift)) * np.float32(spec.scale)
        return noise.pack(latents.reshape(lines, columns, -1))

    def _decode(self, request: PictureRequest, latents: Floats, tell: Callable[[], None]) -> Pixels:
        spec, (lines, columns) = self._specs.vae, self._size(request)
        places = noise.unpack(latents, lines, columns)
        places = places / np.float32(spec.scale) + np.float32(spec.shift)
        inputs = {vae.LATENTS: places, **vae.decoder_inputs(spec, lines, columns)}
        pixels = self.parts[VAE].run(inputs, tell)
        _check_finite(pixels, "its pixels")
        levels: Pixels = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
        return levels.reshape(request.height, request.width, 3)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _told(progress: Progress, before: int, whole: int, done: int, _: int) -> None:
    progress(before + done, whole)


def _check_finite(values: Floats, where: str) -> None:
    if not np.isfinite(values).all():
        raise InvalidCheckpoint(
            f"the picture became no number at {where}: the weights are damaged, or lost too much "
            "when they were quantized"
        )


# ---- opening ----


def open_pipeline(
    opening: Opening, pool: ThreadPool | None = None, *, loads: bool = True
) -> tuple[FluxPipeline, Path]:
    """What an opening describes, and where it is. Its weights are loaded as far as they fit.

    loads: False: none is, and only headers are read.
    """
    by_layer, plan = _plan(opening)
    placement, pool = _placement(opening), pool or executors.thread_pool(opening.threads)
    free_bytes = partial(devices.free_bytes, placement.stages[0].device)
    files = find(opening)
    t5, clip, coder = map(open_part, (files.t5, files.clip, files.vae))
    flux = alone(open_part(files.transformer))
    t5_part, clip_part = load_t5(t5), load_clip(clip)
    flux_part, vae_part = load_flux(flux), load_vae(coder)

    def network(
        program: Program, checkpoint: Checkpoint, plan: Plan | None = None, *, cut: bool = False
    ) -> Network:
        store = WeightStore(checkpoint, plan=plan, exact=opening.weights == "f32")
        return Network(program, store, placement, pool, by_layer=cut)

    specs = Specs(
        cast(Encoder, t5_part.spec), cast(Encoder, clip_part.spec), cast(Flux, flux_part.spec),
        cast(AutoEncoder, vae_part.spec), _t5_tokens(files.t5_tokens, t5),
        ClipTokens.open(files.clip_tokens),
    )  # fmt: skip
    plan.topology.check(specs.flux.double + specs.flux.single)
    parts = {
        FLUX: network(transformer.compile(specs.flux, flux_part.names), flux, plan, cut=by_layer),
        T5: network(encoder.compile(specs.t5, t5_part.names), t5, plan, cut=by_layer),
        CLIP: network(encoder.compile(specs.clip, clip_part.names), clip),
        VAE: network(vae.compile_decoder(specs.vae, vae_part.names), coder),
    }
    shown = network(vae.compile_encoder(specs.vae, vae_part.names), coder)
    config = read_json(files.scheduler)
    schedule = Schedule(specs.flux.guidance) if config is None else Schedule.of_config(config)
    pipeline = FluxPipeline(specs, parts, shown, schedule, free_bytes)
    if loads and not by_layer:
        pipeline.load(opening.progress)
    return pipeline, files.path


def _plan(opening: Opening) -> tuple[bool, Plan]:
    """Whether layers are read when they run, and what becomes of the weights."""
    opening.check_only(OPTIONS, "models that make pictures")
    if opening.architecture not in (None, *ARCHITECTURES):
        raise UnsupportedModel(
            f"unknown architecture {opening.architecture!r} of models that make pictures; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    plan = Plan.of(opening.isq, opening.topology, dtype=opening.dtype)
    by_layer = opening.architecture == OFFLOADED
    if by_layer and plan.quantizes:
        raise InvalidRequest(
            "flux-offloaded reads its weights anew at every step, and would quantize them each "
            "time; do it once: squall quantize MODEL --isq Q4K -o FOLDER, and open that"
        )
    if any(found.device for found in plan.topology.ranges):
        raise InvalidRequest("layers of models that make pictures have no devices of their own")
    return by_layer, plan


def _placement(opening: Opening) -> Placement:
    stage = devices.one_stage(opening.device, "models that make pictures")
    return Placement(stage, opening.exact, opening.dtype)


def _t5_tokens(path: Path, t5: Checkpoint) -> T5Tokens:
    return T5Tokens.from_gguf(t5.metadata) if path.suffix == ".gguf" else T5Tokens.open(path)
