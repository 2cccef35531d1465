"""Rows of another form than a conversation to train on: pairs, prompts, rows with a label, as a trainer's manifest names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift_core.session import Session
from swift_core.types import Batch, Row, RowForm, Sample, Template

from swift_plugin_prepare.key import code_of, template_content


class Formed:
    """The model's own template, which makes of a row what the form says."""

    def __init__(self, template: Template, form: RowForm) -> None:
        self.template, self.form = template, form

    def encode(self, row: Row) -> list[Sample]:
        return self.form.encode(self.template, row)

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        return self.template.prompt(messages, tools, **kwargs)

    def decode(self, ids: Sequence[int]) -> str:
        return self.template.decode(ids)

    def stop_ids(self) -> list[int]:
        return self.template.stop_ids()

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return self.template.collate(samples)

    def pack(self, samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample | None:
        return self.template.pack(samples, share)


def formed(session: Session, template: Template) -> Template:
    """The template with the form that the trainer's manifest names; itself where it names none."""
    name = session.trainer.contribution.entry.options.get("rows")
    return Formed(template, session.part("rows", name)) if name else template


def content(session: Session, template: Template) -> list[Any]:
    """What is known of a template's content and of the form on top of it, for the key of prepared data."""
    if not isinstance(template, Formed):
        return [template_content(template, session.model_ref.folder)]
    kind = type(template.form)
    return [template_content(template.template, session.model_ref.folder), kind.__qualname__, code_of(kind.__module__)]
