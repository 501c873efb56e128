"""Serves a bundle over HTTP as OpenAI's chat completions, so that any client of that API can ask it.

    python -m runtimes.serve BUNDLE
    python -m runtimes.serve BUNDLE --host 0.0.0.0 --key-env SMOLPORT_KEY

POST /v1/chat/completions (images, a video or PDFs as data URLs, streams, usage, log-probabilities), GET /v1/models,
GET /health. SERVE.md is the guide.
Lines about requests go to stderr; they hold counts and times, nothing of what was asked or answered. Exit code 0:
ended by SIGINT or SIGTERM; 1: the engine failed; 2: the bundle, an option, or the address cannot be used; 130:
interrupted before it served.

Whoever can reach the port can use it: it is bound to loopback unless a key is given. On loopback a request must name
this machine in its Host header, and come from no web page unless its origin was allowed, since a page can make a
browser send requests here, and a name of its own mean 127.0.0.1.

Not covered: TLS (the key is in clear on the wire: put a proxy or a tunnel in front), answers side by side, files that
are kept.
"""

import argparse
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from runtimes.api import LOCAL_NAMES, Access, make_server
from runtimes.bundle import read_bundle
from runtimes.chat import open_chat
from runtimes.completions import Limits
from runtimes.manifest import BundleError
from runtimes.preprocess import TILE_BUDGETS
from runtimes.runner import EngineError, InputError, engine_name
from runtimes.service import Service
from runtimes.video import MOST_FRAMES

LEAST_KEY = 16  # characters


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, not listening yet. Raises InputError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as exc:
        raise InputError(f"cannot listen at {host} port {port}: {exc.strerror or exc}") from exc
    return bound


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = (__doc__ or "").partition("\n")[0]
    command = argparse.ArgumentParser(prog="python -m runtimes.serve", description=text)
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; another than loopback needs a key")
    command.add_argument("--port", type=int, default=8080, help="0: any that is free")
    command.add_argument("--key-env", metavar="VARIABLE", help="environment variable that holds the key to ask for")
    command.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="in Host headers, too")
    command.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help="of web pages that ask")
    command.add_argument("--name", action="append", default=[], help="for the model, in place of the bundle's")
    command.add_argument("--tiles", type=int, choices=TILE_BUDGETS, help="at most so many tiles an image")
    command.add_argument("--frames", type=int, metavar="N", help="at most so many of a video")
    command.add_argument("--queue", type=int, default=4, metavar="N", help="requests that may wait")
    command.add_argument("--max-new-tokens", type=int, default=Limits.new_tokens, metavar="N", help="of one answer")
    command.add_argument(
        "--max-images", type=int, default=Limits.images, metavar="N", help="of one request, with pages"
    )
    command.add_argument("--max-body-mb", type=float, default=20, metavar="MB", help="of one request")
    command.add_argument("--time-limit", type=float, default=300, metavar="S", help="for one answer")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="0, the default, lets the engine choose")
    command.add_argument("--allow-pending", action="store_true", help="use a bundle whose proof has not passed")
    return command


def serve(args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Loads the bundle and serves it until a signal comes.

    Args:
        args: of `parser`.
        log: called with a line at a time.

    Raises:
        BundleError, InputError: if something given cannot be used.
        EngineError: if the engine fails.
    """
    key = os.environ.get(args.key_env, "") if args.key_env else None
    if key is not None and len(key) < LEAST_KEY:
        raise InputError(
            f"the environment variable {args.key_env} holds {len(key)} characters, want {LEAST_KEY} or more"
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {args.key_env} holds what no header can: want printable ASCII")
    local = is_loopback(args.host)
    if not local and key is None:
        raise InputError(f"listening at {args.host}, which others can reach, needs a key: --key-env VARIABLE")
    for name, least in (("queue", 0), ("max_new_tokens", 1), ("max_images", 1), ("threads", 0), ("time_limit", 1)):
        if not getattr(args, name) >= least:
            raise InputError(f"{name} is {getattr(args, name)}, want {least} or more")
    if not 0.001 <= args.max_body_mb <= 1000:
        raise InputError(f"max_body_mb is {args.max_body_mb}, want 0.001 to 1000")
    if args.frames is not None and not 1 <= args.frames <= MOST_FRAMES:
        raise InputError(f"frames is {args.frames}, want 1 to {MOST_FRAMES}")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"port is {args.port}, want 0 to 65535")
    try:
        import starlette
        import uvicorn  # noqa: F401  # said before a minute of loading, not after
    except ImportError as exc:
        raise InputError(f"{exc.name} is not installed: pip install '.[serve]'") from exc
    del starlette
    listening = bind(args.host, args.port)
    with listening:
        log(f"loading {args.bundle}")
        began = time.perf_counter()
        bundle = read_bundle(args.bundle, allow_pending=args.allow_pending)
        chat = open_chat(bundle, tiles=args.tiles, threads=args.threads, vision=True)
        if args.frames is not None:
            chat.video = chat.video.with_frames(args.frames)
        manifest = bundle.manifest
        log(
            f"loaded in {time.perf_counter() - began:.1f} s: {manifest.model.name}, recipe {manifest.recipe.name}, "
            f"{engine_name(bundle)}, context {chat.runner.settings.context:,}, images of at most "
            f"{chat.settings.max_tiles} tiles of {chat.runner.settings.seq_len} tokens, videos of at most "
            f"{chat.video.max_frames} frames, a tile each"
        )
        service = Service(
            chat,
            tuple(args.name) or (manifest.model.name,),
            f"fp_{manifest.payload_digest[:12]}",
            Limits(int(args.max_body_mb * 1e6), args.max_images, new_tokens=args.max_new_tokens),
            queue=args.queue,
            time_limit_s=args.time_limit,
            log=log,
        )
        hosts = (*LOCAL_NAMES, *(name.lower() for name in args.allow_host)) if local or args.allow_host else ()
        access = Access(key, hosts, tuple(args.allow_origin))
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        server = make_server(service, access, lambda: log(f"serving at http://{shown}:{port}/v1"))
        with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
            server.run(sockets=[listening])
    log("ended")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(arguments)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        serve(args, log)
    except (BundleError, InputError, EngineError) as exc:
        log(f"error: {' '.join(str(exc).split())}")
        return 1 if isinstance(exc, EngineError) else 2
    except KeyboardInterrupt:
        log("interrupted")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
