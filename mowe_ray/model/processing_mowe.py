"""`MoweProcessor`: instructions, waveforms and answers to model inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

AUDIO_TOKEN = "<|audio|>"
IGNORED = -100


class MoweProcessor(ProcessorMixin):
    """A tokenizer, and the arithmetic of how many audio tokens a clip becomes.

    Args:
        tokenizer: The language model's; gains the audio token if it lacks it.
        frame_layers: (kernel, stride, padding) of the base encoder's layers, from 16 kHz samples to
            frames.
        downsample: Frames per audio token.
        audio_token: Placeholder of a clip in a text.
        chat_template: The tokenizer's own is used; here for transformers' sake.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frame_layers: Sequence[Sequence[int]] = (),
        downsample: int = 8,
        audio_token: str = AUDIO_TOKEN,
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.frame_layers = [list(layer) for layer in frame_layers]
        self.downsample = downsample
        self.audio_token = audio_token
        if audio_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]})
        self.audio_token_id: int = tokenizer.get_vocab()[audio_token]

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
            ValueError: if counts of rows, or of clips and audio tokens, disagree, or a clip is not
                a waveform.
        """
        clips_of = [list(clips) for clips in audio] if audio is not None else [[] for _ in instructions]
        if len(clips_of) != len(instructions) or (answers is not None and len(answers) != len(instructions)):
            raise ValueError(
                f"{len(instructions)} instructions, {len(clips_of)} rows of audio and "
                f"{'no' if answers is None else len(answers)} answers: the numbers must be the same"
            )
        prompts = [self._prompt(text, clips) for text, clips in zip(instructions, clips_of, strict=True)]
        endings = [[] for _ in prompts] if answers is None else [self._ending(answer) for answer in answers]
        inputs = self._pad(prompts, endings, left=answers is None)
        if answers is None:
            del inputs["labels"]
        clips = [clip for row in clips_of for clip in row]
        if clips:
            inputs |= _pad_waves(clips)
        return BatchFeature(inputs)

    def _prompt(self, instruction: str, clips: list[np.ndarray]) -> list[int]:
        """Return the tokens before the answer."""
        if self.audio_token in instruction:
            text = instruction
        else:
            text = "\n".join([self.audio_token] * len(clips) + [instruction])
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            tokens = self.tokenizer(text + "\n")["input_ids"]
            # Some tokenizers end every text; here the answer is still to come.
            while tokens and tokens[-1] == self.tokenizer.eos_token_id:
                tokens = tokens[:-1]
        placeholders = tokens.count(self.audio_token_id)
        if placeholders != len(clips):
            raise ValueError(
                f"the prompt has {placeholders} {self.audio_token} but the row has {len(clips)} clips: {instruction!r}"
            )
        counts = iter([self.num_audio_tokens(len(_check_wave(clip))) for clip in clips])
        expanded: list[int] = []
        for token in tokens:
            expanded += [token] * (next(counts) if token == self.audio_token_id else 1)
        return expanded

    def _ending(self, answer: str) -> list[int]:
        """Return the tokens to learn: the answer and its end."""
        tokens: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if self.audio_token_id in tokens:
            raise ValueError(f"an answer cannot hold {self.audio_token}: {answer!r}")
        return [*tokens, self.tokenizer.eos_token_id]

    def _pad(self, prompts: list[list[int]], endings: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
        width = max(len(prompt) + len(ending) for prompt, ending in zip(prompts, endings, strict=True))
        filler = self.tokenizer.pad_token_id
        filler = self.tokenizer.eos_token_id if filler is None else filler
        inputs: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, ending in zip(prompts, endings, strict=True):
            length = len(prompt) + len(ending)
            padding = width - length
            before, after = (padding, 0) if left else (0, padding)
            inputs["input_ids"].append([filler] * before + prompt + ending + [filler] * after)
            inputs["attention_mask"].append([0] * before + [1] * length + [0] * after)
            inputs["labels"].append([IGNORED] * (before + len(prompt)) + ending + [IGNORED] * after)
        return {name: torch.tensor(rows) for name, rows in inputs.items()}

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_values", "input_lengths"]


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
