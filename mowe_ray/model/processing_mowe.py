"""`MoweProcessor`: instructions, waveforms and answers to model inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

AUDIO_TOKEN = "<|audio|>"
IGNORED = -100
# Unicode keeps this code point out of all text: it finds where a chat template puts its content.
_MARK = "\ufdd0"
# More tokens than a tokenizer adds to a text on its own account.
_SPARE_TOKENS = 16


class MoweProcessor(ProcessorMixin):
    """A tokenizer, and the arithmetic of how many audio tokens a clip becomes.

    Args:
        tokenizer: The language model's; gains the audio token if it lacks it.
        frame_layers: (kernel, stride, padding) of the base encoder's layers, from 16 kHz samples to
            frames.
        downsample: Frames per audio token.
        audio_token: Placeholder of a clip in a text.
        max_positions: Longest row the language model takes, in tokens; None for any.
        chat_template: The tokenizer's own is used; here for transformers' sake.

    The names of control tokens (`<|end|>`, `<|audio|>`) in an instruction or answer are text like any other. Only the
    chat template, the placeholders of clips and the end of an answer become control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frame_layers: Sequence[Sequence[int]] = (),
        downsample: int = 8,
        audio_token: str = AUDIO_TOKEN,
        chat_template: str | None = None,
        max_positions: int | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.frame_layers = [list(layer) for layer in frame_layers]
        self.downsample = downsample
        self.audio_token = audio_token
        # Tokenizers of exports have it; those of language models do not.
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]})
        self.audio_token_id: int = tokenizer.get_vocab()[audio_token]
        self.max_positions = max_positions
        self._controls = _control_tokens(tokenizer) | {self.audio_token_id: audio_token}
        self._before, self._after = self._frame()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MoweProcessor:
        """Load the processor of a folder or hub id, as elsewhere in transformers.

        But nobody is asked on the terminal whether code that comes with it may run: `trust_remote_code` is False
        unless it is given.
        """
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        loaded: MoweProcessor = super().from_pretrained(*args, **kwargs)
        return loaded

    def num_audio_tokens(self, samples: int) -> int:
        """Return how many audio tokens `samples` become: ceil(base frames / downsample)."""
        frames = samples
        for kernel, stride, padding in self.frame_layers:
            frames = (frames + 2 * padding - kernel) // stride + 1
        return -(-max(frames, 1) // self.downsample)

    def __call__(
        self,
        instructions: Sequence[str],
        audio: Sequence[Sequence[np.ndarray]] | None = None,
        answers: Sequence[str] | None = None,
    ) -> BatchFeature:
        """Build the inputs of B rows with C clips in all.

        Args:
            instructions: What to do with the audio. May say where each clip goes, with one audio
                token each; otherwise all clips come first.
            audio: Each row's clips, float32 mono at 16 kHz; none for a text-only row.
            answers: Given: training rows, padded on the right. None: prompts, padded on the left.

        Returns:
            `input_ids` (B, N), `attention_mask` (B, N); with answers `labels` (B, N), -100 except
            on the answer and its end; with audio `input_values` (C, S) and `input_lengths` (C,).

        Raises:
            ValueError: if counts of rows disagree, a row with several clips has another number of audio tokens, a
                clip is not a waveform, or a row is longer than the language model takes.
        """
        clips_of = [list(clips) for clips in audio] if audio is not None else [[] for _ in instructions]
        if len(clips_of) != len(instructions) or (answers is not None and len(answers) != len(instructions)):
            raise ValueError(
                f"{len(instructions)} instructions, {len(clips_of)} rows of audio and "
                f"{'no' if answers is None else len(answers)} answers: the numbers must be the same"
            )
        lengths_of = [[len(_check_wave(clip)) for clip in clips] for clips in clips_of]
        prompts = [self._prompt(text, lengths) for text, lengths in zip(instructions, lengths_of, strict=True)]
        endings = [[] for _ in prompts] if answers is None else [self._ending(answer) for answer in answers]
        self._check_positions(prompts, endings)
        inputs = self._pad(prompts, endings, left=answers is None)
        if answers is None:
            del inputs["labels"]
        clips = [clip for row in clips_of for clip in row]
        if clips:
            inputs |= _pad_waves(clips)
        return BatchFeature(inputs)

    def num_tokens(self, instruction: str, lengths: Sequence[int], answer: str | None = None) -> int:
        """Return the length of a row, in tokens.

        Args:
            instruction: What to do with the audio.
            lengths: Samples of each of its clips.
            answer: None for the prompt alone.
        """
        return len(self._prompt(instruction, lengths)) + (0 if answer is None else len(self._ending(answer)))

    def fits(
        self,
        instruction: str,
        lengths: Sequence[int],
        answer: str | None = None,
        new_tokens: int = 0,
        limit: int | None = None,
    ) -> bool:
        """Return whether a row, as for `num_tokens`, and `new_tokens` more are no longer than `limit`.

        Args:
            limit: In tokens; None takes the positions of the language model.
        """
        limit = self.max_positions if limit is None else limit
        if limit is None:
            return True
        # No text has more tokens than bytes, so that most rows need not be tokenized to know.
        size = len(instruction.encode(errors="replace")) + len((answer or "").encode(errors="replace")) + new_tokens
        size += sum(map(self.num_audio_tokens, lengths)) + 2 * len(lengths)
        if size + len(self._before) + len(self._after) + _SPARE_TOKENS <= limit:
            return True
        return self.num_tokens(instruction, lengths, answer) + new_tokens <= limit

    def _prompt(self, instruction: str, lengths: Sequence[int]) -> list[int]:
        """Return the tokens before the answer, with as many audio tokens as clips of these lengths become."""
        texts = self._texts_around_clips(instruction, len(lengths))
        tokens = self._whole_prompt(self.audio_token.join(texts))
        placed = len(self._before_controls) + len(lengths)
        unknown = self.tokenizer.unk_token
        names_unknown = unknown is not None and unknown in instruction
        # More of them than were placed: the instruction names control tokens.
        if names_unknown or sum(token in self._controls for token in tokens) != placed:
            tokens = list(self._before)
            for number, text in enumerate(texts):
                tokens += [self.audio_token_id] * (number > 0) + self._text_tokens(text)
            tokens += self._after
        counts = iter([self.num_audio_tokens(length) for length in lengths])
        expanded: list[int] = []
        for token in tokens:
            expanded += [token] * (next(counts) if token == self.audio_token_id else 1)
        return expanded

    def _texts_around_clips(self, instruction: str, clips: int) -> list[str]:
        """Return the `clips` + 1 texts before, between and behind the clips."""
        texts = instruction.split(self.audio_token)
        if clips and len(texts) == clips + 1:
            return texts
        if clips > 1 and len(texts) > 1:
            raise ValueError(
                f"the instruction has {len(texts) - 1} {self.audio_token} but the row has {clips} clips: "
                f"{instruction!r}"
            )
        return ["", *["\n"] * (clips - 1), f"\n{instruction}"] if clips else [instruction]

    def _whole_prompt(self, content: str) -> list[int]:
        """Return the tokens of a prompt in which every name of a control token is one."""
        if self.tokenizer.chat_template:
            return list(self.tokenizer(self._in_template(content), add_special_tokens=False)["input_ids"])
        tokens: list[int] = self.tokenizer(content + "\n")["input_ids"]
        # Some tokenizers end every text; here the answer is still to come.
        while tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return tokens

    def _in_template(self, content: str) -> str:
        turn = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens before and behind the content of a prompt."""
        if not self.tokenizer.chat_template:
            tokens = self._whole_prompt("")
            controls = [token for token in tokens if token in self._controls]
            return controls, [token for token in tokens if token not in self._controls]
        before, _, after = self._in_template(_MARK).partition(_MARK)
        tokenize = self.tokenizer
        return (
            list(tokenize(before, add_special_tokens=False)["input_ids"]),
            list(tokenize(after, add_special_tokens=False)["input_ids"]),
        )

    @property
    def _before_controls(self) -> list[int]:
        """Control tokens of an empty prompt."""
        return [token for token in (*self._before, *self._after) if token in self._controls]

    def _text_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text in which names of control tokens are text."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self._controls.keys().isdisjoint(tokens):
            return tokens
        # Added tokens that are not marked as special are still found: cut their names in two.
        names = "|".join(re.escape(name) for name in sorted(self._controls.values(), key=len, reverse=True) if name[1:])
        pieces = re.sub(f"(?={names})(.)", lambda match: match[1] + _MARK, text, flags=re.DOTALL).split(_MARK)
        return [
            token
            for piece in pieces
            for token in self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]

    def _ending(self, answer: str) -> list[int]:
        """Return the tokens to learn: the answer and its end."""
        return [*self._text_tokens(answer), self.tokenizer.eos_token_id]

    def _check_positions(self, prompts: list[list[int]], endings: list[list[int]]) -> None:
        longest = max((len(p) + len(e) for p, e in zip(prompts, endings, strict=True)), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            raise ValueError(f"a row has {longest} tokens, but the language model takes {self.max_positions}")

    def _pad(self, prompts: list[list[int]], endings: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
        width = max(len(prompt) + len(ending) for prompt, ending in zip(prompts, endings, strict=True))
        filler = self.tokenizer.pad_token_id
        # Some language models have no padding token; the attention mask hides it anyway.
        filler = self.tokenizer.eos_token_id if filler is None else filler
        inputs: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, ending in zip(prompts, endings, strict=True):
            length = len(prompt) + len(ending)
            padding = width - length
            before, after = (padding, 0) if left else (0, padding)
            inputs["input_ids"].append([filler] * before + prompt + ending + [filler] * after)
            inputs["attention_mask"].append([0] * before + [1] * length + [0] * after)
            # Only the answer and its end are learned, never the instruction.
            inputs["labels"].append([IGNORED] * (before + len(prompt)) + ending + [IGNORED] * after)
        return {name: torch.tensor(rows) for name, rows in inputs.items()}

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_values", "input_lengths"]


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


def _check_wave(clip: np.ndarray) -> np.ndarray:
    if clip.ndim != 1 or not len(clip) or not np.issubdtype(clip.dtype, np.floating):
        raise ValueError(
            f"a clip must be a non-empty one-dimensional float array at 16 kHz, not {clip.dtype} of shape {clip.shape}"
        )
    return clip


def _pad_waves(clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Stack clips, filled up with silence, into `input_values` (C, S) and `input_lengths` (C,)."""
    values = np.zeros((len(clips), max(map(len, clips))), dtype=np.float32)
    for row, clip in zip(values, clips, strict=True):
        row[: len(clip)] = clip
    return {
        "input_values": torch.from_numpy(values),
        "input_lengths": torch.tensor([len(clip) for clip in clips]),
    }
