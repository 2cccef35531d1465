"""What answers hold, for the OpenAPI description and for whoever reads it. They are made as plain dicts; tests compare."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    """OpenAI's error form."""

    error: ErrorBody


class CachedTokens(Reply):
    cached_tokens: int


class PredictedTokens(Reply):
    """Tokens that were guessed, with a draft model or n-grams."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageReply(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictedTokens


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class FunctionCall(Reply):
    name: str
    arguments: str


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


Finish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Reply):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish
    token_ids: list[int] | None = None


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: UsageReply
    prompt_token_ids: list[int] | None = None


class PromptLogprob(Reply):
    logprob: float
    decoded_token: str


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionReply(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[CompletionChoice]
    usage: UsageReply


class ModelReply(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int | None
    capabilities: list[str]


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelReply]


class PromptUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Reply):
    object: Literal["list"]
    data: list[EmbeddingReply]
    model: str
    usage: PromptUsage


class DocumentReply(Reply):
    text: str


class Ranked(Reply):
    index: int
    relevance_score: float
    document: DocumentReply | None = None


class RerankReply(Reply):
    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage


class TokenizeReply(Reply):
    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str] | None = None


class DetokenizeReply(Reply):
    prompt: str


class Health(Reply):
    status: Literal["ok"]
    model: str
    running: int
    waiting: int


class AdapterReply(Reply):
    name: str
    loaded: bool


class Deleted(Reply):
    id: str
    object: Literal["response"]
    deleted: bool


class ResponseReply(BaseModel):
    """OpenAI's response object; its items are as OpenAI describes them."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
