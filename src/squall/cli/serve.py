"""`squall serve` and `squall-server`: the HTTP server, or with -i a chat."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from squall.checkpoints.hub import name_of
from squall.cli.flags import command
from squall.cli.opening import PictureFlags, check_one, torchrun
from squall.cli.options import ChatTemplate, ContextSize, DraftModel, option
from squall.cli.selectors import Selected
from squall.cli.toml_selector import TomlSelection
from squall.errors import InvalidRequest
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.cli.several import Entry
    from squall.diffusion.model import ImageModel
    from squall.mcp import McpTools
    from squall.model import Model
    from squall.server.options import ServerOptions
    from squall.server.residence import Lazy

# mistral.rs chats like this.
CHAT: dict[str, Any] = {
    "max_tokens": 4096, "temperature": 0.1, "top_k": 32, "top_p": 0.1, "min_p": 0.05,
    "frequency_penalty": 0.1, "presence_penalty": 0.1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServeFlags(PictureFlags):
    """The flags of both commands."""

    serve_ip: str = option(
        "127.0.0.1",
        "--serve-ip",
        "--host",
        help="The address to listen on; 0.0.0.0: all of this machine's.",
    )
    port: int = option(8080, "-p", "--port", min=0, max=65535, help="0: any that is free.")
    api_key: list[str] | None = option(
        None, envvar="SQUALL_API_KEY", help="Ask for this key; several: each has its own cache."
    )
    admin_key: str | None = option(
        None, envvar="SQUALL_ADMIN_KEY",
        help="Ask for this key where models are loaded, changed or removed.",
    )  # fmt: skip
    cors: list[str] | None = option(
        None, metavar="ORIGIN", help="Web pages from here may use the server; *: all."
    )
    allow_host: list[str] | None = option(
        None, metavar="NAME", help="A name, beside the address, the server may go by."
    )
    allow_media_url: list[str] | None = option(
        None, metavar="HOST", help="Images may be loaded from here; .HOST: below it; *: all."
    )
    allow_media_path: Path | None = option(
        None, metavar="FOLDER", help="Or may be files within this one."
    )
    served_model_name: str | None = option(
        None, help="The model's name for clients; by default its file's."
    )
    strict_fields: bool = option(
        False, "--strict-fields", help="Unknown fields are errors, not ignored."
    )
    max_seqs: int = option(16, min=1, help="Answers computed at a time.")
    max_queue: int = option(256, min=0, help="Requests that wait beside those.")
    queue_timeout: float | None = option(
        None, metavar="SECONDS", min=0, help="Refuse what waits longer; by default never."
    )
    adapter_folder: list[Path] | None = option(
        None, metavar="FOLDER", help="Clients may load adapters from here, and remove some."
    )
    allow_pull: bool = option(
        False, "--allow-pull", help="Clients may download models by name, and remove those."
    )
    image_model: str | None = option(
        None, metavar="DIR_OR_ID", help="A model that makes pictures, beside one of text."
    )
    models: Path | None = option(
        None, "--models", metavar="FILE", help="A TOML file of several models, with their options."
    )
    keep_alive: str = option(
        "5m", metavar="TIME", help="Of several models, unload those unused for so long; -1: never."
    )
    memory_limit: int | None = option(
        None, metavar="MIB", min=1, help="And what they may take together; by default all there is."
    )
    preload: bool = option(
        False, "--preload", help="And load them at the start, not when they are asked for."
    )
    image_folder: Path | None = option(
        None, help="Where the pictures lie that clients get as URLs; by default a new folder."
    )
    image_age: float = option(3600.0, metavar="SECONDS", min=1, help="Remove them after so long.")
    image_memory: int = option(
        256, min=0, help="MiB for what was made of images lately, so that it is kept."
    )
    mcp: Path | None = option(
        None, metavar="FILE", help="MCP servers, whose tools this server runs for chats."
    )
    mcp_allow: list[str] | None = option(
        None, metavar="SERVER.TOOL", help="A tool of these that may be run; SERVER.*: all."
    )
    adapter_memory: int | None = option(
        None, min=1, help="MiB for adapters; the unused longest make room."
    )
    draft: DraftModel = None
    context: ContextSize = None
    kv_tokens: int | None = option(
        None,
        "--kv-tokens",
        "--pa-ctxt-len",
        min=1,
        help="Tokens of all answers together in the KV cache; by default 2048 for each.",
    )
    kv_memory: int | None = option(
        None, "--kv-memory", "--pa-gpu-mem", min=1, help="Or its size in MiB."
    )
    kv_fraction: float | None = option(
        None,
        "--kv-fraction",
        "--pa-gpu-mem-usage",
        min=0,
        max=1,
        help="Or as a part of the memory that the weights leave free; counts first.",
    )
    kv_block: int = option(16, "--kv-block", "--pa-blk-size", help="Tokens a block: 16, 32, ...")
    no_kv_cache: bool = option(
        False, "--no-kv-cache", help="Compute every token anew in every step."
    )
    prefix_cache_n: int = option(
        16, min=0, help="Keep prefixes, as much as so many contexts; 0: none."
    )
    prompt_batchsize: int | None = option(None, min=1, help="At most so many prompt tokens a step.")
    truncate_sequence: bool = option(
        False, "-t", "--truncate-sequence", help="Cut prompts that are too long, at the beginning."
    )
    chat_template: ChatTemplate = None
    seed: int | None = option(None, "-s", "--seed", min=0, help="For requests that give none.")
    no_ui: bool = option(False, "--no-ui", help="No web page at /ui.")
    log: Path | None = option(None, "-l", "--log", help="Append requests and responses to a file.")
    throughput: bool = option(False, "--throughput", help="Tokens a second in the access log.")
    drain_timeout: float = option(
        30.0, min=0, help="Seconds for running answers after SIGTERM or Ctrl-C."
    )
    stall_timeout: float = option(
        300.0, min=1, help="Seconds without a step after which the engine is dead."
    )
    interactive_mode: bool = option(
        False, "-i", "--interactive-mode", help="A chat here instead of a server."
    )
    no_paged_attn: bool = option(
        False, "--no-paged-attn", help="Accepted; the KV cache is always paged."
    )

    @property
    def adapts_all(self) -> bool:
        """See `ModelFlags`."""
        return self.interactive_mode

    def served(self, selected: Selected) -> Model:
        """The model, with an engine for many requests."""
        return self.open(selected, self._engine(selected))

    def described(self, selected: Selected) -> Opening:
        """How `served` opens it."""
        return self.opening(selected, self._engine(selected))

    def _engine(self, selected: Selected) -> Opening:
        from squall.engine.engine import EngineConfig
        from squall.engine.memory import KvSize

        in_file = isinstance(selected, TomlSelection) and selected.no_kv_cache
        names = ("max_seqs", "max_queue", "prompt_batchsize", "prefix_cache_n")
        given = {name: getattr(self, name) for name in names}
        no_kv_cache = self.no_kv_cache or in_file
        config = EngineConfig(queue_timeout_s=self.queue_timeout, no_kv_cache=no_kv_cache, **given)
        kv = KvSize(
            fraction=self.kv_fraction,
            tokens=self.kv_tokens,
            bytes=None if self.kv_memory is None else self.kv_memory << 20,
            block_size=self.kv_block,
        )
        memory = None if self.adapter_memory is None else self.adapter_memory << 20
        images = self.image_memory << 20
        return Opening(kv=kv, engine=config, adapter_bytes=memory, image_bytes=images)

    def options(self) -> ServerOptions:
        """What the server allows."""
        from squall.cli.several import Store
        from squall.server.options import LOOPBACK, ServerOptions, keep_alive_s
        from squall.vision.images import Media

        local = self.serve_ip in LOOPBACK
        hosts = {*LOOPBACK, *(self.allow_host or ())} if local or self.allow_host else None
        return ServerOptions(
            model_id=self.served_model_name,
            strict_fields=self.strict_fields,
            adapter_folders=tuple(self.adapter_folder or ()),
            api_keys=tuple(self.api_key or ()),
            admin_key=self.admin_key,
            origins=tuple(self.cors or ()),
            hosts=None if hosts is None else frozenset(hosts),
            media=Media(hosts=tuple(self.allow_media_url or ()), folder=self.allow_media_path),
            memory_bytes=None if self.memory_limit is None else self.memory_limit << 20,
            truncate=self.truncate_sequence,
            seed=self.seed,
            log=self.log,
            ui=not self.no_ui,
            throughput=self.throughput,
            keep_alive_s=keep_alive_s(),
            drain_s=self.drain_timeout,
            stall_s=self.stall_timeout,
            store=Store(self) if self.allow_pull else None,
            image_folder=self.image_folder,
            image_age_s=self.image_age,
        )


def serve(flags: ServeFlags, selected: Selected | tuple[str, ...]) -> None:
    """Serve models over HTTP, in the shape of OpenAI's API.

    One is loaded at the start; several are loaded when they are asked for.

    squall serve

    squall serve model.gguf --port 8000 --api-key SECRET

    squall serve plain -m FOLDER --isq Q4K

    squall serve FOLDER --image-model FLUX

    squall serve chat.gguf code.gguf --keep-alive 10m

    squall serve --models models.toml

    squall-server --port 1234 gguf -m FOLDER -f model.gguf
    """
    if (entries := _entries(flags, selected)) is not None:
        _serve(flags, None, entries)
        return
    assert not isinstance(selected, tuple)
    pictures = flags.makes_pictures(selected)
    if pictures and flags.image_model is not None:
        raise InvalidRequest("--image-model goes beside a model of text; this one makes pictures")
    flags.check_kind(text=not pictures, pictures=pictures or flags.image_model is not None)
    if flags.interactive_mode:
        _chat(flags, selected)
    else:
        _serve(flags, selected, None)


def _entries(flags: ServeFlags, selected: Selected | tuple[str, ...]) -> list[Entry] | None:
    """What is opened when it is asked for; None for a model of text or pictures that is alone."""
    from squall.cli.several import Entry, embeds, read

    alone = selected or flags.file or flags.model
    if flags.models is not None:
        if alone is not None:
            raise InvalidRequest("--models names the models; put the others into its file")
        entries = read(flags.models)
    elif isinstance(selected, tuple):
        check_one(flags.file, flags.model, selected)
        entries = [Entry(word) for word in selected]
    elif isinstance(alone, str) and embeds(alone):
        entries = [Entry(alone, flags.served_model_name, "embeddings", pinned=True)]
    else:
        return None
    if flags.image_model is not None:
        entries.append(Entry(flags.image_model, kind="pictures"))
    for name, wrong in {
        "-i": flags.interactive_mode, "--tensor-parallel": flags.tensor_parallel,
        "--served-model-name": flags.served_model_name and len(entries) > 1,
    }.items():  # fmt: skip
        if wrong:
            raise InvalidRequest(f"{name} is for one model of text; leave it out")
    return entries


app = command("serve", ServeFlags, serve, several=True)
server = command("squall-server", ServeFlags, serve, no_args_is_help=True)


def _chat(flags: ServeFlags, selected: Selected) -> None:
    if flags.makes_pictures(selected):
        from squall.cli.pictures import Easel
        from squall.diffusion.request import PictureRequest

        with flags.open_pictures(selected) as painter:
            Easel(painter, PictureRequest(prompt="-", seed=flags.seed)).loop()
        return
    from squall.cli.chat import Chat
    from squall.cli.run import Settings
    from squall.server.log import Log

    settings = Settings(CHAT | {"seed": flags.seed}, {"multiplier": 0.0})
    with flags.served(selected) as model, closing(Log(flags.log)) as log:
        Chat(model, settings, None, log).loop()


def _serve(flags: ServeFlags, selected: Selected, entries: list[Entry] | None) -> None:
    # A signal while the model loads ends the process, also where it is a container's first one.
    signal.signal(signal.SIGTERM, _leave)
    from squall.server.run import listen, serve_on

    if (torchrun() or (0, 1))[0]:
        flags.served(selected)  # as long as the first rank serves
    options = flags.options()
    listener = listen(flags.serve_ip, flags.port)
    if options.hosts is None and not options.api_keys:
        sys.stderr.write(
            f"warning: whoever reaches {flags.serve_ip} may use this server; --api-key KEY asks "
            "for a key\n"
        )
    with listener, _tools(flags) as tools, _opened(flags, selected, entries) as models:
        host, port = listener.getsockname()[:2]
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def started() -> None:
            told = [f"{name} at {place}/v1 ({_about(model)})\n" for name, model in models.items()]
            page = [f"a page for browsers at {place}/ui\n"] if options.ui else []
            sys.stderr.write("".join(told + page))

        status = serve_on(models, replace(options, mcp=tools), listener, started=started)
    raise typer.Exit(status)


@contextmanager
def _tools(flags: ServeFlags) -> Iterator[McpTools | None]:
    """The tools of MCP servers."""
    if flags.mcp is None:
        if flags.mcp_allow:
            raise InvalidRequest("--mcp-allow goes with --mcp FILE, which has the servers")
        yield None
        return
    from squall.mcp import McpTools

    with McpTools(flags.mcp, flags.mcp_allow or ()) as tools:
        yield tools


@contextmanager
def _opened(
    flags: ServeFlags, selected: Selected, entries: list[Entry] | None
) -> Iterator[dict[str, Model | ImageModel | Lazy]]:
    """The models to serve, by name."""
    if entries is not None:
        from squall.cli.several import lazies

        yield {**lazies(flags, entries)}
        return
    with ExitStack() as opened:
        if flags.makes_pictures(selected):
            painter = opened.enter_context(flags.open_pictures(selected))
            yield {flags.served_model_name or name_of(painter.path): painter}
            return
        model = opened.enter_context(flags.served(selected))
        found: dict[str, Model | ImageModel | Lazy] = {}
        found[flags.served_model_name or name_of(model.checkpoint.path)] = model
        if flags.image_model is not None:
            painter = opened.enter_context(flags.open_pictures(selected, flags.image_model, model))
            name = name_of(painter.path)
            found[name if name not in found else f"{name}-images"] = painter
        yield found


def _about(model: Model | ImageModel | Lazy) -> str:
    from squall.model import Model
    from squall.server.residence import Lazy

    if isinstance(model, Lazy):
        loaded = "loaded" if model.pinned or model.preload else "loaded when it is asked for"
        return f"{model.kind}, {loaded}"
    if not isinstance(model, Model):
        return f"pictures, {model.steps} steps"
    executor = model.executor
    return (
        f"context {model.context} tokens, KV cache {executor.blocks * executor.block_size}, "
        f"{executor.threads} threads, {executor.isa}"
    )


def _leave(number: int, _: object) -> NoReturn:
    os._exit(128 + number)
