"""Conversations in tokens: through the chat template of a language model, with texts that stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Unicode keeps this code point out of all text: it finds where a chat template puts its content.
_MARK = "\ufdd0"


class SplitTurn(NamedTuple):
    """One turn of a conversation with C clips: the C + 1 texts before, between and behind them."""

    role: str
    texts: Sequence[str]


class ChatTokens:
    """Writes conversations as tokens, with one audio token a clip.

    Without a chat template a turn of the assistant ends with the tokenizer's end of text, any other with a line break.
    The names of control tokens in a text are text like any other: only the template and the places of clips become
    control tokens.

    Args:
        tokenizer: The language model's, with the audio token.
        audio_token: Placeholder of a clip.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, audio_token: str):
        self._tokenizer, self._audio_token = tokenizer, audio_token
        self._audio_token_id: int = tokenizer.get_vocab()[audio_token]
        self._controls = _control_tokens(tokenizer) | {self._audio_token_id: audio_token}
        self._frames: dict[Any, list[list[int] | int]] = {}
        self._end: list[int] | None = None

    def write(self, turns: Sequence[SplitTurn], *, add_generation_prompt: bool = True, **options: Any) -> str:
        """Return a conversation as the language model reads it.

        Args:
            turns: The conversation.
            add_generation_prompt: Begin the assistant's next turn.
            **options: For the tokenizer's `apply_chat_template`.

        Raises:
            ValueError: if the template refuses the conversation.
        """
        contents = [self._audio_token.join(turn.texts) for turn in turns]
        return self._in_template([turn.role for turn in turns], contents, add_generation_prompt, options)

    def tokens(self, turns: Sequence[SplitTurn], *, add_generation_prompt: bool = True, **options: Any) -> list[int]:
        """Return the tokens of what `write` writes, with control tokens only where they belong."""
        frame = self._frame([turn.role for turn in turns], add_generation_prompt, options)
        placed = [part for part in frame if isinstance(part, int)]
        if any(len(turn.texts) > 1 and placed.count(number) != 1 for number, turn in enumerate(turns)):
            raise ValueError("the chat template leaves out a turn with a clip: put it into another turn")
        tokens = self.whole(self.write(turns, add_generation_prompt=add_generation_prompt, **options))
        controls = sum(token in self._controls for part in frame if not isinstance(part, int) for token in part)
        controls += sum(len(turns[number].texts) - 1 for number in placed)
        unknown = self._tokenizer.unk_token
        names_unknown = unknown is not None and any(unknown in text for turn in turns for text in turn.texts)
        # More of them than were placed: a text names control tokens.
        if not names_unknown and sum(token in self._controls for token in tokens) == controls:
            return tokens
        written: list[int] = []
        for part in frame:
            for position, text in enumerate(turns[part].texts) if isinstance(part, int) else ():
                written += [self._audio_token_id] * (position > 0) + self.text_tokens(text)
            written += [] if isinstance(part, int) else part
        return written

    def prompt(self, turns: Sequence[SplitTurn], learned: Sequence[bool]) -> tuple[list[int], list[bool]]:
        """Return the tokens up to the next answer, and which of them are learned.

        These are the contents of the assistant's turns, each as the answer of a row of its own would be, and their ends
        as the template writes them.

        Args:
            turns: The last one is the user's.
            learned: Whether a turn of the assistant is.

        Raises:
            ValueError: if the template refuses the conversation.
        """
        turns, learned = self._without_refused_system(turns, learned)
        parts = self._parts([turn.role for turn in turns], True, {})
        tokens: list[int] = []
        marks: list[bool] = []
        chunk: list[str | int] = []
        ends = False  # whether the chunk begins with the end of a turn that is learned
        for part in [*parts, None]:
            if part is not None and not (isinstance(part, int) and turns[part].role == "assistant"):
                chunk.append(part)
                continue
            between = self._joined(chunk, turns, first=not tokens)
            tokens += between
            end = self.answer_end()
            marks += [ends and between[: len(end)] == end and place < len(end) for place in range(len(between))]
            if part is not None:
                assert isinstance(part, int), "texts of the template were appended"
                answer = self.text_tokens("".join(turns[part].texts))
                tokens, marks, ends, chunk = tokens + answer, marks + [learned[part]] * len(answer), learned[part], []
        return tokens, marks

    def _joined(self, chunk: Sequence[str | int], turns: Sequence[SplitTurn], *, first: bool) -> list[int]:
        """Return the tokens of texts of the template and of turns between two answers."""
        contents = [self._audio_token.join(turns[part].texts) if isinstance(part, int) else part for part in chunk]
        text = "".join(contents)
        tokens = self.whole(text) if first else self._literal_tokens(text)
        pieces: list[int] = [token for token in self.whole("\n") if first and token in self._controls]
        pieces = [] if self._tokenizer.chat_template else pieces
        for part in chunk:
            for position, piece in enumerate(turns[part].texts) if isinstance(part, int) else ():
                pieces += [self._audio_token_id] * (position > 0) + self.text_tokens(piece)
            pieces += [] if isinstance(part, int) else self._literal_tokens(part)
        unknown = self._tokenizer.unk_token
        names_unknown = unknown is not None and any(
            unknown in piece for part in chunk if isinstance(part, int) for piece in turns[part].texts
        )
        controls = [sum(token in self._controls for token in found) for found in (tokens, pieces)]
        # More of them than were placed: a text names control tokens.
        return pieces if names_unknown or controls[0] != controls[1] else tokens

    def answer_end(self) -> list[int]:
        """Return the tokens to learn behind an answer: up to the end of turn of the template, or the end of text."""
        if self._end is None:
            try:
                *_, behind = self._frame(["user", "assistant"], False, {})
            except ValueError:
                behind = []
            tokens = behind if isinstance(behind, list) else []
            place = next((place for place, token in enumerate(tokens) if token in self._controls), None)
            self._end = [self._tokenizer.eos_token_id] if place is None else tokens[: place + 1]
        return self._end

    def _without_refused_system(
        self, turns: Sequence[SplitTurn], learned: Sequence[bool]
    ) -> tuple[Sequence[SplitTurn], Sequence[bool]]:
        """Return turns whose system text is in the first question, if the template refuses or drops its turn."""
        if turns[0].role != "system":
            return turns, learned
        try:
            if 0 in self._parts([turn.role for turn in turns], True, {}):
                return turns, learned
        except ValueError:
            pass  # the template says so only by an error of its own
        system, asked, *others = turns
        first, *texts = asked.texts
        return [SplitTurn(asked.role, [f"{''.join(system.texts)}\n\n{first}", *texts]), *others], learned[1:]

    def whole(self, text: str) -> list[int]:
        """Return the tokens of a prompt in which every name of a control token is one."""
        if self._tokenizer.chat_template:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        # Some tokenizers end every text; here the answer is still to come.
        while tokens and tokens[-1] == self._tokenizer.eos_token_id and not text.endswith(self._tokenizer.eos_token):
            tokens = tokens[:-1]
        return tokens

    def text_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text in which names of control tokens are text."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self._controls.keys().isdisjoint(tokens):
            return tokens
        # Added tokens that are not marked as special are still found: cut their names in two.
        names = "|".join(re.escape(name) for name in sorted(self._controls.values(), key=len, reverse=True) if name[1:])
        pieces = re.sub(f"(?={names})(.)", lambda match: match[1] + _MARK, text, flags=re.DOTALL).split(_MARK)
        return [
            token
            for piece in pieces
            for token in self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]

    def end_tokens(self) -> list[int]:
        """Return the tokens that end an answer: the end of text, and what the template writes behind a turn."""
        ends = [self._tokenizer.eos_token_id]
        try:
            *_, behind = self._frame(["user", "assistant"], False, {})
        except ValueError:
            return ends
        controls = [token for token in behind if token in self._controls] if isinstance(behind, list) else []
        return list(dict.fromkeys([*ends, *controls[:1]]))

    def frame_size(self) -> int:
        """Return how many tokens surround a single question."""
        return sum(len(part) for part in self._frame(["user"], True, {}) if not isinstance(part, int))

    def _frame(self, roles: list[str], prompt: bool, options: dict[str, Any]) -> list[list[int] | int]:
        """Return what surrounds the turns of these roles: tokens, and the numbers of turns in their places."""
        key = (*roles, prompt) if not options else None
        if key not in self._frames:
            parts = self._parts(roles, prompt, options)
            frame = [part if isinstance(part, int) else self._literal_tokens(part) for part in parts]
            if not self._tokenizer.chat_template:
                # What the tokenizer itself puts before every text.
                frame.insert(0, [token for token in self.whole("\n") if token in self._controls])
            if key is None:
                return frame
            self._frames[key] = frame
        return self._frames[key]

    def _parts(self, roles: list[str], prompt: bool, options: dict[str, Any]) -> list[str | int]:
        """Return what surrounds the turns of these roles as text, and the numbers of turns in their places."""
        marked = self._in_template(roles, [f"{_MARK}{n}{_MARK}" for n in range(len(roles))], prompt, options)
        parts = re.split(f"{_MARK}(\\d+){_MARK}", marked)
        return [int(part) if position % 2 else part for position, part in enumerate(parts)]

    def _literal_tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _in_template(self, roles: list[str], contents: list[str], prompt: bool, options: dict[str, Any]) -> str:
        if not (self._tokenizer.chat_template or options.get("chat_template")):
            ends = [self._tokenizer.eos_token if role == "assistant" else "\n" for role in roles]
            if options.get("continue_final_message"):
                ends[-1] = ""
            return "".join(content + end for content, end in zip(contents, ends, strict=True))
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **options)
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the names of the tokens that steer a language model, by id.

    These are the special ones, and other added tokens that the chat template writes; added tokens for runs of spaces
    or for HTML tags are text, and so is the token of unknown characters.
    """
    template = str(tokenizer.chat_template or "")
    controls = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (len(token.content.strip()) > 1 and token.content in template)
    }
    controls |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: name for number, name in controls.items() if number != tokenizer.unk_token_id}
