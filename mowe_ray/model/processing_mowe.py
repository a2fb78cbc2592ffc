"""`MoweProcessor`: instructions or conversations, waveforms and answers to model inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.audio_utils import load_audio

from .chat import ChatTokens, SplitTurn
from .frontends import SAMPLE_RATE, count_frames

try:
    import soxr
except ImportError:  # where an export is used without this package
    soxr = None

AUDIO_TOKEN = "<|audio|>"
IGNORED = -100
# More tokens than a tokenizer adds to a text on its own account.
_SPARE_TOKENS = 16

# Where a clip goes in a text of a conversation; Unicode keeps this code point out of all text.
CLIP = "\ufdd1"

Clips = Sequence[np.ndarray]
# Tokens, and which of them are learned.
_Prompt = tuple[list[int], list[bool]]


class MoweInputs(BatchFeature):
    """Inputs of the model; a change of type leaves the waveforms as they are, which bfloat16 would make noise of."""

    def to(self, *args: Any, **kwargs: Any) -> MoweInputs:
        """Move and convert all but the type of `input_values`."""
        waves = self.pop("input_values", None)
        super().to(*args, **kwargs)
        if waves is not None:
            self["input_values"] = waves.to(self["input_ids"].device)
        return self


class MoweProcessor(ProcessorMixin):
    """A tokenizer, and the arithmetic of how many audio tokens a clip becomes.

    Args:
        tokenizer: The language model's; gains the audio token if it lacks it.
        frame_layers: (kernel, stride, padding) of the base encoder's layers, from 16 kHz samples to
            frames.
        chunk_samples: Samples after which these layers begin anew; 0: never.
        downsample: Frames per audio token.
        audio_token: Placeholder of a clip in a text.
        max_positions: Longest row the language model takes, in tokens; None for any.
        extra_tokens: Audio tokens of a clip besides those of its frames.
        chat_template: The tokenizer's own is used; here for transformers' sake.

    The names of control tokens (`<|end|>`, `<|audio|>`) in an instruction, answer or message are text like any other.
    Only the chat template, the placeholders of clips and the end of an answer become control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frame_layers: Sequence[Sequence[int]] = (),
        downsample: int = 8,
        audio_token: str = AUDIO_TOKEN,
        chat_template: str | None = None,
        max_positions: int | None = None,
        extra_tokens: int = 0,
        chunk_samples: int = 0,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.frame_layers, self.chunk_samples = [list(layer) for layer in frame_layers], chunk_samples
        self.downsample = downsample
        self.extra_tokens = extra_tokens
        self.audio_token = audio_token
        # Tokenizers of exports have it; those of language models do not.
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]})
        self.audio_token_id: int = tokenizer.get_vocab()[audio_token]
        self.max_positions = max_positions
        self.chat = ChatTokens(tokenizer, audio_token)

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
        """Return how many audio tokens `samples` become: ceil(base frames / downsample) + `extra_tokens`."""
        frames = count_frames(samples, self.frame_layers, self.chunk_samples)
        return -(-frames // self.downsample) + self.extra_tokens

    def __call__(
        self,
        instructions: Sequence[str] | None = None,
        audio: Sequence[Clips] | Clips | np.ndarray | None = None,
        answers: Sequence[str] | None = None,
        *,
        histories: Sequence[Sequence[tuple[str, str, bool]]] | None = None,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | None = SAMPLE_RATE,
        **_: Any,
    ) -> MoweInputs:
        """Build the inputs of B rows with C clips in all.

        Args:
            instructions: What to do with the audio. May say where each clip goes, with one audio
                token each; otherwise all clips come first.
            audio: Each row's clips, float32 mono; none for a text-only row. With `text` also one clip, or one flat list
                in the order of the audio tokens.
            answers: Given: training rows, padded on the right. None: prompts, padded on the left.
            histories: Turns before each instruction: role, text, and whether a turn of the assistant is learned. Here
                and in instructions, the code point `CLIP` is where a clip goes, and nothing else is.
            text: Whole prompts, as `apply_chat_template` writes them, in place of `instructions`.
            sampling_rate: Of `audio`; what is not at 16 kHz is resampled.
            **_: What transformers passes to every processor (`return_tensors`, `padding`).

        Returns:
            `input_ids` (B, N), `attention_mask` (B, N); with answers `labels` (B, N), -100 except
            on answers and their ends; with audio `input_values` (C, S) and `input_lengths` (C,).

        Raises:
            ValueError: if counts of rows disagree, a row with several clips has another number of audio tokens, a
                clip is not a waveform, or a row is longer than the language model takes.
        """
        if (text is None) == (instructions is None):
            raise ValueError("give either `text`, whole prompts, or `instructions`")
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            rows = self._dealt(texts, _resampled(_flat(audio), sampling_rate))
            return self._inputs([_unlearned(self.chat.whole(prompt)) for prompt in texts], rows)
        assert instructions is not None
        given = [list(clips) for clips in audio] if audio is not None else [[] for _ in instructions]
        if len(given) != len(instructions) or (answers is not None and len(answers) != len(instructions)):
            raise ValueError(
                f"{len(instructions)} instructions, {len(given)} rows of audio and "
                f"{'no' if answers is None else len(answers)} answers: the numbers must be the same"
            )
        rows = [_resampled(cast("list[np.ndarray]", clips), sampling_rate) for clips in given]
        before = histories or [()] * len(instructions)
        prompts = [self._prompt(*row) for row in zip(instructions, map(len, rows), before, strict=True)]
        return self._inputs(prompts, rows, None if answers is None else [self._ending(answer) for answer in answers])

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sampling_rate: int = SAMPLE_RATE,
        **options: Any,
    ) -> Any:
        """Write conversations as prompts, as elsewhere in transformers.

        Args:
            conversation: Messages with `role` and `content`, or a batch of conversations. A content is a text, or a
                list of `{"type": "text", "text": ...}` and `{"type": "audio", "audio": waveform, path, URL or base64}`
                in any order, each in a line of its own.
            chat_template: In place of the tokenizer's.
            tokenize: Return model inputs, not text.
            return_dict: All of them, not `input_ids` alone.
            add_generation_prompt: Begin the assistant's next turn.
            processor_kwargs: Of these, `sampling_rate` counts.
            sampling_rate: Of waveforms; what is not at 16 kHz is resampled.
            **options: `continue_final_message`, `tools`, `documents`, and variables of the template.

        Raises:
            ValueError: if a part is neither text nor audio, or the template refuses the conversation.
        """
        rate = int((processor_kwargs or {}).get("sampling_rate") or sampling_rate)
        is_batch = not isinstance(conversation[0], Mapping)
        conversations = [_turns(messages) for messages in (conversation if is_batch else [conversation])]
        settings = {name: value for name, value in options.items() if name not in _OF_TRANSFORMERS}
        settings |= {"chat_template": chat_template} if chat_template else {}
        settings["add_generation_prompt"] = add_generation_prompt
        if not tokenize:
            written = [self.chat.write(turns, **settings) for turns, _ in conversations]
            return written if is_batch else written[0]
        prompts = [_unlearned(self.chat.tokens(turns, **settings)) for turns, _ in conversations]
        clips = [[_at_16khz(clip, rate) for clip in found] for _, found in conversations]
        inputs = self._inputs(prompts, clips)
        return inputs if return_dict else inputs["input_ids"]

    def _inputs(
        self, prompts: Sequence[_Prompt], clips_of: Sequence[Clips], endings: Sequence[list[int]] | None = None
    ) -> MoweInputs:
        """Return the inputs of rows of tokens, with one audio token for each of their clips, and of 16 kHz clips."""
        lengths_of = [[len(_check_wave(clip)) for clip in clips] for clips in clips_of]
        rows = [self._expanded(prompt, lengths) for prompt, lengths in zip(prompts, lengths_of, strict=True)]
        ends = [[] for _ in rows] if endings is None else list(endings)
        self._check_positions(rows, ends)
        inputs = self._pad(rows, ends, left=endings is None)
        if endings is None:
            del inputs["labels"]
        clips = [clip for row in clips_of for clip in row]
        if clips:
            inputs |= _pad_waves(clips)
        return MoweInputs(inputs)

    def num_tokens(
        self,
        instruction: str,
        lengths: Sequence[int],
        answer: str | None = None,
        history: Sequence[tuple[str, str, bool]] = (),
    ) -> int:
        """Return the length of a row, in tokens.

        Args:
            instruction: What to do with the audio.
            lengths: Samples of each of its clips; none counts the text alone.
            answer: None for the prompt alone.
            history: Turns before.
        """
        tokens, _ = self._expanded(self._prompt(instruction, len(lengths), history), lengths)
        return len(tokens) + (0 if answer is None else len(self._ending(answer)))

    def fits(
        self,
        instruction: str,
        lengths: Sequence[int],
        answer: str | None = None,
        new_tokens: int = 0,
        limit: int | None = None,
        history: Sequence[tuple[str, str, bool]] = (),
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
        if not history and size + self.chat.frame_size() + _SPARE_TOKENS <= limit:
            return True
        return self.num_tokens(instruction, lengths, answer, history) + new_tokens <= limit

    def _prompt(self, instruction: str, clips: int, history: Sequence[tuple[str, str, bool]] = ()) -> _Prompt:
        """Return the tokens before the answer, with one audio token a clip, and which of them are learned."""
        given = [*history, ("user", instruction, False)]
        places = sum(text.count(CLIP) for _, text, _ in given)
        if not history and not places:
            return _unlearned(self.chat.tokens([SplitTurn("user", self._texts_around_clips(instruction, clips))]))
        if clips and places != clips:
            raise ValueError(f"the turns have {places} places of clips but the row has {clips} clips: {instruction!r}")
        turns = [SplitTurn(role, text.split(CLIP) if clips else [text.replace(CLIP, "")]) for role, text, _ in given]
        return self.chat.prompt(turns, [learned for _, _, learned in given])

    def _expanded(self, prompt: _Prompt, lengths: Sequence[int]) -> _Prompt:
        """Return a prompt with as many audio tokens in the place of each as a clip of that length becomes."""
        counts = iter([self.num_audio_tokens(length) for length in lengths])
        tokens, learned = prompt
        places: list[int] = []
        for place, token in enumerate(tokens):
            places += [place] * (next(counts) if token == self.audio_token_id else 1)
        return [tokens[place] for place in places], [learned[place] for place in places]

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

    def _dealt(self, texts: Sequence[str], clips: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Return the clips of each text, which names one audio token for each."""
        counts = [text.count(self.audio_token) for text in texts]
        if sum(counts) != len(clips):
            raise ValueError(
                f"the text has {sum(counts)} {self.audio_token} but there are {len(clips)} clips: make it with "
                "apply_chat_template, or pass `instructions`"
            )
        dealt = iter(clips)
        return [[next(dealt) for _ in range(count)] for count in counts]

    def _ending(self, answer: str) -> list[int]:
        """Return the tokens to learn: the answer and its end."""
        return [*self.chat.text_tokens(answer), *self.chat.answer_end()]

    def _check_positions(self, prompts: list[_Prompt], endings: list[list[int]]) -> None:
        longest = max((len(p[0]) + len(e) for p, e in zip(prompts, endings, strict=True)), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            raise ValueError(f"a row has {longest} tokens, but the language model takes {self.max_positions}")

    def _pad(self, prompts: list[_Prompt], endings: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
        width = max(len(prompt[0]) + len(ending) for prompt, ending in zip(prompts, endings, strict=True))
        filler = self.tokenizer.pad_token_id
        # Some language models have no padding token; the attention mask hides it anyway.
        filler = self.tokenizer.eos_token_id if filler is None else filler
        inputs: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for (prompt, learned), ending in zip(prompts, endings, strict=True):
            length = len(prompt) + len(ending)
            padding = width - length
            before, after = (padding, 0) if left else (0, padding)
            inputs["input_ids"].append([filler] * before + prompt + ending + [filler] * after)
            inputs["attention_mask"].append([0] * before + [1] * length + [0] * after)
            # Only answers and their ends are learned, never an instruction.
            known = [token if mark else IGNORED for token, mark in zip(prompt, learned, strict=True)]
            inputs["labels"].append([IGNORED] * before + known + ending + [IGNORED] * after)
        return {name: torch.tensor(rows) for name, rows in inputs.items()}

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_values", "input_lengths"]


# Options of transformers' `apply_chat_template` that are for its own way of making inputs.
_OF_TRANSFORMERS = frozenset(
    ("return_tensors", "return_assistant_tokens_mask", "load_audio_from_video", "sanitize_control_tokens", "padding")
)


def _unlearned(tokens: list[int]) -> _Prompt:
    return tokens, [False] * len(tokens)


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[SplitTurn], list[Any]]:
    """Return the turns of a conversation, and what its clips are read from."""
    turns, clips = [], []
    for message in messages:
        content = message.get("content") or ""
        texts = [""]
        for number, part in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
            texts[-1] += "\n" * (number > 0)
            if part["type"] == "text":
                texts[-1] += part["text"]
            elif part["type"] == "audio" and (found := [part[key] for key in ("audio", "url", "path") if key in part]):
                clips.append(found[0])
                texts.append("")
            else:
                raise ValueError(f"a part of a message is text, or audio with `audio`, `url` or `path`, not {part}")
        turns.append(SplitTurn(message["role"], texts))
    return turns, clips


def _flat(audio: Any) -> list[np.ndarray]:
    """Return one clip, a list of clips, or a list of rows of clips as a list of clips."""
    if audio is None:
        return []
    if isinstance(audio, np.ndarray) and audio.ndim == 1:
        return [audio]
    return [clip for entry in audio for clip in ([entry] if isinstance(entry, np.ndarray) else entry)]


def _at_16khz(clip: Any, rate: int) -> np.ndarray:
    """Return a waveform of a sampling rate, or what a path, URL or base64 text holds, at 16 kHz."""
    return load_audio(clip, SAMPLE_RATE) if isinstance(clip, str) else _resampled([clip], rate)[0]


def _resampled(clips: list[np.ndarray], rate: int | None) -> list[np.ndarray]:
    """Return clips of a sampling rate at 16 kHz."""
    if rate in (None, SAMPLE_RATE):
        return clips
    if soxr is None:
        raise ValueError(f"the model takes audio at {SAMPLE_RATE} Hz, not at {rate}: resample it, or install soxr")
    return [soxr.resample(_check_wave(clip), rate, SAMPLE_RATE, quality="HQ") for clip in clips]


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
