"""The part `preparer/standard`: what a session asks for, from its sources to the data of each rank."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from swift_core.cache import cache_folder
from swift_core.session import Session
from swift_core.source import Source
from swift_core.types import Data, Template

from swift_plugin_prepare.account import Account
from swift_plugin_prepare.folders import working_folder
from swift_plugin_prepare.forms import content, formed
from swift_plugin_prepare.key import make_key, settings_of
from swift_plugin_prepare.prepare import fingerprint, hand_over, make_encoder, prepare, receive
from swift_plugin_prepare.stream import WindowStream, split_stream


class StandardPreparer:
    """Owns what lives as long as the session: the folder of data without a key, and the process of a stream."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def prepare(self, session: Session, template: Template) -> tuple[Data, Account]:
        """Read and encode what the run trains and evaluates on: all of it, or of a stream the first window."""
        template = formed(session, template)
        config, folder = session.config, self._stack.enter_context(working_folder(cache_folder() / "data"))
        train, held = session.sources(config.dataset), session.sources(config.eval_dataset, "eval_dataset")
        common = (template, session.trainer.options, config.bad_rows)
        settings: dict[str, Any] = {"holdout": config.holdout, "seed": config.seed, "workers": config.data_workers}
        settings["folder"] = folder / "store"
        if config.stream:
            stream, held = split_stream(train, held, config.holdout, session.trainer.options)
            data, account = prepare([], held, *common, session.events, **settings)
            return self._streamed(session, template, data, stream, folder / "windows"), account
        chosen = session.template_choice(session.model_ref, session.trainer.contribution.entry.options.get("template"))
        versions = session.registry.index.versions
        of_template = [settings_of(chosen, versions), *content(session, template)]
        settings["key"] = make_key([*train, *held], of_template, *common[1:], config.holdout, config.seed, versions)
        return prepare(train, held, *common, session.events, **settings)

    def receive(self, session: Session, template: Template, folder: Path) -> Data:
        """In a rank: the data that the parent prepared. folder: the run's `data`."""
        data, windows = receive(folder)
        if windows is None:
            return data
        train, given = session.sources(session.config.dataset), list(session.config.eval_dataset)
        stream, _ = split_stream(train, given, session.config.holdout, session.trainer.options)
        return self._streamed(session, formed(session, template), data, stream, windows)

    def _streamed(self, session: Session, template: Template, data: Data, source: Source, folder: Path) -> Data:
        config = session.config
        encoder = make_encoder([source], template, session.trainer.options, config.bad_rows)
        stream = WindowStream(folder, encoder, config.window, config.data_workers)
        self._stack.callback(stream.close)
        return Data(stream, data.eval, {"stream": True, "window": config.window, "eval": data.account["eval"]})

    def fingerprint(self, data: Data) -> str:
        return fingerprint(data)

    def hand_over(self, data: Data, folder: Path) -> None:
        hand_over(data, folder)

    def follow(self, data: Data, folder: Path) -> None:
        if isinstance(data.train, WindowStream):
            data.train.follow(folder)

    def close(self) -> None:
        self._stack.close()
