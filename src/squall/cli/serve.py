"""`squall serve` and `squall-server`: the HTTP server, or with -i a chat."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from squall.cli.flags import command
from squall.cli.opening import ModelFlags
from squall.cli.options import ChatTemplate, ContextSize, DraftModel
from squall.cli.selectors import Selected
from squall.cli.toml_selector import TomlSelection
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.model import Model
    from squall.server.options import ServerOptions

# mistral.rs chats like this.
CHAT: dict[str, Any] = {
    "max_tokens": 4096, "temperature": 0.1, "top_k": 32, "top_p": 0.1, "min_p": 0.05,
    "frequency_penalty": 0.1, "presence_penalty": 0.1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServeFlags(ModelFlags):
    """The flags of both commands."""

    serve_ip: Annotated[
        str,
        typer.Option(
            "--serve-ip", "--host", help="The address to listen on; 0.0.0.0: all of this machine's."
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("-p", "--port", min=0, max=65535, help="0: any that is free.")
    ] = 8080
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SQUALL_API_KEY", help="Ask for this key; several: each has its own cache."
        ),
    ] = None
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages from here may use the server; *: all."),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name, beside the address, the server may go by."),
    ] = None
    allow_media_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Images may be loaded from here; .HOST: below it; *: all."
        ),
    ] = None
    allow_media_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Or may be files within this one.")
    ] = None
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name for clients; by default its file's.")
    ] = None
    strict_fields: Annotated[
        bool, typer.Option("--strict-fields", help="Unknown fields are errors, not ignored.")
    ] = False
    max_seqs: Annotated[int, typer.Option(min=1, help="Answers computed at a time.")] = 16
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that wait beside those.")] = 256
    queue_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Refuse what waits longer; by default never."),
    ] = None
    adapter_folder: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="Clients may load adapters from here, and remove some."
        ),
    ] = None
    image_memory: Annotated[
        int,
        typer.Option(min=0, help="MiB for what was made of images lately, so that it is kept."),
    ] = 256
    adapter_memory: Annotated[
        int | None, typer.Option(min=1, help="MiB for adapters; the unused longest make room.")
    ] = None
    draft: DraftModel = None
    context: ContextSize = None
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            "--kv-tokens", "--pa-ctxt-len", min=1,
            help="Tokens of all answers together in the KV cache; by default 2048 for each.",
        ),
    ] = None  # fmt: skip
    kv_memory: Annotated[
        int | None, typer.Option("--kv-memory", "--pa-gpu-mem", min=1, help="Or its size in MiB.")
    ] = None
    kv_fraction: Annotated[
        float | None,
        typer.Option(
            "--kv-fraction", "--pa-gpu-mem-usage", min=0, max=1,
            help="Or as a part of the memory that the weights leave free; counts first.",
        ),
    ] = None  # fmt: skip
    kv_block: Annotated[
        int, typer.Option("--kv-block", "--pa-blk-size", help="Tokens a block: 16, 32, ...")
    ] = 16
    no_kv_cache: Annotated[
        bool, typer.Option("--no-kv-cache", help="Compute every token anew in every step.")
    ] = False
    prefix_cache_n: Annotated[
        int, typer.Option(min=0, help="Keep prefixes, as much as so many contexts; 0: none.")
    ] = 16
    prompt_batchsize: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompt tokens a step.")
    ] = None
    truncate_sequence: Annotated[
        bool,
        typer.Option(
            "-t", "--truncate-sequence", help="Cut prompts that are too long, at the beginning."
        ),
    ] = False
    chat_template: ChatTemplate = None
    seed: Annotated[
        int | None, typer.Option("-s", "--seed", min=0, help="For requests that give none.")
    ] = None
    log: Annotated[
        Path | None, typer.Option("-l", "--log", help="Append requests and responses to a file.")
    ] = None
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Tokens a second in the access log.")
    ] = False
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for running answers after SIGTERM or Ctrl-C.")
    ] = 30.0
    stall_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without a step after which the engine is dead.")
    ] = 300.0
    interactive_mode: Annotated[
        bool, typer.Option("-i", "--interactive-mode", help="A chat here instead of a server.")
    ] = False
    no_paged_attn: Annotated[
        bool, typer.Option("--no-paged-attn", help="Accepted; the KV cache is always paged.")
    ] = False

    @property
    def adapts_all(self) -> bool:
        """See `ModelFlags`."""
        return self.interactive_mode

    def served(self, selected: Selected) -> Model:
        """The model, with an engine for many requests."""
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
        opening = Opening(kv=kv, engine=config, adapter_bytes=memory, image_bytes=images)
        return self.open(selected, opening)

    def options(self) -> ServerOptions:
        """What the server allows."""
        from squall.server.options import LOOPBACK, ServerOptions, keep_alive_s
        from squall.vision.images import Media

        local = self.serve_ip in LOOPBACK
        hosts = {*LOOPBACK, *(self.allow_host or ())} if local or self.allow_host else None
        return ServerOptions(
            model_id=self.served_model_name,
            strict_fields=self.strict_fields,
            adapter_folders=tuple(self.adapter_folder or ()),
            api_keys=tuple(self.api_key or ()),
            origins=tuple(self.cors or ()),
            hosts=None if hosts is None else frozenset(hosts),
            media=Media(hosts=tuple(self.allow_media_url or ()), folder=self.allow_media_path),
            truncate=self.truncate_sequence,
            seed=self.seed,
            log=self.log,
            throughput=self.throughput,
            keep_alive_s=keep_alive_s(),
            drain_s=self.drain_timeout,
            stall_s=self.stall_timeout,
        )


def serve(flags: ServeFlags, selected: Selected) -> None:
    """Serve a model over HTTP, in the shape of OpenAI's API.

    squall serve

    squall serve model.gguf --port 8000 --api-key SECRET

    squall serve plain -m FOLDER --isq Q4K

    squall-server --port 1234 gguf -m FOLDER -f model.gguf
    """
    if flags.interactive_mode:
        _chat(flags, selected)
    else:
        _serve(flags, selected)


app = command("serve", ServeFlags, serve)
server = command("squall-server", ServeFlags, serve, no_args_is_help=True)


def _chat(flags: ServeFlags, selected: Selected) -> None:
    from squall.cli.chat import Chat
    from squall.cli.run import Settings

    settings = Settings(CHAT | {"seed": flags.seed}, {"multiplier": 0.0})
    with flags.served(selected) as model:
        Chat(model, settings, None).loop()


def _serve(flags: ServeFlags, selected: Selected) -> None:
    # A signal while the model loads ends the process, also where it is a container's first one.
    signal.signal(signal.SIGTERM, _leave)
    from squall.executors.parallel import follows
    from squall.server.run import listen, serve_on

    if follows():
        flags.served(selected)  # as long as the first rank serves
    options = flags.options()
    listener = listen(flags.serve_ip, flags.port)
    if options.hosts is None and not options.api_keys:
        sys.stderr.write(
            f"warning: whoever reaches {flags.serve_ip} may use this server; --api-key KEY asks "
            "for a key\n"
        )
    with listener, flags.served(selected) as model:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        path = model.checkpoint.path.absolute()
        name = options.model_id or (path.name if path.is_dir() else path.stem)

        def started() -> None:
            sys.stderr.write(
                f"{name} at http://{shown}:{port}/v1 (context {model.context} tokens, "
                f"KV cache {model.executor.blocks * model.executor.block_size}, "
                f"{model.executor.threads} threads, {model.executor.isa})\n"
            )

        status = serve_on(model, replace(options, model_id=name), listener, started=started)
    raise typer.Exit(status)


def _leave(number: int, _: object) -> NoReturn:
    os._exit(128 + number)
