"""``expunge serve`` and ``expunge key``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.output import Output
from expunge.core.errors import InputError, MissingExtra
from expunge.core.settings import parse_overrides

_HELP = """Serve a model behind guards, with the interface that clients of chat servers speak.

    What is hidden comes from the guard file and from POST /v1/expunge/requests while the server runs. A guard changes no weights:
    what it hides is suppressed, not forgotten.

    \b
    Examples:
      head -c 32 /dev/urandom | base64 > guard.key; chmod 600 guard.key
      expunge serve --model runs/demo/target --guard guards.yaml --key guard.key
      expunge serve --upstream http://127.0.0.1:8000/v1 --name llama --guard guards.yaml --key guard.key
      expunge serve --model MODEL --guard guards.yaml --key guard.key --keys keys.yaml --host 0.0.0.0 tokens=512 rate=5
      expunge serve --model MODEL --guard guards.yaml --key guard.key --check

    \b
    A guard file (expunge guards lists what there is):
      guards: [filter]
      targets:
        - entities: [Basil Mahfouz Al-Kuwaiti]
      ordinary: prompts.jsonl

    \b
    With --state FOLDER forget requests are kept, encrypted, and survive the process; and each request leaves a record, without a
    word of it, in a log that cannot be changed unseen (expunge verify). Without it both end with the process.
      expunge serve --model MODEL --guard guards.yaml --state state --master-key-file /etc/expunge/master.key
      expunge serve ... --state state --registry postgresql://... --key-folder /srv/keys --checkpoints /mnt/other/heads.jsonl
    The secret of the guards is then the registry's own, so --key is not needed. On a schedule the server puts secret questions to
    itself (canaries: 1h in the guard file, or --canaries 1h, or off), and logs whether its guards held.

    \b
    SETTINGS are limits: body (bytes), tokens (of an answer), rate (requests a second and key), waiting, batch, seconds.
    Keys of clients: expunge key. The key for a server behind this one: EXPUNGE_UPSTREAM_KEY.
    """

_KEY_HELP = """Make a key for a client of expunge serve.

    The key is printed once; the file holds its SHA-256 alone.

    \b
    Examples:
      expunge key alice --file keys.yaml
      expunge key operator --role administer --role ask --file keys.yaml
    """


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("serve", help=_HELP)(serve)
    app.command("key", help=_KEY_HELP)(key)


def serve(
    guard: Annotated[Path, typer.Option(help="Guard file.", metavar="FILE")],
    parts: Annotated[list[str] | None, typer.Argument(help="key=value limits.", metavar="[SETTINGS]...")] = None,
    model: Annotated[str | None, typer.Option(help="The model: hub id, local folder, or a run.")] = None,
    upstream: Annotated[str | None, typer.Option(help="A server to stand before, with /v1.", metavar="URL")] = None,
    name: Annotated[str | None, typer.Option(help="How clients call the model; else its folder's name.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="File with the guard's secret; else EXPUNGE_GUARD_KEY, else the registry's own.", metavar="FILE"),
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="Keys of clients; none: only this machine may ask.", metavar="FILE")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder for forget requests and the log.", metavar="FOLDER")] = None,
    registry: Annotated[
        str | None, typer.Option(help="Database of forget requests, in place of a file there.", metavar="URL")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="File for signed heads of the log, best on another disk.", metavar="FILE")
    ] = None,
    master: Annotated[
        Path | None,
        typer.Option(
            "--master-key-file", help="The key that opens all kept ones, best elsewhere; else EXPUNGE_MASTER_KEY.", metavar="FILE"
        ),
    ] = None,
    key_folder: Annotated[
        Path | None, typer.Option(help="Folder of kept keys, shared by servers with one registry.", metavar="FOLDER")
    ] = None,
    canaries: Annotated[
        str | None, typer.Option(help="How often the server tries itself out: 30m, 1h, off.", metavar="TIME")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=0, max=65535)] = 8080,
    quiet: Annotated[bool, typer.Option("--quiet-refusals", help="Do not tell clients that a guard has spoken.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Put everything together, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object before serving.")] = False,
) -> int:
    """Serve."""
    output = Output(json)
    modules = _modules()
    guards = modules.config.read_guards(guard)
    limits = modules.config.Limits(**parse_overrides(parts or []))
    access = modules.access.Access.read(keys) if keys else modules.access.Access(None)
    modules.server.check_open(host, access)
    if (model is None) == (upstream is None):
        raise InputError("A server needs a model, or another server behind it.", "Give one of --model and --upstream.")
    of_state = {"--registry": registry, "--checkpoints": checkpoints, "--master-key-file": master, "--key-folder": key_folder}
    of_state["--canaries"] = None if canaries == "off" else canaries
    if state is None and (left := [k for k, v in of_state.items() if v is not None]):
        raise InputError(f"{' and '.join(left)} belong to --state.", "Give --state FOLDER.")
    tried = guards.canaries if canaries is None else modules.config.canaries_of(canaries, guards.canaries)
    secret = modules.config.guard_key(key, required=state is None)
    adapter = None
    if model is not None:
        from expunge.pipeline.config import TextConfig
        from expunge.pipeline.models import open_adapter

        adapter = open_adapter(model, TextConfig())
    called = name or (Path(model).resolve().name if model is not None and Path(model).exists() else model) or "upstream"
    held = None
    if state is not None:
        places = modules.kept.Places(state, master, key_folder)
        held = modules.kept.State.open(
            state, modules.kept.versions_of(called, adapter), registry=registry, checkpoints=checkpoints, places=places,
            guard=secret, keeping=guards.log, escrow=guards.escrow,
        )  # fmt: skip
        if places.exposed:
            output.warn(places.exposed)
    try:
        return _serve(
            modules, output, guards, host=host, port=port, check=check, key=held.guard if held else secret, adapter=adapter,
            upstream=upstream, name=called, access=access, limits=limits, tell=not quiet, state=held,
            canaries=tried if held else None,
        )  # fmt: skip
    finally:
        if held is not None:
            held.close()


def _serve(modules: Any, output: Output, guards: Any, *, host: str, port: int, check: bool, **parts: Any) -> int:
    served = modules.server.assemble(guards, **parts)
    called, tried = served.name, parts["canaries"]
    rows = ", ".join(r.title for r in served.policy.rows)
    output.note(f"Guards: {rows}. Targets from the file: {len(guards.targets)}. Model: {called}.")
    if parts["state"] is not None:
        output.note(f"Canaries: {'off' if tried is None else f'every {tried.every:g} s'}.")
    address = f"http://{host}:{port}"
    output.result(
        {"url": address, "model": called, "guards": [r.title for r in served.policy.rows], "targets": len(guards.targets)}
    )
    if check:
        return 0
    output.note(f"Listening on {address} (interface: /docs). Ctrl-C ends it; answers that have begun are finished.")
    modules.server.run(served, host, port)
    return 0


def key(
    client: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="Key file; made if it is not there.", metavar="FILE")],
    role: Annotated[list[str] | None, typer.Option(help="ask or administer; may be given twice.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Make a key."""
    modules = _modules()
    made = modules.access.add_key(file, client, tuple(role or ["ask"]))
    output = Output(json)
    output.result({"client": client, "key": made})
    output.say(made)
    return 0


def _modules() -> Any:
    try:
        from expunge import serving
        from expunge.serving import access, config, kept, server  # noqa: F401  (now they are attributes of the package)
    except ImportError as error:
        raise MissingExtra("Serving a model", "serve") from error
    return serving
