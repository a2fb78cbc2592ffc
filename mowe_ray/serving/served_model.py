"""A loaded export: answers batches of questions, piece by piece, and reports which encoders ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.evaluation.generation import choices
from mowe_ray.evaluation.predictions import RouterChoice
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.encoders import PadAudio, quiet_transformers
from mowe_ray.model.export import open_exported
from mowe_ray.model.generation_settings import greedy
from mowe_ray.serving.question import ClipReport, Piece, Question, Refused, Reply, Sampling
from mowe_ray.training.flops import Amount, part_gflops

# Lengths for which operations are counted, in seconds; between them they grow about linearly.
_COUNTED_S = (1.0, 5.0, 10.0, 30.0)


@dataclass(eq=False)
class Listener:
    """Who waits for an answer.

    Attributes:
        question: What was asked.
        on_event: Called with each piece, then with the reply, or with what went wrong.
        padding: As `ServedModel.padding` says; those of different padding are not answered together.
        asked_at: When, by the monotonic clock.
        gone: Set when nobody waits any more.
    """

    question: Question
    on_event: Callable[[Piece | Reply | Exception], None]
    padding: frozenset[int] = frozenset()
    asked_at: float = field(default_factory=time.monotonic)
    gone: bool = False


class ServedModel:
    """A model that answers questions.

    Args:
        model: In evaluation mode, on its device.
        processor: Makes its inputs.
        gflops: Operations of the audio side by length of a clip; None reports none.
    """

    def __init__(
        self,
        model: MoweForConditionalGeneration,
        processor: MoweProcessor,
        gflops: dict[float, Amount] | None = None,
    ):
        self.model, self.processor = model, processor
        self.members: list[str] = [spec.name for spec in model.config.weak_encoders or []]
        self._gflops = gflops

    @classmethod
    def load(cls, folder: str, device: str) -> ServedModel:
        """Load an export; in bfloat16 on a GPU, as `evaluate` does.

        Raises:
            ValueError: The folder is no export, or lacks weights.
        """
        on_meta = open_exported(folder)
        gflops = {}
        for seconds in _COUNTED_S:
            work = part_gflops(on_meta, seconds, 1)
            del work["language_model"]
            gflops[seconds] = sum(work.values(), Amount(0.0, (0.0,) * len(on_meta.config.weak_encoders or [])))
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        with quiet_transformers():
            model = MoweForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return cls(model.to(device).eval(), MoweProcessor.from_pretrained(folder), gflops)

    def check(self, question: Question) -> Question:
        """Return a question with no longer an answer than there is room for.

        Raises:
            Refused: It cannot be asked; the message says what to change.
        """
        unknown = sorted(set(question.without) - set(self.members))
        if unknown:
            known = ", ".join(self.members) or "none"
            raise Refused(f"mowe.without: no encoder {unknown[0]!r} in the pool, only {known}", param="mowe.without")
        tower = self.model.audio_tower
        if self.members and set(question.without) == set(self.members) and tower.config.fusion == "average":
            raise Refused("mowe.without: one encoder of the pool must stay", param="mowe.without")
        try:
            tokens = self._inputs([question])["input_ids"].shape[1]
        except ValueError as error:
            too_long = "language model takes" in str(error)
            code = "context_length_exceeded" if too_long else "invalid_value"
            advice = ": shorten the conversation or its clips" if too_long else ""
            raise Refused(f"messages: {error}{advice}", code=code, param="messages") from error
        room = (self.processor.max_positions or tokens + question.max_new_tokens) - tokens
        if room < 1:
            raise Refused(
                f"messages: {tokens} tokens leave no room for an answer, the language model takes "
                f"{self.processor.max_positions}: shorten the conversation or its clips",
                code="context_length_exceeded",
                param="messages",
            )
        if room >= question.max_new_tokens:
            return question
        return replace(question, max_new_tokens=room)

    def padding(self, question: Question) -> frozenset[int]:
        """Return the lengths, in samples, to which encoders without a mask (Whisper) pad this question's clips.

        Padding changes what they compute: with longer clips, and so more of it, the same clip has other features.
        """
        longest = max(map(len, question.clips), default=0)
        tower = self.model.audio_tower
        pad_audio = cast(PadAudio, tower.config.pad_audio)
        padded = [(encoder, encoder.pad_samples(longest, pad_audio)) for encoder in tower.encoders()]
        return frozenset(size for encoder, size in padded if longest and size > max(longest, encoder.min_samples))

    @torch.inference_mode()
    def answer(self, listeners: Sequence[Listener]) -> None:
        """Answer questions together; they must agree in `without` and `sampling`."""
        first, began = listeners[0].question, time.monotonic()
        self.model.audio_tower.excluded_members = tuple(self.members.index(name) for name in first.without)
        inputs = self._inputs([listener.question for listener in listeners])
        moved = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        prompts, mask = moved["input_ids"], moved["attention_mask"]
        sound = moved.get("input_values"), moved.get("input_lengths")
        audio = self.model.encode_audio(*sound, input_ids=prompts, attention_mask=mask)
        encoded = time.monotonic()
        chosen = iter(choices(audio))
        prompt_tokens = mask.sum(1).tolist()
        answers = []
        for listener, tokens in zip(listeners, prompt_tokens, strict=True):
            clips = [self._report(len(clip), *next(chosen)) for clip in listener.question.clips]
            waited, encoders = 1e3 * (began - listener.asked_at), 1e3 * (encoded - began)
            times = {"queue": round(waited, 1), "encoders": round(encoders, 1)}
            answers.append(_StreamedAnswer(listener, self.processor, clips, tokens, times, encoded, len(listeners)))
        ends = _ends(self.model.generation_config)
        self.model.generate(
            prompts,
            mask,
            audio=audio,
            generation_config=_settings(self.model.generation_config, first.sampling),
            max_new_tokens=max(listener.question.max_new_tokens for listener in listeners),
            streamer=_Streamer(answers, ends),
            stopping_criteria=StoppingCriteriaList([_AnswersDone(answers)]),
        )
        for answer in answers:
            answer.finish("length")

    def _inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        conversations = [[message.for_processor() for message in question.messages] for question in questions]
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        return dict(inputs)

    def _report(self, samples: int, independent: RouterChoice | None, dependent: RouterChoice | None) -> ClipReport:
        choices = {"independent": independent, "dependent": dependent}
        loads = {router: np.array(choice.load) for router, choice in choices.items() if choice is not None}
        ran = np.max(list(loads.values()), axis=0) if loads else np.ones(len(self.members))
        for load in (ran, *loads.values()):
            load[list(self.model.audio_tower.excluded_members)] = 0
        seconds = samples / SAMPLE_RATE
        amount = self._amount(seconds)
        return ClipReport(
            round(seconds, 3),
            None if independent is None else dict(zip(self.members, independent.probabilities, strict=True)),
            None if dependent is None else dict(zip(self.members, dependent.probabilities, strict=True)),
            {router: self._named(load) for router, load in loads.items()},
            self._named(ran),
            round(amount.at(ran.tolist()), 4),
            round(amount.total, 4),
        )

    def _named(self, load: np.ndarray) -> list[str]:
        return [name for name, part in zip(self.members, load, strict=True) if part]

    def _amount(self, seconds: float) -> Amount:
        if not self._gflops:
            return Amount(0.0, (0.0,) * len(self.members))
        known = np.array([[a.always, *a.members] for a in self._gflops.values()]).T
        always, *members = (float(np.interp(seconds, list(self._gflops), row)) for row in known)
        return Amount(always, tuple(members))


class _StreamedAnswer:
    """An answer that is being generated: sends what is new of its text to its listener."""

    def __init__(
        self,
        listener: Listener,
        processor: MoweProcessor,
        clips: list[ClipReport],
        prompt_tokens: int,
        milliseconds: dict[str, float],
        began: float,
        batch_size: int,
    ):
        self._listener, self._processor, self._clips = listener, processor, clips
        self._prompt_tokens, self._times, self._began, self._batch = prompt_tokens, milliseconds, began, batch_size
        self._tokens: list[int] = []
        self._sent = ""
        self.done = False

    def add(self, token: int, ends: frozenset[int]) -> None:
        """Take the next token."""
        if self.done:
            return
        if self._listener.gone:
            self.done = True
            return
        if token in ends:
            self._tokens.append(token)
            self.finish("stop")
            return
        self._tokens.append(token)
        question = self._listener.question
        # Texts are made only where somebody looks at them before the end.
        text, stopped = self._text() if question.in_pieces or question.stop else ("", False)
        if stopped:
            self.finish("stop")
        elif len(self._tokens) >= question.max_new_tokens:
            self.finish("length")
        else:
            self._send(self._settled(text))

    def finish(self, reason: str) -> None:
        """Send the rest and the reply, unless that was done."""
        if self.done:
            return
        self.done = True
        text, _ = self._text()
        self._send(text)
        times = {**self._times, "generation": round(1e3 * (time.monotonic() - self._began), 1)}
        self._listener.on_event(
            Reply(text, reason, self._prompt_tokens, len(self._tokens), self._clips, times, self._batch)
        )

    def _text(self) -> tuple[str, bool]:
        text = str(self._processor.decode(self._tokens, skip_special_tokens=True)).strip()
        at = min((place for stop in self._listener.question.stop if (place := text.find(stop)) >= 0), default=-1)
        return (text, False) if at < 0 else (text[:at].strip(), True)

    def _settled(self, text: str) -> str:
        """Return the text without an end that the next tokens may change: half a character, or half a stop text."""
        text = text.rstrip("\ufffd")
        held = max((len(stop) - 1 for stop in self._listener.question.stop), default=0)
        return text[: len(text) - held] if held else text

    def _send(self, text: str) -> None:
        # A tokenizer may write the beginning anew as more tokens come; what was sent stays.
        if self._listener.question.in_pieces and len(text) > len(self._sent) and text.startswith(self._sent):
            self._listener.on_event(Piece(text[len(self._sent) :]))
            self._sent = text


class _Streamer(BaseStreamer):
    """Hands the tokens of a batch to its answers."""

    def __init__(self, answers: Sequence[_StreamedAnswer], ends: frozenset[int]):
        self._answers, self._ends, self._is_prompt = answers, ends, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for answer, token in zip(self._answers, value.tolist(), strict=True):
            answer.add(token, self._ends)

    def end(self) -> None:
        """Nothing is left over."""


class _AnswersDone(StoppingCriteria):
    """Stops answers that are complete, or that nobody waits for."""

    def __init__(self, answers: Sequence[_StreamedAnswer]):
        self._answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.tensor([answer.done for answer in self._answers], device=input_ids.device)


def _settings(config: GenerationConfig, sampling: Sampling) -> GenerationConfig:
    settings = greedy(config)
    if sampling.temperature > 0:
        settings.do_sample, settings.temperature, settings.top_p = True, sampling.temperature, sampling.top_p
        settings.top_k = 0
        torch.manual_seed(torch.seed() if sampling.seed is None else sampling.seed)
    return settings


def _ends(config: GenerationConfig) -> frozenset[int]:
    ends = config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])
