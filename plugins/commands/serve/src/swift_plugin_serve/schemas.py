"""What requests hold: OpenAI's fields, and a few of our own. An unknown field is refused, so that none is left out in silence.

Fields whose type is `Ignored` are OpenAI's too; they change nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

Ignored = Annotated[Any, Field(default=None, description="Accepted; it changes nothing here.")]
Text = str
Whole = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Stop = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class Body(BaseModel):
    """A request's body, or a part of it that has no unknown field."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Open(BaseModel):
    """A part of a body whose further keys go on as they are."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


# --- messages ---------------------------------------------------------------------------------------------------------


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class Address(Open):
    url: str = Field(description="A data: URI; an http(s) address where the server allows it.")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Address


class VideoPart(Body):
    type: Literal["video_url"]
    video_url: Address


class AudioUrlPart(Body):
    type: Literal["audio_url"]
    audio_url: Address


class Sound(Body):
    data: str = Field(description="base64")
    format: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,16}$")]


class AudioPart(Body):
    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | RefusalPart | ImagePart | VideoPart | AudioUrlPart | AudioPart, Field(discriminator="type")]


class CalledFunction(Open):
    name: str
    arguments: str


class MessageCall(Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    """A message. Keys beyond these reach the model's chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


# --- tools and forms --------------------------------------------------------------------------------------------------


class Function(Open):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class Allowed(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["auto", "none", "required"] | NamedTool | Allowed


class JsonSchema(Body):
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """One of them, of our own: what the answer must be."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = Field(None, description="Lark, in llguidance's dialect")


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


# --- what all generation shares ---------------------------------------------------------------------------------------


class Sampling(Body):
    """How tokens are chosen, and told. `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids`,
    `return_token_ids` and `return_tokens_as_token_ids` are beyond OpenAI's, and as vLLM has them."""

    model: Name
    stream: StrictBool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: list[TokenId] | None = None
    return_token_ids: StrictBool | None = Field(None, description="Tell the ids of prompt and answer.")
    return_tokens_as_token_ids: StrictBool | None = Field(None, description="In log-probabilities, token_id:5 for a token.")
    user: Ignored = None
    metadata: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None


class Penalised(Sampling):
    """Further options that chat and completions share."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Penalised):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Whole | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: Whole | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Ignored = None
    prediction: Ignored = None


class CompletionRequest(Penalised):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="Default: 16, as OpenAI's.")
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = Field(
        None, description="vLLM's: of each token of the prompt, and of so many of the likeliest in its place."
    )
    best_of: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    suffix: str | None = Field(None, description="Refused: models here do not fill in.")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


# --- responses --------------------------------------------------------------------------------------------------------


class ResponsePart(Open):
    """A part of a message: input_text, output_text, refusal, input_image or input_audio."""

    type: Literal[
        "input_text", "output_text", "text", "refusal", "input_image", "input_audio", "reasoning_text", "summary_text"
    ]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = Field(None, description="A data: URI.")
    input_audio: Sound | None = None


class InputMessage(Open):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ResponsePart]


class InputCall(Open):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(Open):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[ResponsePart]


class InputReasoning(Open):
    type: Literal["reasoning"]
    content: list[ResponsePart] | None = None
    summary: list[ResponsePart] | None = None


class ResponseTool(Body):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamed(Body):
    type: Literal["function"]
    name: FunctionName


class ResponseAllowed(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ResponseNamed]


class ResponseSchemaFormat(Body):
    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseText(Body):
    format: Annotated[TextFormat | JsonObjectFormat | ResponseSchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Sampling):
    """POST /v1/responses."""

    input: str | Annotated[list[InputMessage | InputCall | InputCallOutput | InputReasoning], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Whole | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ResponseNamed | ResponseAllowed | None = None
    parallel_tool_calls: StrictBool | None = None
    text: ResponseText | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    truncation: Literal["disabled"] | None = None
    store: StrictBool | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None


# --- other endpoints --------------------------------------------------------------------------------------------------


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Name
    input: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | (Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)])
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = Field(None, description="The first so many numbers, made a vector of length 1 again.")
    user: Ignored = None


class Document(Body):
    text: str


class RerankRequest(Body):
    """POST /v1/rerank, in Cohere's and Jina's form."""

    model: Name
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=2048)]
    top_n: Whole | None = None
    return_documents: StrictBool | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages as the chat template renders them."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: StrictBool | None = Field(None, description="Of a text; default: yes.")
    return_token_strs: StrictBool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: list[TokenId]


class LoadAdapterRequest(Body):
    """POST /v1/load_adapter."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(description="A folder below --adapter-root.")


class UnloadAdapterRequest(Body):
    """POST /v1/unload_adapter."""

    name: Name
