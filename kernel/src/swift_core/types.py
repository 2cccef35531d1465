"""What crosses the border between the kernel and its plugins: plain dataclasses, and one Protocol for each kind.

Nothing here is a base class: an object satisfies a Protocol by having its methods. torch appears in annotations only.
Shapes: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from swift_core.config import RunConfig
    from swift_core.events import Event, EventSink
    from swift_core.plan import Plan
    from swift_core.session import Session

Row = dict[str, Any]
"""A standard row: `{"messages": [...], "tools"?: [...], ...}`, OpenAI's chat form. `rejected` is a whole conversation too: it
begins as `messages` does and ends with the other answer."""


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """One row of a data set with where it stands. A row that cannot be used carries its reason in `refused`."""

    row: Row
    where: str  # "file.jsonl:12", for people
    refused: str | None = None
    weight: float = 1.0  # how often it stands in an epoch; a fraction of it is a chance


@runtime_checkable
class Dataset(Protocol):
    """Rows in the standard form. Iterating twice gives the same records in the same order."""

    def __iter__(self) -> Iterator[Record]: ...


@runtime_checkable
class RawDataset(Dataset, Protocol):
    """A `Dataset` that also gives its rows as they are stored, cheap to read and to pass on: then only the processes that
    encode parse them, and a row that is not chosen is not parsed at all."""

    def raw(self) -> Iterator[Any]:
        """All rows, picklable, in the order of `__iter__`."""

    def record(self, raw: Any) -> Record:
        """One of them, parsed."""

    def fingerprint(self) -> str | None:
        """A text that changes with any of the rows, so that prepared samples can be kept; None where it cannot be told."""


@dataclass(slots=True)
class Sample:
    """One training sequence: tokens, a loss weight for each token, and how they came about.

    `weights[i]` is the weight of predicting `input_ids[i]` from the tokens before it; 0 means not trained.
    """

    input_ids: list[int]
    weights: list[float]
    row: int = 0  # 0-based index of the row in the data that was read
    where: str = ""
    turns: list[int] = field(default_factory=list)  # indexes of the messages trained
    text: str = ""  # what was tokenized
    spans: list[tuple[int, int]] = field(default_factory=list)  # trained characters of `text`, end exclusive
    appended: str | None = None  # an end marker that was added to the template's own rendering
    kwargs: dict[str, Any] = field(default_factory=dict)  # template arguments used
    notes: list[str] = field(default_factory=list)  # what a careful user should know: "own-sample", "prompt-mismatch"
    segments: list[int] = field(default_factory=list)  # lengths of the samples packed into this one; empty if unpacked
    shared: list[int] = field(default_factory=list)  # of a packed one: for each segment, the tokens that it begins with and
    # that stand before: all of the last segment with a 0 here. Empty: none do
    media: dict[str, list[Any]] = field(default_factory=dict)  # images, videos, audios: references in order, never pixels
    label: Any = None  # a task head's target: a class, a number, a list of them, or one for each token; of an encoder-decoder,
    # where the answer begins

    @property
    def trained_tokens(self) -> int:
        return len(self.weights) - self.weights.count(0)


@dataclass(slots=True)
class Batch:
    """What a model's forward takes, and what its loss needs. Made by `Template.collate`."""

    inputs: dict[str, torch.Tensor]  # input_ids [B, T], attention_mask [B, T], media tensors, ...
    labels: torch.Tensor  # [B, T] token ids
    weights: torch.Tensor  # [B, T] float32; weights[b, t] is the loss weight of labels[b, t]
    rows: list[int]
    weight: float  # sum of weights
    tokens: int  # tokens that are not padding
    trained_tokens: int  # tokens with weight > 0
    targets: Any = None  # a task head's targets: a tensor with one row for each of the batch; or what else a loss needs
    sample_of: torch.Tensor | None = None  # [B, T]: the sample, counted from 0, of each token; -1: of none, or of several


@runtime_checkable
class Samples(Protocol):
    """Prepared samples, read on demand. Iterating reads them in order."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample, without reading it."""

    def __len__(self) -> int: ...

    def __getitem__(self, n: int, /) -> Sample:
        """Sample `n`: its ids, weights, row, where, turns, media and label, and its `text` where it has media; `spans` are
        empty. IndexError past the end."""


@runtime_checkable
class Stream(Protocol):
    """A very long or endless source, prepared window by window."""

    def window(self, position: int) -> tuple[Samples, int]:
        """The samples of the records from number `position` on, and the position of the next window: 0 where the source
        ended. A pure function of the position and the settings."""

    def close(self) -> None: ...


@dataclass(slots=True)
class Data:
    """Prepared samples of a run, and the account of what became of every row."""

    train: Samples | Stream
    eval: Samples
    account: dict[str, Any]


# --- models and templates ---------------------------------------------------------------------------------------------

Processor = Any
"""A transformers tokenizer or processor: whatever the family's `swift_load_processor` returns."""


@dataclass(slots=True)
class ModelBundle:
    """A loaded model with what belongs to it. `model` is a torch.nn.Module whose forward takes `Batch.inputs`."""

    model: Any
    processor: Processor
    source: str  # the folder or hub id it was loaded from
    architecture: str | None = None  # config.json's architecture
    template: Template | None = None
    quantization: str | None = None  # the quantizer's id when the weights are quantized
    task: str = "causal_lm"  # what its head does: also of a multimodal model that generates
    parts: ModelParts | None = None  # which weights are its language model, its vision tower and so on
    frozen: list[str] = field(default_factory=list)  # parts that a tuner leaves alone
    in_training: bool = False  # an engine that is given it leaves its layers as they are


@runtime_checkable
class ModelParts(Protocol):
    """A model's parts, of language, vision, audio, projector, embeddings, head, experts."""

    @property
    def names(self) -> list[str]:
        """The parts that the model has."""

    def of(self, name: str, /) -> set[str]:
        """The parts that a parameter or module belongs to, by its name, also under an adapter."""

    def check(self, wanted: Sequence[str], address: str) -> None:
        """Raise RequestError for a part that the model does not have."""

    def overridden(self, patterns: Mapping[str, Sequence[str]]) -> ModelParts:
        """With the names that a family's manifest gives."""

    def rated(self, groups: list[dict[str, Any]], named: Mapping[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Parameter groups with `lr_scale` times the rate of each weight's part; `named` holds the parameters by name."""


@dataclass(slots=True)
class AnswerDelta:
    """A piece of an answer as it is read. A tool call's first piece has its `name`; later ones add to its `arguments`."""

    content: str = ""
    reasoning: str = ""
    call: int | None = None  # number of the tool call that the piece belongs to, from 0
    name: str = ""
    arguments: str = ""  # JSON text, or a part of one


class AnswerReader(Protocol):
    """Reads one answer as its tokens come: reasoning, content and tool calls apart, without the template's marks."""

    def feed(self, ids: Sequence[int]) -> list[AnswerDelta]:
        """What can be told after these further token ids."""

    def close(self) -> list[AnswerDelta]:
        """The rest, at the answer's end. A call that is cut short or malformed comes back as content, as it was written."""


@runtime_checkable
class Template(Protocol):
    """How rows become tokens for one checkpoint. Collation and position ids belong here, never to a trainer.

    A template of a chat model also has `reader(prompt, tools) -> AnswerReader`, where `prompt` are the ids that were answered,
    and `call_grammar(tools, name, many, prompt) -> str`, a Lark grammar (llguidance's dialect) of an answer to `prompt` that
    calls one of `tools`, or the one named. Both read the format off the chat template.
    """

    def encode(self, row: Row) -> list[Sample]:
        """Training samples of a row, with the exact loss weights. Raises ValueError with the reason to refuse it."""

    def prompt(self, messages: list[Row], tools: list[Any] | None = None, **kwargs: Any) -> list[int]:
        """Token ids that make the model answer `messages`: the rendering with the generation prompt."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens."""

    def stop_ids(self) -> list[int]:
        """Token ids that end a generated turn."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad samples into one batch."""

    def pack(self, samples: Sequence[Sample], share: bool | Sequence[int] = False) -> Sample | None:
        """One sample holding several in isolation from each other, or None where the model cannot isolate them. With `share`
        it may hold tokens that all begin with once, as a segment before theirs; `[2, 3]`: of the first two, and of the next
        three."""


@runtime_checkable
class TunedModel(Protocol):
    """A model with a tuner applied. `model` is what forward is called on; of a role that has `within()`, in that context.

    A tuner that keeps what it trains beside the model's weights also has `weights()`: all weights by the plain model's names,
    with what was tuned in them, for an engine in another process.
    """

    model: Any

    def trainable(self) -> dict[str, Any]:
        """Trained parameters by name."""

    def param_groups(self, config: Any) -> list[dict[str, Any]]:
        """Groups `{"params": [...], "lr_scale"?: float, "weight_decay"?: float}`; `config` is the trainer's."""

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Any | None:
        """A torch optimizer of the tuner's own, or None for the backend's AdamW."""

    def before_step(self, step: int) -> None:
        """Called before the gradients of optimizer step `step` (1-based) are computed."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step`."""

    def disabled(self) -> AbstractContextManager[Any]:
        """A context in which the model is the one before tuning: the reference policy."""

    def save(self, folder: Path) -> None:
        """Write what was tuned into `folder`, as safetensors."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, into this model, exactly."""

    def merge(self) -> ModelBundle:
        """The tuned model as a plain one. May change this object; call it last."""


@runtime_checkable
class Quantizer(Protocol):
    """Order of use: `load_kwargs`, the family's loader, `apply`. The tuner and the backend come after."""

    def load_kwargs(self, source: str) -> dict[str, Any]:
        """Arguments for the model loader. `skeleton=True` asks it for a model without weights, for `apply` to fill."""

    def apply(self, bundle: ModelBundle, source: str, calibration: Iterable[Sample] | None = None) -> ModelBundle:
        """Quantize a freshly loaded model, or restore one whose folder this quantizer wrote."""

    def save(self, bundle: ModelBundle, folder: Path) -> None:
        """Write the quantized model as safetensors, with `quantization_config` in its config.json."""


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """What a launcher starts: `argv` in each rank's process, or `inline` in this one."""

    folder: Path
    argv: list[str]
    inline: Callable[[], None]


@runtime_checkable
class Launcher(Protocol):
    """Starts the ranks of a run. Torch-free. `processes` is how many it starts."""

    processes: int

    def launch(self, job: Job) -> None:
        """Run the job to its end. Raises RunError if a rank failed, Interrupted if the user stopped it."""


LossFn = Callable[[Any, Batch], "torch.Tensor"]
"""`loss_fn(outputs, batch)` -> the weighted SUM of the batch's losses, a scalar tensor; `Batch.weight` normalises it.
`outputs` are an `Outputs`."""


class Outputs(Protocol):
    """What a forward pass over a batch gives. Ask for `logprobs` where they suffice: logits of all positions are large."""

    @property
    def logits(self) -> torch.Tensor:
        """[B, T, vocabulary]."""

    @property
    def trained(self) -> torch.Tensor:
        """[B, T - 1] bool: where `Batch.weights[:, 1:]` is not 0."""

    def logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        """log p(label | the tokens before it) of the `trained` labels, row by row, in float32: [N]. `temperature`: what the
        logits are divided by."""

    def trained_logits(self, part: slice | None = None) -> torch.Tensor:
        """The logits that predict the `trained` labels, row by row: [N, vocabulary]; of `part` of them."""

    def entropies(self, temperature: float = 1.0) -> torch.Tensor:
        """The entropy of each of those distributions, in nats, without a gradient: [N] float32."""


@dataclass(slots=True)
class StepResult:
    """What a step saw, over all microbatches and ranks: `loss` is the mean per unit of weight."""

    loss: float
    weight: float
    tokens: int
    trained_tokens: int


@runtime_checkable
class Steps(Protocol):
    """A prepared model's arithmetic. Gradients are normalised by the global weight, so that accumulation and the number
    of processes change nothing."""

    def forward_backward(self, microbatches: Sequence[Batch], loss_fn: LossFn) -> StepResult:
        """Accumulate the gradients of one optimizer step over this rank's microbatches. Collective."""

    def optimizer_step(self, learning_rate: float, clip: float | None) -> float:
        """Update and clear gradients; returns their norm before clipping. Raises RunError if it is not finite."""

    def forward(self, role: str, batch: Batch) -> Any:
        """The outputs of a role's model, without gradients."""

    def evaluate(self, batches: Iterable[Batch], loss_fn: LossFn) -> StepResult:
        """The mean loss over this rank's batches and those of all ranks, without gradients. Collective."""

    def full_weights(self, role: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights of a role by the plain model's names, unsharded. Collective."""

    def save(self, folder: Path) -> None:
        """Write the optimizer's and the random generators' state into `folder`, without pickles. Collective."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Collective."""


@runtime_checkable
class Backend(Protocol):
    """Devices, precision and processes, inside one rank.

    A backend may have `pass_tokens`: the tokens from which on a longer forward pass gains nothing. Trainers then make shorter
    ones of it, whose gradients add up to the same. And `release_threads()`, which a thread that has computed beside the main
    one calls before it waits: its workers would get in the way of the main one's.
    """

    rank: int
    world: int
    device: Any

    def load_kwargs(self) -> dict[str, Any]:
        """Arguments for the model loader: `dtype` and `device`."""

    def seed(self, seed: int) -> None:
        """Seed every random generator of this rank."""

    def prepare(self, roles: Mapping[str, TunedModel], optimizer: Callable[..., Any] | None, config: Any) -> Steps:
        """Place the models and make the optimizer of role `policy`. `optimizer(groups)` overrides AdamW."""

    def describe(self) -> dict[str, Any]:
        """Device, precision, processes and threads, for the log."""

    def peak_bytes(self) -> int:
        """Largest memory held so far, in bytes: of the device, or of the process on a CPU."""

    def all_true(self, flag: bool) -> bool:
        """True when `flag` is true on every rank. Collective; also a barrier."""

    def close(self) -> None: ...


class Models(Protocol):
    """The run's models by role: policy reference value reward teacher draft."""

    def get(self, role: str) -> TunedModel: ...


@dataclass
class Run:
    """One training run, as a trainer sees it. Owned by the session, which closes everything in it."""

    config: RunConfig
    trainer_config: Any  # the trainer's own dataclass
    plan: Plan
    processor: Processor
    template: Template
    data: Data
    backend: Backend
    events: EventSink
    models: Models
    output: Path
    resume_from: Path | None  # the checkpoint folder to continue from
    warm_start: Path | None  # a checkpoint whose weights to begin with
    part: Callable[..., Any]  # part(kind, id, **options): a small part, made by its plugin
    engine: Callable[[], Engine]  # opens the run's engine: on the policy itself, or beside it and to be sent its weights
    stop: str | None = None  # set to a reason to end the run after the current step, with a checkpoint


@dataclass(slots=True)
class TrainResult:
    """How a run ended. `metrics` goes into summary.json; it holds at least steps, seconds, train_loss, eval_loss (or None),
    trained_tokens, tokens_per_second and peak_bytes."""

    metrics: dict[str, Any]
    last: Path | None
    best: Path | None
    stopped: str | None = None


@runtime_checkable
class Trainer(Protocol):
    """A training loop, whole in one file."""

    def fit(self) -> TrainResult: ...


@runtime_checkable
class Callback(Protocol):
    """Follows a run through its events. One that raises is reported once and switched off, unless --strict."""

    def on_event(self, event: Event) -> None: ...


# --- inference and evaluation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraint:
    """What an answer must be. `value`: a JSON schema, nothing for any JSON object, a regular expression, a list of texts to
    choose from, or a Lark grammar in llguidance's dialect."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    value: Any = None


@dataclass(slots=True)
class Request:
    """One generation: messages to answer, or token ids to continue. temperature 0 is greedy.

    The order of what changes the logits: bias, penalties, constraint, temperature, top_k, top_p, min_p.
    """

    messages: list[Row] | None = None
    tools: list[Any] | None = None
    token_ids: list[int] | None = None
    max_tokens: int = 256
    min_tokens: int = 0  # before which nothing ends the answer
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are out
    repetition_penalty: float = 1.0  # of all tokens seen (CTRL, arXiv 1909.05858)
    presence_penalty: float = 0.0  # taken off the logit of each token generated already (OpenAI's)
    frequency_penalty: float = 0.0  # likewise, for each time it was generated
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to the logits, by token id
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)  # token ids that end an answer, beside the template's
    ignore_eos: bool = False  # only `stop`, `stop_ids` and `max_tokens` end the answer
    seed: int | None = None
    n: int = 1  # completions of it; `Completion.choice` tells which
    top_logprobs: int = 0  # so many of the likeliest tokens are told at each place
    constraint: Constraint | None = None
    adapter: str | None = None  # a name given to `load_adapter`; None is the model as loaded
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    media: dict[str, list[Any]] = field(default_factory=dict)  # images, videos, audios: references in the order of their parts


@dataclass(slots=True)
class Completion:
    """A result, or while streaming a piece of one (`finish` is None; `text` holds what is new)."""

    index: int  # of its request
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of token_ids, natural logarithm
    finish: str | None = None  # "stop", "length"
    prompt_tokens: int = 0
    weight_version: int = 0
    choice: int = 0  # which of the request's `n`
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # of each token id, the likeliest first
    cached_tokens: int = 0  # of the prompt, taken from an earlier request
    drafted: int = 0  # tokens that were guessed and checked on the way; told with `finish`
    accepted: int = 0  # of them, those that were right
    message: Row | None = None  # of an engine that speaks to a server: the answer as told there, reasoning and tool calls apart


@dataclass(slots=True)
class ModelFolder:
    """A checkpoint that is not loaded: what an engine is given that loads it itself, in another process perhaps.

    The engine renders with `template` and sends token ids, so that no other template comes between training and serving.
    """

    folder: str
    processor: Processor
    template: Template
    architecture: str | None = None
    adapter: Path | None = None  # an adapter's folder, to be on where a request names none


@runtime_checkable
class Engine(Protocol):
    """Runs a model forward. `capabilities` names what is supported beyond generate and logprobs.

    stream: pieces while an answer grows. concurrent: `generate` may be called from several threads, whose requests share
    steps; closing the iterator that it returned cancels its requests. constraint, adapters, embed, score, media: as named.
    An engine may have `likeliest(sequences, count, adapter)`: as `logprobs`, of the `count` likeliest ids in each place.
    """

    capabilities: frozenset[str]  # of: stream concurrent constraint adapters embed score sync sleep media predict

    def generate(self, requests: Sequence[Request], stream: bool = False) -> Iterator[Completion]:
        """Completions, each as soon as it is finished; with `stream`, pieces first. Any order; `index` and `choice` tell.

        A piece's `token_ids`, `logprobs` and `top_logprobs` are of the tokens that it adds; the last completion, with its
        `finish`, has those of the whole answer. Raises RequestError or ValueError for a request that cannot be answered, and
        CapabilityError for an option that the engine does not have.
        """

    def logprobs(
        self, sequences: Sequence[Sequence[int]], adapter: str | None = None, *, samples: Sequence[Sample] = ()
    ) -> list[list[float]]:
        """For each sequence of n ids, n - 1 log-probabilities: of id i + 1 given the ids before it. `samples` is given only to
        engines that take media: the sample of each sequence, which has them."""

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]: ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make the adapter in `folder` usable as `Request.adapter`. Raises RequestError where it does not fit."""

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Requests that use it are finished first. Raises RequestError for a name that is not loaded."""

    def sync_weights(self, weights: Iterator[tuple[str, Any]], version: int) -> None:
        """Replace weights by name; later completions carry `version`."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class EvalRun:
    """What an evaluator works with."""

    engine: Engine
    records: list[Record]
    template: Template
    events: EventSink
    part: Callable[..., Any]


@dataclass(slots=True)
class EvalReport:
    """Figures over all rows, the rows themselves, and how many were scored and refused."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    counts: dict[str, int]


@runtime_checkable
class Evaluator(Protocol):
    def evaluate(self, run: EvalRun) -> EvalReport: ...


# --- parts ------------------------------------------------------------------------------------------------------------


@runtime_checkable
class Metric(Protocol):
    """Part `metric`: a score in [0, 1] of one answer against its reference."""

    def __call__(self, prediction: str, reference: str) -> float: ...


@runtime_checkable
class Reward(Protocol):
    """Part `reward`: how good answers are; higher is better. rows: of each completion, the row that it answers. None of a row
    that it does not judge. One with `waits = True` is asked in a thread beside others; one with `close()` is closed."""

    def __call__(self, completions: list[str], rows: list[Row]) -> Sequence[float | None]: ...


@runtime_checkable
class RowForm(Protocol):
    """Part `rows`: what a trainer's rows become, where it is not what the template makes of a conversation. A trainer's
    manifest names it: `rows = "pairs"`. Samples that belong together are one, see `swift_core.parts`."""

    def encode(self, template: Template, row: Row) -> list[Sample]:
        """As `Template.encode`, with the model's own template. Raises ValueError with the reason to refuse the row."""


@runtime_checkable
class OptimizerPart(Protocol):
    """Part `optimizer`: makes a torch optimizer from parameter groups."""

    def __call__(self, groups: list[dict[str, Any]], learning_rate: float, weight_decay: float) -> Any: ...


@runtime_checkable
class Preparer(Protocol):
    """Part `preparer`: from a session's sources to the samples of each rank. `folder` is `data` in the run's folder."""

    def prepare(self, session: Session, template: Template) -> tuple[Data, Any]:
        """In the parent, before any rank starts: the data, and its account. Raises RequestError where none is left."""

    def fingerprint(self, data: Data) -> str:
        """A hash of all that is trained and evaluated on, in its order: a resumed run must have the same."""

    def hand_over(self, data: Data, folder: Path) -> None:
        """Write what a rank needs to find the data, and `issues.jsonl`: each row that did not go through whole."""

    def receive(self, session: Session, template: Template, folder: Path) -> Data:
        """In a rank: what was handed over."""

    def follow(self, data: Data, folder: Path) -> None:
        """In the main rank: from now on count and list the rows of a stream as they come."""

    def close(self) -> None: ...


PART_PROTOCOLS: dict[str, type] = {
    "metric": Metric, "optimizer": OptimizerPart, "preparer": Preparer, "reward": Reward, "rows": RowForm,
}  # fmt: skip
"""Part kinds with a Protocol. Other kinds (loss tool_format environment logger hub) are passed on unchecked."""
