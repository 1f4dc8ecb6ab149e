"""From a prompt to a picture: its text as rows, steps from noise to latents, and pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from squall import executors
from squall.checkpoints import Checkpoint
from squall.diffusion import encoders, noise, transformer, vae
from squall.diffusion.files import find, open_part
from squall.diffusion.parts import Inputs, Network, Room, Rows
from squall.diffusion.prompts import ClipTokens, T5Tokens
from squall.diffusion.request import MULTIPLE, Picture, PictureRequest, Pixels
from squall.diffusion.schedule import Schedule, first_step, sinusoid
from squall.errors import InvalidCheckpoint, InvalidRequest, OutOfMemory, UnsupportedModel
from squall.executors import Placement, ThreadPool, devices
from squall.executors.base import summed
from squall.files import read_json
from squall.opening import Opening
from squall.program import Program
from squall.quant import FormatTotal, Plan, Topology
from squall.recipes.encoders import load_clip, load_t5
from squall.recipes.flux import load_flux
from squall.recipes.vae import load_vae
from squall.spec import AutoEncoder, Encoder, Flux
from squall.vision.sight import Kept
from squall.weights import Progress, WeightStore

Floats = NDArray[np.float32]
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


@dataclass(frozen=True, slots=True)
class Networks:
    """What a pipeline runs; the encoder is for pictures to begin with."""

    t5: Network
    clip: Network
    flux: Network
    decoder: Network
    encoder: Network

    @property
    def small(self) -> tuple[Network, ...]:
        """All but the transformer, each of which runs once for a picture."""
        return self.t5, self.clip, self.decoder, self.encoder


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

    free_bytes: what the device has left, if that is known.
    """

    def __init__(
        self,
        specs: Specs,
        networks: Networks,
        schedule: Schedule,
        free_bytes: Callable[[], int | None],
    ) -> None:
        guided = specs.flux.guidance
        self.steps = GUIDED_STEPS if guided else STEPS
        self.guidance = GUIDANCE if guided else None
        self.max_prompt = GUIDED_PROMPT if guided else PROMPT
        self._specs, self._networks, self._schedule = specs, networks, schedule
        self._free_bytes, self._budget = free_bytes, free_bytes()
        self._texts = Kept(KEPT_BYTES)

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        """What the matrices of all parts are in memory."""
        parts = self._networks
        return summed(total for part in (parts.flux, *parts.small) for total in part.formats)

    @property
    def parts(self) -> Mapping[str, Network]:
        """What every picture takes, by name."""
        n = self._networks
        return {"transformer": n.flux, "T5": n.t5, "CLIP": n.clip, "autoencoder": n.decoder}

    def close(self) -> None:
        """Free all weights."""
        for network in (self._networks.flux, *self._networks.small):
            network.free()

    def load(self, progress: Progress | None) -> None:
        """Keep weights in memory: the transformer's, and with room for a picture the others'."""
        networks, free = self._networks, self._free_bytes()
        kept = [networks.flux, networks.t5, networks.clip, networks.decoder]
        if free is not None:
            free = int(free * (1 - MARGIN))
            if networks.flux.weight_bytes > free:
                raise OutOfMemory(
                    f"the transformer takes {networks.flux.weight_bytes / 2**30:.1f} GiB, and "
                    f"{free / 2**30:.1f} GiB are free; quantize it (isq), or open it as "
                    "flux-offloaded"
                )
            rows = self._rows(PictureRequest(prompt="any"))
            runs = max(network.needs(rows[network]) - network.weight_bytes for network in kept)
            if sum(network.weight_bytes for network in kept) + runs > free:
                kept = [networks.flux]
        done, whole = 0, sum(network.stored_bytes for network in kept)
        for network in kept:
            network.load(None if progress is None else partial(_told, progress, done, whole))
            done += network.stored_bytes
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
        if free is None or (needed := self.needs(request)) <= free * (1 - MARGIN):
            return
        size, smaller = f"{request.width}x{request.height}", request
        while min(smaller.width, smaller.height) > MULTIPLE:
            width, height = (
                max(edge * 7 // 8 // MULTIPLE, 1) * MULTIPLE
                for edge in (smaller.width, smaller.height)
            )
            smaller = replace(smaller, width=width, height=height)
            if self.needs(smaller) <= free * (1 - MARGIN):
                remedy = f"{smaller.width}x{smaller.height} would fit"
                break
        else:
            remedy = "no size would fit; quantize the model (isq), or open it as flux-offloaded"
        raise OutOfMemory(
            f"a picture of {size} needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            f"free; {remedy}"
        )

    def needs(self, request: PictureRequest) -> int:
        """About how much more memory the hungriest of its phases takes."""
        networks, rows = self._networks, self._rows(request)
        used = [networks.t5, networks.clip, networks.flux, networks.decoder]
        used += [networks.encoder] if request.image is not None else []
        return max(network.needs(rows[network]) for network in used)

    def _rows(self, request: PictureRequest) -> Mapping[Network, Rows]:
        """How many rows each network has of its spaces."""
        networks, specs = self._networks, self._specs
        lines, columns = self._size(request)
        picture, text = lines * columns // 4, self.max_prompt
        spaces = {f"s{i}": lines * columns << 2 * i for i in range(len(specs.vae.widths))}
        return {
            networks.t5: {"tokens": text},
            networks.clip: {"tokens": specs.clip.positions},
            networks.flux: {"picture": picture, "text": text, "all": picture + text, "one": 1},
            networks.decoder: spaces,
            networks.encoder: spaces,
        }

    def _size(self, request: PictureRequest) -> tuple[int, int]:
        """Lines and columns of latents."""
        return request.height // self._specs.scale, request.width // self._specs.scale

    # ---- making it ----

    def paint(self, request: PictureRequest, on_step: Callable[[int, int], None]) -> Picture:
        """Make it. on_step: called with -1 while the text is read, then with steps done."""
        steps, first = request.steps or self.steps, 0
        if request.image is not None:
            first = first_step(steps, request.strength)

        def tell(step: int = -1) -> None:
            on_step(step, steps - first)

        tell()
        self._check_memory(request, self._free_bytes())
        states = self._states(request, tell)
        pooled, notes = self._pooled(request, tell)
        lines, columns = self._size(request)
        sigmas = self._schedule.sigmas(steps, lines * columns // 4)[first:]
        latents = noise.packed(request.seed or 0, self._specs.vae.latent, lines, columns)
        if request.image is not None:
            shown, share = self._encode(request, request.image, tell), np.float32(sigmas[0])
            latents = share * latents + (1 - share) * shown
        guidance = self.guidance if request.guidance is None else request.guidance
        given: dict[str, NDArray[Any]] = {"text": states, "pooled": pooled, "picture": latents}
        given |= {} if guidance is None else {"guidance": sinusoid(guidance)}
        given |= transformer.inputs(self._specs.flux, len(states), lines // 2, columns // 2)
        self._step(request, given, sigmas, tell)
        pixels = self._decode(request, latents, partial(tell, steps - first))
        return Picture(pixels, request.seed or 0, steps, notes)

    def _step(
        self,
        request: PictureRequest,
        given: Mapping[str, NDArray[Any]],
        sigmas: Sequence[float],
        tell: Callable[[int], None],
    ) -> None:
        """All steps, each of which changes the latents."""
        network, latents, step = self._networks.flux, given["picture"], 0
        with network.opened(self._rows(request)[network], lambda: tell(step)) as run:
            for step, (t, following) in enumerate(pairwise(sigmas)):
                tell(step)
                velocity = run({**given, "time": sinusoid(t)})["velocity"]
                latents += np.float32(following - t) * velocity
                _check_finite(latents, f"step {step + 1} of {len(sigmas) - 1}")

    def _run(
        self, network: Network, request: PictureRequest, inputs: Inputs, tell: Callable[[], None]
    ) -> Floats:
        """The only output of a network that runs once."""
        tell()
        with network.opened(self._rows(request)[network], tell) as run:
            (found,) = run(inputs).values()
        return found

    def _text_ids(self, prompt: str) -> list[int]:
        tokens = self._specs.t5_tokens
        return tokens.pad(tokens.encode(prompt), self.max_prompt)

    def _states(self, request: PictureRequest, tell: Callable[[], None]) -> Floats:
        """The text, a row for each token of T5."""
        ids, spec = self._text_ids(request.prompt), self._specs.t5
        inputs = encoders.inputs(spec, ids, causal=False)
        run = partial(self._run, self._networks.t5, request, inputs, tell)
        return self._texts.get(inputs["tokens"].tobytes(), run)

    def _pooled(
        self, request: PictureRequest, tell: Callable[[], None]
    ) -> tuple[Floats, tuple[str, ...]]:
        """The text as one row of CLIP's, and whether it did not read all."""
        tokens, spec = self._specs.clip_tokens, self._specs.clip
        whole = tokens.encode(request.prompt)
        ids = tokens.pad(whole, spec.positions)
        inputs = encoders.inputs(spec, ids, causal=True)
        states = self._run(self._networks.clip, request, inputs, tell)
        row = tokens.pooled_row(ids)
        note = f"CLIP read {len(ids)} of the prompt's {len(whole)} tokens; T5 read all of them"
        return states[row : row + 1], (note,) if len(whole) > len(ids) else ()

    def _encode(self, request: PictureRequest, image: Pixels, tell: Callable[[], None]) -> Floats:
        """A picture as packed latents: as large as needed, and its middle."""
        size, spec = (request.width, request.height), self._specs.vae
        fitted = ImageOps.fit(Image.fromarray(image), size, Image.Resampling.LANCZOS)
        pixels = np.asarray(fitted, np.float32).reshape(-1, 3) / np.float32(127.5) - 1
        lines, columns = self._size(request)
        inputs = {vae.PIXELS: pixels, **vae.encoder_inputs(spec, lines, columns)}
        moments = self._run(self._networks.encoder, request, inputs, tell)
        latents = (moments[:, : spec.latent] - np.float32(spec.shift)) * np.float32(spec.scale)
        return noise.pack(latents.reshape(lines, columns, -1))

    def _decode(self, request: PictureRequest, latents: Floats, tell: Callable[[], None]) -> Pixels:
        spec, (lines, columns) = self._specs.vae, self._size(request)
        places = noise.unpack(latents, lines, columns)
        places = places / np.float32(spec.scale) + np.float32(spec.shift)
        inputs = {vae.LATENTS: places, **vae.decoder_inputs(spec, lines, columns)}
        pixels = self._run(self._networks.decoder, request, inputs, tell)
        _check_finite(pixels, "its pixels")
        levels: Pixels = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
        return levels.reshape(request.height, request.width, 3)


def _told(progress: Progress, before: int, whole: int, done: int, _: int) -> None:
    progress(before + done, whole)


def _check_finite(values: Floats, where: str) -> None:
    if not np.isfinite(values).all():
        raise InvalidCheckpoint(
            f"the picture became no number at {where}: the weights are damaged, or lost too much "
            "when they were quantized"
        )


# ---- opening ----


def open_pipeline(opening: Opening, pool: ThreadPool | None) -> tuple[FluxPipeline, Path]:
    """What an opening describes, and where it is. Its weights are loaded as far as they fit."""
    by_layer, plan = _plan(opening)
    room = Room(_placement(opening), pool or executors.thread_pool(opening.threads))
    free_bytes = partial(devices.free_bytes, room.placement.stages[0].device)
    files = find(opening)
    t5, clip, flux, coder = map(open_part, (files.t5, files.clip, files.transformer, files.vae))
    t5_part, clip_part = load_t5(t5), load_clip(clip)
    flux_part, vae_part = load_flux(flux), load_vae(coder)

    def network(
        program: Program, checkpoint: Checkpoint, plan: Plan | None = None, *, cut: bool = False
    ) -> Network:
        store = WeightStore(checkpoint, plan=plan, exact=opening.weights == "f32")
        return Network(program, store, room, by_layer=cut)

    specs = Specs(
        cast(Encoder, t5_part.spec), cast(Encoder, clip_part.spec), cast(Flux, flux_part.spec),
        cast(AutoEncoder, vae_part.spec), _t5_tokens(files.t5_tokens, t5),
        ClipTokens.open(files.clip_tokens),
    )  # fmt: skip
    plan.topology.check(specs.flux.double + specs.flux.single)
    networks = Networks(
        network(encoders.compile(specs.t5, t5_part.names), t5, plan, cut=by_layer),
        network(encoders.compile(specs.clip, clip_part.names), clip),
        network(transformer.compile(specs.flux, flux_part.names), flux, plan, cut=by_layer),
        network(vae.compile_decoder(specs.vae, vae_part.names), coder),
        network(vae.compile_encoder(specs.vae, vae_part.names), coder),
    )
    config = read_json(files.scheduler)
    schedule = Schedule(specs.flux.guidance) if config is None else Schedule.of_config(config)
    pipeline = FluxPipeline(specs, networks, schedule, free_bytes)
    if not by_layer:
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
    topology = opening.topology
    if isinstance(topology, str | os.PathLike):
        topology = Topology.from_file(Path(topology))
    plan = Plan.of(opening.isq, topology, dtype=opening.dtype)
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
    device = opening.device
    if device == devices.AUTO:
        device = next(iter(devices.gpus()), "cpu")
    stages = devices.stages_of(device)
    if len(stages) > 1:
        raise InvalidRequest(f"device is {device!r}; models that make pictures run on one")
    devices.check(stages[0].device)
    return Placement(stages, opening.exact, opening.dtype)


def _t5_tokens(path: Path, t5: Checkpoint) -> T5Tokens:
    return T5Tokens.from_gguf(t5.metadata) if path.suffix == ".gguf" else T5Tokens.open(path)
