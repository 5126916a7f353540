"""Text to token ids the way the model was trained to see them, without torch or transformers.

Owns: rendering a chat template (Hugging Face's `chat_template`, a sandboxed Jinja template) and encoding with
the fast tokenizer (`tokenizer.json`). Does not own: reading files; callers pass their contents.
The gateway and the worker render through this one module, so a prompt has one meaning in both.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, Final

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from bon_algos.contracts import Message, Tool, ToolCall
from bon_algos.tool_calls import CallFormat, format_of_template


class TemplateRefused(ValueError):
    """The chat template does not accept these messages; the text is the template's own reason."""


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which templates for models do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


_MOST_GROWTH: Final[Mapping[str | None, int]] = {None: 1, "NFC": 3}
"""Of a text's bytes by a normaliser (Unicode Standard Annex 15, table of expansion factors for UTF-8)."""


def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    compiled = environment.from_string(template)
    # Looked up at every rendering: in the chain of mappings that Jinja makes this takes as long as the rendering.
    compiled.globals = dict(compiled.globals)
    return compiled


class ChatTokenizer:
    """A model's tokenizer and chat template.

    tokenizer_json: contents of `tokenizer.json`. tokenizer_config: `tokenizer_config.json`, parsed; its special
    tokens are visible to the template. chat_template: contents of `chat_template.jinja` when the model has that
    file, else the config's own entry is used.
    """

    def __init__(
        self, tokenizer_json: str, tokenizer_config: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        source = chat_template if chat_template is not None else tokenizer_config.get("chat_template")
        self._source: str | None = source if isinstance(source, str) else None
        self._template = _compile(self._source) if self._source is not None else None
        self._special = {
            name: text
            for name, value in tokenizer_config.items()
            if name.endswith("_token") and (text := _token_text(value)) is not None
        }
        parsed = json.loads(tokenizer_json)
        self._controls = _Controls(parsed.get("added_tokens") or ())
        normalizer = parsed.get("normalizer")
        self._growth = _MOST_GROWTH.get(None if normalizer is None else normalizer["type"])
        self.vocabulary_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        """Tokens, special ones included."""
        self._num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        digest = hashlib.sha256(tokenizer_json.encode())
        digest.update((self._source or "").encode())
        self.template_digest = digest.hexdigest()[:16]
        """Of tokenizer and template together: groups with different digests did not see the same prompts."""

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a completion; None where the tokenizer's configuration names none."""
        return self._tokenizer.token_to_id(self._special.get("eos_token", ""))

    @property
    def call_format(self) -> CallFormat | None:
        """How the template has tool calls written; None where it has no place for tools, or we cannot read them."""
        return format_of_template(self._source or "")

    @property
    def shows_calls(self) -> bool:
        """Whether the template has a place for calls that were made."""
        return "tool_calls" in (self._source or "")

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Tool] = ()) -> str:
        """The conversation as the model reads it. Raises TemplateRefused, also when there is no template."""
        listed = [_tool_for_template(tool) for tool in tools]
        return self.renderer(listed, add_generation_prompt)([_for_template(message) for message in messages])

    def renderer(
        self, tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> Callable[[Sequence[Mapping[str, Any]]], str]:
        """How messages are rendered, both as a template reads them. What Jinja puts around its variables takes as long
        as a rendering, and is made once. Raises TemplateRefused, here when there is no template."""
        template = self._template
        if template is None:
            raise TemplateRefused("this model has no chat template: send `prompt` instead of `messages`")
        context = template.new_context(
            {"tools": tools or None, "add_generation_prompt": add_generation_prompt, **self._special}
        )

        def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
            # Without what the template has set for other messages.
            context.vars.clear()
            context.exported_vars.clear()
            context.vars["messages"] = messages
            try:
                return "".join(template.root_render_func(context))
            except jinja2.exceptions.TemplateError as error:
                raise TemplateRefused(str(error)) from error
            except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
                # What it says may hold what was sent.
                raise TemplateRefused("it fails on one of them") from error

        return rendered

    def encode_messages(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Tool] = ()
    ) -> tuple[str, list[int]]:
        """The conversation as `render` has it, and its token ids. Only the template writes special tokens: one that
        somebody names in a message or a tool stays text. Raises TemplateRefused."""
        plain, listed = [_for_template(message) for message in messages], [_tool_for_template(tool) for tool in tools]
        rendered = self.renderer(listed, add_generation_prompt)(plain)
        mark = secrets.token_hex(16)
        marked, marked_list = self._marked(plain, mark), self._marked(listed, mark)
        if (marked, marked_list) == (plain, listed):
            return rendered, self.encode_chat(rendered)
        # Each stretch is encoded by itself, so that none of them holds a name that is cut by a mark.
        stretches = self.renderer(marked_list, add_generation_prompt)(marked).split(mark)
        if "".join(stretches) != rendered:
            raise TemplateRefused("it changes a text that names a special token")
        encoded = self.encode_all(stretches, add_special_tokens=False)
        return rendered, [token for ids in encoded for token in ids]

    def _marked(self, value: Any, mark: str) -> Any:
        """The same, with a mark behind the first character of each special token's name in its texts."""
        match value:
            case str() if starts := self._controls.starts(value):
                cuts = [0, *(start + 1 for start in starts), len(value)]
                return mark.join(value[a:b] for a, b in pairwise(cuts))
            case list():
                return [self._marked(one, mark) for one in value]
            case dict():
                return {self._marked(name, mark): self._marked(one, mark) for name, one in value.items()}
        return value

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation; the template has already written the special tokens."""
        return self._tokenizer.encode(rendered, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of plain text, with the special tokens (BOS) that the model expects in front."""
        return self._tokenizer.encode(prompt, add_special_tokens=True).ids

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """As `encode_chat` or `encode_prompt` would each, in less time."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in encoded]

    def surely_fits(self, text: str, window: int) -> bool:
        """Whether the text takes no more tokens than the window has, as far as can be told without tokenising: a token
        stands for a byte or more, but for one blank that some tokenizers write in front, and the special ones."""
        if self._growth is None:
            return False
        return self._growth * len(text.encode()) + 1 + self._num_special <= window

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_token(self, token_id: int) -> str:
        """The text of one token, a special one by its name; part of a character is the replacement character."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class _Controls:
    """The names of a tokenizer's special tokens, as far as they can be cut."""

    def __init__(self, added_tokens: Sequence[Mapping[str, Any]]) -> None:
        names = [token["content"] for token in added_tokens if token["special"] and len(token["content"]) > 1]
        self._heads = {name[:2] for name in names}
        self._pattern = re.compile(f"(?={'|'.join(map(re.escape, names))})")

    def starts(self, text: str) -> list[int]:
        """Where a name begins, also inside another one."""
        # Most texts have none, which is found out a hundred times faster so.
        if not any(head in text for head in self._heads):
            return []
        return [found.start() for found in self._pattern.finditer(text)]


def _for_template(message: Message) -> dict[str, Any]:
    """As Hugging Face's templates expect it: what a message does not have is not there."""
    calls = [_call_for_template(call) for call in message.tool_calls]
    return {
        "role": message.role,
        "content": message.content,
        **({"tool_calls": calls} if calls else {}),
        **({} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id}),
    }


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool_for_template(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.parameters}}


def _token_text(value: object) -> str | None:
    """A special token stands in the config as a string or as an object with its content."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return str(value["content"])
    return None


def reward_token_ids(
    tokenizer: ChatTokenizer, prompt: str, messages: Sequence[Message] | None, completion: str
) -> list[int]:
    """What the reward model reads, as `reward_writer` has it. Raises TemplateRefused."""
    return encode_reward_texts(tokenizer, [reward_writer(tokenizer, prompt, messages)(completion)])[0]


def reward_writer(tokenizer: ChatTokenizer, prompt: str, messages: Sequence[Message] | None) -> Callable[[str], str]:
    """What the reward model reads of a completion: prompt and completion as a conversation in its own template, the
    completion as the assistant's turn; a plain prompt is the user's turn. Without a template: the two texts joined.
    Calls that the template has no place for stand as JSON in the turn that made them. What is found raises
    TemplateRefused.
    """
    if not tokenizer.has_template:
        said = [_spelled_out(message).content for message in messages or ()]
        before = prompt if messages is None else "\n".join(said) + "\n"
        return lambda completion: before + completion
    render = tokenizer.renderer((), add_generation_prompt=False)
    turns = [Message(role="user", content=prompt)] if messages is None else list(messages)
    if not tokenizer.shows_calls:
        turns = [_spelled_out(message) for message in turns]
    before_it = [_for_template(message) for message in turns]
    return lambda completion: render([*before_it, {"role": "assistant", "content": completion}])


def encode_reward_texts(tokenizer: ChatTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each. Where there is a template it has written the special tokens."""
    return tokenizer.encode_all(texts, add_special_tokens=not tokenizer.has_template)


def _spelled_out(message: Message) -> Message:
    lines = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in message.tool_calls]
    if not lines:
        return message
    return Message(role=message.role, content="\n".join([message.content] * bool(message.content) + lines))
