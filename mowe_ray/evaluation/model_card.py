"""The model card of an export: README.md with the metadata that the hub of Hugging Face reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mowe_ray.evaluation.results import Interval, TaskScores

CARD = "README.md"
_BEGIN, _END = "<!-- scores: python -m mowe_ray.evaluate rewrites them -->", "<!-- end of scores -->"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# The hub's names of tasks; others are of the model's own kind.
_HUB_TASKS = {"asr": "automatic-speech-recognition", "er": "audio-classification"}
_PIPELINE = "audio-text-to-text"
_TITLES = {
    "asr": "transcription",
    "er": "emotion",
    "ac": "captions",
    "aqa": "questions about sounds",
    "sqa": "questions about speech",
}


@dataclass(frozen=True)
class CardScore:
    """A score in the card: of one task of one dataset, by one metric.

    Attributes:
        title: Of the metric, with its unit and what is better.
        interval: The 95 % interval; None where only the value is known.
        majority: What always giving the most frequent answer would score; None if that is not known.
    """

    dataset: str
    task: str
    metric: str
    title: str
    value: float
    samples: int
    interval: tuple[float, float] | None = None
    majority: float | None = None

    @classmethod
    def of(cls, scores: TaskScores) -> CardScore:
        """Return the main score of a task as an evaluation has it."""
        main: Interval = scores.scores[scores.main]
        return cls(
            scores.dataset,
            scores.task,
            scores.main,
            f"{scores.titles[scores.main]}, {scores.better[scores.main]} is better",
            main.value,
            scores.samples,
            (main.low, main.high),
            scores.majority.get(scores.main),
        )


def while_training(validation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[CardScore]:
    """Return the scores of a run's last validation, which has `score`, `majority` and `samples` by source and task."""
    title = "validation score of 0 to 1, higher is better"
    return [
        CardScore(source, task, "score", title, found["score"], int(found["samples"]), majority=found["majority"])
        for source, tasks in validation.items()
        for task, found in tasks.items()
    ]


def model_card(name: str, run: Mapping[str, Any], scores: Sequence[CardScore], version: str) -> str:
    """Write the card of a run's export.

    Args:
        name: Of the run.
        run: Its resolved configuration, as `config.json` has it.
        scores: Of its validation.
        version: Of mowe_ray.
    """
    from huggingface_hub import ModelCardData

    bases = list(dict.fromkeys(_hub_ids(run["model"])))
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=_PIPELINE,
        base_model=bases or None,
        # The terms of the parts and of the data decide; the hub wants a name and a link beside `other`.
        license="other",
        license_name="to-be-filled-in",
        license_link="to-be-filled-in",
        datasets=[path for path in _paths(run, "train") if _is_on_hub(path)] or None,
        tags=["mowe", "audio", "speech", "audio-language-model", "mixture-of-encoders", "custom_code"],
    )
    text = "\n\n".join(
        [_what(name, run), _data(run), "## Scores", _BEGIN + _END, _USE, _before_you_publish(bases, version)]
    )
    return with_scores(f"---\n{data.to_yaml()}\n---\n\n{text}\n", scores)


def with_scores(card: str, scores: Sequence[CardScore]) -> str:
    """Return a card with these scores in place of those that it has; what else somebody wrote into it stays."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    made = ModelCard(card, ignore_metadata_errors=True)
    cast(ModelCardData, made.data).eval_results = [
        EvalResult(
            task_type=_HUB_TASKS.get(score.task, _PIPELINE),
            task_name=_TITLES.get(score.task, score.task),
            dataset_type=score.dataset,
            dataset_name=score.dataset,
            dataset_config=score.task,  # or the hub's library puts tasks of one type together
            metric_type=score.metric,
            metric_name=score.title,
            metric_value=round(score.value, 4),
        )
        for score in scores
    ] or None
    before, begin, rest = made.text.partition(_BEGIN)
    _, end, behind = rest.partition(_END)
    if begin and end:  # the user's own text has none
        made.text = f"{before}{_BEGIN}\n\n{_table(scores)}\n\n{_END}{behind}"
    return f"{made.content.rstrip()}\n"


def card_of_part(card: str, part: Literal["llm", "front"]) -> str:
    """Return the card of a part of a split export, from the card of the whole.

    Scores stay as a table; the hub's entries of them go, as no part alone has them.
    """
    from huggingface_hub import ModelCard, ModelCardData

    made = ModelCard(card, ignore_metadata_errors=True)
    what, use, data = *_PARTS[part], cast(ModelCardData, made.data)
    data.eval_results = None
    if part == "llm":
        data.pipeline_tag = "text-generation"
        data.tags = [tag for tag in data.tags or [] if tag != "custom_code"] or None
    title, _, rest = made.text.strip().partition("\n")
    rest = rest.replace(_USE, use) if _USE in rest else f"{rest}\n\n{use}"
    made.text = f"\n{title}: {part}\n\n{what} What follows is about the whole model.\n{rest}"
    return f"{made.content.rstrip()}\n"


def _table(scores: Sequence[CardScore]) -> str:
    if not scores:
        return "Not scored yet: `python -m mowe_ray.evaluate` writes a table here."
    head = "| data | task | metric | score | most frequent answer | samples |\n|---|---|---|---|---|---|"
    rows = [
        f"| {score.dataset} | {_TITLES.get(score.task, score.task)} | {score.title} | {_value(score)} "
        f"| {'' if score.majority is None else f'{score.majority:.4g}'} | {score.samples} |"
        for score in scores
    ]
    note = "With 95 % bootstrap intervals. " if any(score.interval for score in scores) else ""
    return "\n".join([head, *rows, "", f"{note}Most frequent answer: what always giving it would score."])


def _value(score: CardScore) -> str:
    bounds = "" if score.interval is None else " ({:.4g} to {:.4g})".format(*score.interval)
    return f"**{score.value:.4g}**{bounds}"


def _what(name: str, run: Mapping[str, Any]) -> str:
    model = run["model"]
    pool = model["weak_encoders"]
    rows = [("base encoder", "base", model["base_encoder"], model["train_base"])]
    rows += [(f"weak encoder `{member['name']}`", "pool", member["checkpoint"], member["train"]) for member in pool]
    lora = "LoRA" if model["lora"] else "full"
    rows.append(("language model", "", model["language_model"], lora))
    table = "\n".join(
        [
            "| part | checkpoint | trained |",
            "|---|---|---|",
            *(f"| {part} | {_named(of)} | {how} |" for part, _, of, how in rows),
        ]
    )
    return (
        f"# {name}\n\nAn audio language model: it answers questions and instructions about recordings. A strong audio "
        "encoder, a pool of weak ones, an adapter and a language model, after "
        f"[MoWE-Audio](https://arxiv.org/abs/2409.06635). {_routing(model)}\n\n{table}"
    )


def _routing(model: Mapping[str, Any]) -> str:
    pool, router = len(model["weak_encoders"]), model["router"]
    routers = [kind.replace("_", "-") for kind in ("data_independent", "data_dependent") if router[kind]]
    if not pool:
        return "It has no pool of weak encoders."
    if not routers:
        return f"Its {pool} weak encoders are combined by `{model['fusion']}`."
    chosen = f"{router['top_k']} of {pool} weak encoders"
    return f"For a clip, {' and '.join(f'the {kind} router chooses {chosen}' for kind in routers)}."


def _named(checkpoint: Any) -> str:
    if not isinstance(checkpoint, str):
        return f"{checkpoint['config'].get('model_type', 'model')}, from random weights"
    return (
        f"[{checkpoint}](https://huggingface.co/{checkpoint})" if _is_on_hub(checkpoint) else f"`{_end_of(checkpoint)}`"
    )


def _data(run: Mapping[str, Any]) -> str:
    trained = ", ".join(f"`{_end_of(path)}`" for path in _paths(run, "train"))
    scored = ", ".join(f"`{_end_of(path)}`" for path in _paths(run, "validation"))
    return f"## Data\n\nTrained on {trained or 'nothing'}, validated on {scored or 'nothing'}; audio of 16 kHz, mono."


_USE = """## Use

With transformers alone; `trust_remote_code` runs the model's code, which is in this folder:

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

folder = "."  # of this card, or its name on the hub
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
parts = [{"type": "audio", "audio": "clip.wav"}, {"type": "text", "text": "What can be heard?"}]
chat = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **chat)
tokens = model.generate(**inputs, max_new_tokens=50)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(tokens, skip_special_tokens=True))
```

With mowe_ray (`pip install 'mowe-ray[serve]'`), from the terminal, or as a server with OpenAI's interface and a page:

```bash
python -m mowe_ray.ask FOLDER clip.wav "What can be heard?"
python -m mowe_ray.serve FOLDER
```"""


_PARTS = {
    "llm": (
        "The language model of an audio language model: a plain causal language model. It continues text, and audio as "
        "the prompt embeddings that `front`, beside this folder, makes of it.",
        """## Use

Load it with transformers, vLLM, SGLang, TGI or llama.cpp as any other. For audio, feed it what `front` makes (its card
says how): `inputs_embeds` of transformers' `generate`, `prompt_embeds` of vLLM with `enable_prompt_embeds`.""",
    ),
    "front": (
        "The ears of an audio language model: encoders, routers and adapter. They make prompt embeddings of recordings "
        "and questions for the language model `llm`, beside this folder.",
        """## Use

With transformers alone; `trust_remote_code` runs the model's code, which is in this folder:

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

front = AutoModel.from_pretrained("front", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("front", trust_remote_code=True)
llm = AutoModelForCausalLM.from_pretrained("llm").eval()
parts = [{"type": "audio", "audio": "clip.wav"}, {"type": "text", "text": "What can be heard?"}]
chat = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **chat)
tokens = llm.generate(inputs_embeds=front(**inputs), attention_mask=inputs["attention_mask"], max_new_tokens=50)
print(processor.batch_decode(tokens, skip_special_tokens=True))
```""",
    ),
}


def _before_you_publish(bases: Sequence[str], version: str) -> str:
    parts = f"of {', '.join(bases)} and " if bases else ""
    return (
        "## Before you publish it\n\nFill in above: `license` (or `license_name` and `license_link`), `datasets`, and "
        f"`language`. The terms {parts}of the training data apply to this model. Say here what it is for, "
        f"what it must not be used for, and where it fails.\n\nMade by mowe_ray {version}."
    )


def _hub_ids(model: Mapping[str, Any]) -> Iterator[str]:
    checkpoints = [model["base_encoder"], *(member["checkpoint"] for member in model["weak_encoders"])]
    yield from (of for of in [*checkpoints, model["language_model"]] if isinstance(of, str) and _is_on_hub(of))


def _paths(run: Mapping[str, Any], kind: str) -> list[str]:
    found = [source["path"] for source in run["data"].get(kind) or []]
    return [path for one in found for path in ([one] if isinstance(one, str) else one)]


def _is_on_hub(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _end_of(path: str) -> str:
    """Return the last two parts of a path: where somebody's files lie is nobody's business."""
    return "/".join(path.rstrip("/").split("/")[-2:])
