"""Generation: answers to decoded samples, with long clips chunked or cut, and the routers' choices for each clip.

Legend: M pool members, C clips of a batch, R prompts, N tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.evaluation.predictions import Answer, RouterChoice
from mowe_ray.model import AudioTokens, MoweForConditionalGeneration, MoweProcessor, Routing
from mowe_ray.model.generation_settings import greedy

Wave = npt.NDArray[np.float32]

# Shorter chunks are padded with silence, as the paper's authors do with short clips [paper, artefact].
_SHORTEST_S = 1.0


@dataclass(frozen=True)
class Chunk:
    """The clips of a row, or one chunk of its only clip; none for a row of text alone."""

    row: int
    waves: list[Wave]

    @property
    def longest(self) -> int:
        """Samples of the longest clip."""
        return max(map(len, self.waves), default=0)


def answer_micro_batch(
    model: MoweForConditionalGeneration,
    processor: MoweProcessor,
    micro_batch: MicroBatch,
    *,
    max_new_tokens: int,
    num_beams: int,
    max_audio_s: float,
    chunked_tasks: Collection[str],
    batch_seconds: float,
    max_batch_size: int,
    instruct: Callable[[str, str], str | None] = lambda task, sample_id: None,
) -> list[Answer]:
    """Return the model's answers, in row order.

    Args:
        model: In evaluation mode, on its device.
        processor: Makes its inputs.
        micro_batch: The samples to answer.
        max_new_tokens: Longest answer, in tokens.
        num_beams: 1 is greedy.
        max_audio_s: Longer clips of `chunked_tasks` are answered in chunks whose answers are joined; others are cut.
        chunked_tasks: Names of tasks.
        batch_seconds: Audio that goes through the model together, padding included, in seconds.
        max_batch_size: Chunks that go through the model together.
        instruct: Takes task and id, and returns an instruction to use in place of the sample's own, or None.
    """
    instructions = instructions_of(micro_batch, instruct)
    chunks = chunks_of(micro_batch, max_audio_s, chunked_tasks)
    texts: list[list[str]] = [[] for _ in instructions]
    choices_of_row: list[list[tuple[RouterChoice | None, RouterChoice | None]]] = [[] for _ in instructions]
    for group in _groups(chunks, batch_seconds, max_batch_size):
        inputs = processor(
            instructions=[instructions[chunk.row] for chunk in group],
            audio=[chunk.waves for chunk in group],
            histories=[micro_batch.turns_before[chunk.row] for chunk in group] if micro_batch.histories else None,
        )
        moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        audio = model.encode_audio(moved.pop("input_values", None), moved.pop("input_lengths", None), **moved)
        generated = generate_texts(model, processor, moved, audio, max_new_tokens=max_new_tokens, num_beams=num_beams)
        clips = iter(choices(audio))
        for chunk, text in zip(group, generated, strict=True):
            texts[chunk.row].append(text)
            choices_of_row[chunk.row] += [next(clips) for _ in chunk.waves]
    return as_answers(micro_batch, instructions, texts, choices_of_row)


def as_answers(
    micro_batch: MicroBatch,
    instructions: Sequence[str],
    texts: Sequence[Sequence[str]],
    choices_of_row: Sequence[Sequence[tuple[RouterChoice | None, RouterChoice | None]]],
) -> list[Answer]:
    """Return the answer to each row.

    Args:
        micro_batch: The samples.
        instructions: What was asked of each row.
        texts: What was said to its chunks.
        choices_of_row: The routers' choices for its clips, if they are known.
    """
    return [
        Answer(
            id=micro_batch.ids[row],
            task=micro_batch.tasks[row],
            instruction=instructions[row],
            answer=" ".join(text for text in texts[row] if text),
            **micro_batch.scored_by(row),
            duration_s=round(sum(micro_batch.row_lengths[row]) / SAMPLE_RATE, 3),
            independent=_mean([independent for independent, _ in choices_of_row[row]]),
            dependent=_mean([dependent for _, dependent in choices_of_row[row]]),
            path=micro_batch.paths[row] if micro_batch.paths else "",
        )
        for row in range(len(instructions))
    ]


def instructions_of(micro_batch: MicroBatch, instruct: Callable[[str, str], str | None]) -> list[str]:
    """Return the instruction of each row; `instruct` as for `answer_micro_batch`."""
    return [
        instruct(task, sample_id) or own
        for task, sample_id, own in zip(micro_batch.tasks, micro_batch.ids, micro_batch.instructions, strict=True)
    ]


def generate_texts(
    model: MoweForConditionalGeneration,
    processor: MoweProcessor,
    prompts: dict[str, Any],
    audio: AudioTokens | None,
    **options: Any,
) -> list[str]:
    """Return one answer a prompt, without sampling.

    Args:
        model: In evaluation mode.
        processor: Made the prompts.
        prompts: `input_ids` and `attention_mask`, (R, N) each, padded on the left.
        audio: What the model's `encode_audio` returned for their clips.
        **options: For `generate`: `max_new_tokens`, `num_beams`, `synced_gpus`.
    """
    settings = greedy(model.generation_config)
    tokens = model.generate(**prompts, audio=audio, generation_config=settings, do_sample=False, **options)
    new_tokens = tokens[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


def choices(audio: AudioTokens | None) -> list[tuple[RouterChoice | None, RouterChoice | None]]:
    """Return the choices of the data-independent and the data-dependent router for each of the C clips."""
    if audio is None:
        return []
    clips = sum(count > 0 for count in audio.valid)
    return list(zip(_choices(audio.record.independent, clips), _choices(audio.record.dependent, clips), strict=True))


def _choices(routing: Routing | None, clips: int) -> list[RouterChoice] | list[None]:
    """Return a router's choice for each clip; over frames, if it decides for each, the mean."""
    if routing is None:
        return [None] * clips
    loads, probabilities = (
        routing.per_clip(values.float()).expand(clips, -1).tolist()
        for values in (routing.chosen, routing.probabilities)
    )
    return [
        RouterChoice([round(load, 5) for load in loads_of_clip], [round(p, 5) for p in probabilities_of_clip])
        for loads_of_clip, probabilities_of_clip in zip(loads, probabilities, strict=True)
    ]


def _mean(chunks: Sequence[RouterChoice | None]) -> RouterChoice | None:
    """Return the mean of the choices for the chunks of a clip."""
    known = [chunk for chunk in chunks if chunk is not None]
    if len(known) <= 1:
        return known[0] if known else None
    load, probabilities = (
        [round(float(mean), 5) for mean in np.mean([getattr(chunk, name) for chunk in known], axis=0)]
        for name in ("load", "probabilities")
    )
    return RouterChoice(load, probabilities)


def chunks_of(micro_batch: MicroBatch, max_audio_s: float, chunked_tasks: Collection[str]) -> list[Chunk]:
    """Return the clips of all rows, long ones chunked or cut, in row order; those of a row with several are cut."""
    most = round(max_audio_s * SAMPLE_RATE)
    chunks = []
    for row, (clips, task) in enumerate(zip(micro_batch.clips(), micro_batch.tasks, strict=True)):
        if len(clips) == 1:
            chunks += [Chunk(row, [wave]) for wave in cut(clips[0], most, task in chunked_tasks)]
        else:
            chunks.append(Chunk(row, [clip[:most] for clip in clips]))
    return chunks


def cut(clip: Wave, samples: int, chunked: bool) -> list[Wave]:
    """Return a clip in chunks of at most `samples`, or only the first of them."""
    if len(clip) <= samples:
        return [clip]
    if not chunked:
        return [clip[:samples]]
    *full, last = (clip[start : start + samples] for start in range(0, len(clip), samples))
    missing = max(0, min(samples, round(_SHORTEST_S * SAMPLE_RATE)) - len(last))
    return [*full, np.pad(last, (0, missing))]


def _groups(chunks: Sequence[Chunk], batch_seconds: float, max_batch_size: int) -> Iterator[list[Chunk]]:
    """Group chunks into batches within the limits; a chunk that exceeds them is a batch of its own."""
    group: list[Chunk] = []
    longest = 0
    for chunk in chunks:
        longest_with = max(longest, chunk.longest)
        clips = sum(len(other.waves) or 1 for other in [*group, chunk])
        padded_s = clips * longest_with / SAMPLE_RATE
        if group and (len(group) == max_batch_size or padded_s > batch_seconds):
            yield group
            # The chunk that did not fit begins the next batch.
            group, longest_with = [], chunk.longest
        group.append(chunk)
        longest = longest_with
    if group:
        yield group


_PHRASINGS = {
    "asr": (
        "Write out every word that is spoken.",
        "Transcribe what the speaker says.",
        "What are the exact words of this recording?",
        "Turn the speech into written text.",
        "Give a word-for-word transcript.",
        "Listen to the speech and type it.",
        "Note down the spoken sentence.",
        "Which words are being said here?",
    ),
    "ac": (
        "Describe in one sentence what can be heard.",
        "Write a caption for this sound clip.",
        "Sum up the sounds of this recording.",
        "What is going on in this audio?",
        "Put the sounds you hear into words.",
        "Say in short what this clip sounds like.",
        "Which sounds occur here? Answer with a sentence.",
        "Tell someone who cannot hear it what is in the recording.",
    ),
    "er": (
        "Which emotion does the voice express?",
        "How does the speaker feel?",
        "Name the feeling in this voice.",
        "Judging by the tone, what mood is the speaker in?",
        "What emotion do you hear?",
        "Choose the emotion that fits the speaker.",
        "With which feeling is this said?",
        "Tell the emotional state of the person who speaks.",
    ),
}
_WITH_LABELS = ("er",)


def instruction_of(task: str, sample_id: str, labels: Sequence[str] | None, seed: int) -> str | None:
    """Draw a usual phrasing for a sample; it depends on the sample's id and the seed alone.

    Args:
        labels: The closed list that the question of a classification ends with.

    Returns:
        None if the task has no usual phrasing, or needs labels and there are none.
    """
    if task not in _PHRASINGS or (task in _WITH_LABELS and not labels):
        return None
    # By id, not by position: all models get the same phrasing, and a resumed evaluation continues with it.
    phrasing = random.Random(f"{seed} {sample_id}").choice(_PHRASINGS[task])
    return f"{phrasing} ({', '.join(labels)})" if labels and task in _WITH_LABELS else phrasing
