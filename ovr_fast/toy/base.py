"""Makes the toy base model: a tiny Qwen2.5-VL that perceives but does not reason.

    python -m ovr_fast.toy.base --output runs/base_model [--seed 0]

It stands for the pre-trained Qwen2.5-VL of the recipe, and never sees a question about a scene
answered. It is made in four phases:

perceive   transcribe an image, and its text twin, into the same symbols
continue   go on after the transcript, for images and twins alike: repeat the question, or one
           row. Without it the base ignores questions, and a model that then learns from text to
           use them does so for text alone.
rows       work on one row of a scene in symbols: count, find, list the digits
practice   exercises (sums, the largest of a few, a row, a box), given or made up

Both modalities are asked in many wordings and lengths: with one fixed prompt such a model learns a
fixed offset between image and answer and loses its place when the prompt grows.

Training uses transformers' own model, because the base must not depend on the trainer that is
later checked against it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ovr_fast.torchvision_ops import declare_if_broken
from ovr_fast.toy import world

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 640
BATCH = 32
SHIPPED = (Path(__file__).parent / "base_model").resolve()
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or part['type'] == 'image_url' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TRANSCRIBE_WORDINGS = (
    "Transcribe.",
    "Write down what is shown.",
    "Say what you see, cell by cell.",
    "Please list all cells, row by row, from the left to the right.",
    "What is there?",
    "Give the scene.",
    "Look and write the symbols of each row.",
    "Before you do anything else, note the whole scene in symbols, please.",
)
REPEAT_WORDINGS = (
    "Write the scene, then repeat the question.",
    "First the scene and then the question again, please.",
    "Say what you see and what was asked.",
)
ROW_WORDINGS = (
    "Write the scene, then the {} row again.",
    "First the scene and then only its {} row.",
)
PRACTICE_WORDINGS = ("Practice.", "Make up some exercises.", "Show me how to do it, please.")
FILLER = (
    "please look at this and then tell me now if you can the scene is here for you to see "
    "there are some shapes or digits in it take your time and be careful with every row"
)
FILLER_WORDS = FILLER.split()


def build_processor(output: Path) -> None:
    """Write tokenizer, image processor and chat template into ``output``.

    A byte-level BPE with Qwen2's splitting rule, trained on the toy world's own words, so that a
    word is one token and a transcript symbol with its leading space is one token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    rng = random.Random(0)
    corpus = list(TRANSCRIBE_WORDINGS) + [" ".join(FILLER_WORDS)] * 4
    for _ in range(400):
        for family in world.FAMILIES:
            question = world.make_question(rng, family=family, difficulty=1, held_out=False)
            corpus += [question.text, question.reasoning]
            corpus += [world.describe(question.scene, style) for style in range(world.TWIN_STYLES)]
    corpus += ["system user assistant\n"] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]
    ]
    fast = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    fast.model_max_length = 2048
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(output)


def copy_processor(output: Path) -> None:
    """The shipped tokenizer and processor into ``output``: a base made again reads the same ids."""
    output.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        shutil.copyfile(SHIPPED / name, output / name)


def build_model(output: Path, seed: int) -> Any:
    """A random tiny Qwen2.5-VL for the processor in ``output``: float32, about 2.8 M parameters."""
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(output)
    ids: dict[str, Any] = {n: tokenizer.convert_tokens_to_ids(n) for n in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(
            depth=3,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            out_hidden_size=192,
            window_size=56,
            fullatt_block_indexes=[2],
            tokens_per_second=2,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return model


def _filler(rng: random.Random) -> str:
    return " ".join(rng.choices(FILLER_WORDS, k=rng.randint(0, 14)))


def transcription(rng: random.Random, *, image: bool) -> tuple[str, Image.Image | None, str]:
    """One perception example: prompt text, image or None, response."""
    question = world.make_question(
        rng, family=rng.choice(world.FAMILIES), difficulty=1, held_out=False
    )
    scene = question.scene
    if rng.random() < 0.6:
        scene = world.make_scene(rng, kind="mixed", difficulty=1, held_out=False)
    wording = rng.choice(TRANSCRIBE_WORDINGS)
    ask = rng.choice(
        (
            wording,
            f"{_filler(rng)} {wording}",
            f"{wording} {_filler(rng)}",
            f"{question.text} {wording}",
            question.text,
        )
    )
    response = f"I see: {scene.transcript} ."
    if image:
        return ask, world.render(scene, rng), response
    return f"{world.describe(scene, rng.randrange(world.TWIN_STYLES))}\n{ask}", None, response


def continuation(rng: random.Random, *, image: bool) -> tuple[str, Image.Image | None, str]:
    """The transcript and then the question again, or one row again: not an answer."""
    question = world.make_question(
        rng, family=rng.choice(world.FAMILIES), difficulty=1, held_out=False
    )
    scene = question.scene
    if rng.random() < 0.7:
        ask = f"{question.text} {rng.choice(REPEAT_WORDINGS)}"
        tail = f"The question: {question.text}"
    else:
        row = rng.randrange(len(scene.rows))
        name = scene.row_names[row]
        ask = rng.choice(ROW_WORDINGS).format(name)
        tail = f"{name} : {' '.join(scene.rows[row])} ."
    response = f"I see: {scene.transcript} . {tail}"
    if image:
        return ask, world.render(scene, rng), response
    return f"{world.describe(scene, rng.randrange(world.TWIN_STYLES))}\n{ask}", None, response


def exercise(rng: random.Random) -> tuple[str, str]:
    """A task and its solution: a sum, the largest of a few numbers, one row of symbols, a box."""
    kind = rng.choice(("sum", "sum", "sum", "most", "most", "row", "row", "row", "box", "name"))
    if kind == "name":
        letter, (colour, shape) = rng.choice(list(world.OBJECT_SYMBOLS.items()))
        return f"Symbol of the {colour} {shape} ?", f"Find {letter} :"
    if kind == "box":
        what = rng.choice((str(rng.randint(0, 30)), *world.COLOURS, "equal", *world.ROW_NAMES[3]))
        return f"Box {what} .", f"\\boxed{{{what}}}"
    if kind == "row":
        scene = random_scene(rng)
        row = rng.randrange(len(scene.rows))
        what, value = row_task(rng, scene.rows[row])
        line = f"{scene.row_names[row]} {' '.join(scene.rows[row])} ."
        return f"{what} {line}", f"{what} {line} {value}"
    numbers = [rng.randint(0, rng.choice((3, 9, 9))) for _ in range(rng.randint(2, 3))]
    listed = " , ".join(rng.choice((str(number), world.DIGIT_WORDS[number])) for number in numbers)
    teacher = world.Teacher(rng)
    if kind == "sum":
        text, answer = world.running_sum(numbers, teacher)
        task, solution = f"Add: {listed} .", f"Add: {text} ."
    else:
        which = rng.choice(("largest", "smallest"))
        text, answer = world.extreme(numbers, which, teacher)
        task, solution = f"The {which} of {listed} .", f"{text} ."
    return task, f"{solution} \\boxed{{{answer}}}" if rng.random() < 0.3 else solution


def random_scene(rng: random.Random) -> world.Scene:
    kind = rng.choice(("shapes", "digits", "mixed"))
    return world.make_scene(rng, kind=kind, difficulty=1, held_out=False)


def row_task(rng: random.Random, cells: tuple[str, ...]) -> tuple[str, str]:
    """What to do with one row of symbols, and what comes of it."""
    kind = rng.choice(("count", "count", "find", "find", "digits"))
    if kind == "count":
        colour = rng.choice(list(world.COLOURS))
        count = sum(cell in (colour[0], colour[0].upper()) for cell in cells)
        return f"Count {colour}:", str(count)
    if kind == "find":
        target = rng.choice(list(world.OBJECT_SYMBOLS))
        present = [cell for cell in cells if cell in world.OBJECT_SYMBOLS]
        if present and rng.random() < 0.5:
            target = rng.choice(present)
        return f"Find {target} :", str(int(target in cells))
    found = [str(world.DIGIT_WORDS.index(c)) for c in cells if c in world.DIGIT_WORDS]
    return "Digits:", " ".join(found) or world.EMPTY


def drill(rng: random.Random) -> tuple[str, Image.Image | None, str]:
    """A few exercises in a row: given and solved, or made up and solved.

    Made-up ones matter: their solution can be worked out from the response alone, as reasoning is.
    With given ones only, a small model looks everything up in the prompt, and after a cold start
    it named the largest of the digits it had just written in 57 % of cases.
    """
    tasks, solutions = zip(*(exercise(rng) for _ in range(rng.randint(1, 4))), strict=True)
    asked = rng.choice(PRACTICE_WORDINGS) if rng.random() < 0.5 else " ".join(tasks)
    return asked, None, " ".join(solutions)


def row_drill(rng: random.Random) -> tuple[str, Image.Image | None, str]:
    """A scene in symbols; one of its rows written out again, and what there is in it."""
    scene = random_scene(rng)
    row = rng.randrange(len(scene.rows))
    name, cells = scene.row_names[row], scene.rows[row]
    what, value = row_task(rng, cells)
    line = f"{name} {' '.join(cells)} ."
    return f"{scene.transcript} . {what} {name} row .", None, f"{what} {line} {value}"


def make_batch(
    rng: random.Random, kind: str, tokenizer, image_processor, size: int
) -> dict[str, torch.Tensor]:
    """Tokenized examples of one kind, padded on the right, labels on response tokens.

    One kind a batch: drills are a third as long as twins, and padding is most of a mixed batch.
    """
    if kind in ("drill", "row drill"):
        drills = drill if kind == "drill" else row_drill
        examples = [drills(rng) for _ in range(size)]
    else:
        make = continuation if kind.startswith("continue") else transcription
        examples = [make(rng, image=kind.endswith("image")) for _ in range(size)]
    images = [image for _, image, _ in examples if image is not None]
    vision = image_processor(images=images, return_tensors="pt") if images else {}
    grids = iter(vision["image_grid_thw"].tolist() if images else [])
    rows = []
    for ask, image, response in examples:
        media = ""
        if image is not None:
            t, h, w = next(grids)
            media = f"<|vision_start|>{'<|image_pad|>' * (t * h * w // 4)}<|vision_end|>"
        prompt = f"<|im_start|>user\n{media}{ask}<|im_end|>\n<|im_start|>assistant\n"
        rows.append((prompt, f"{response}<|im_end|>"))
    encoded_prompts = tokenizer([p for p, _ in rows])["input_ids"]
    encoded_responses = tokenizer([r for _, r in rows])["input_ids"]
    longest = max(len(p) + len(r) for p, r in zip(encoded_prompts, encoded_responses, strict=True))
    input_ids = torch.full((size, longest), tokenizer.pad_token_id)
    labels = torch.full((size, longest), -100)
    attention = torch.zeros((size, longest), dtype=torch.long)
    for i, (p, r) in enumerate(zip(encoded_prompts, encoded_responses, strict=True)):
        input_ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        attention[i, : len(p) + len(r)] = 1
    image_pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return dict(
        input_ids=input_ids,
        labels=labels,
        attention_mask=attention,
        mm_token_type_ids=(input_ids == image_pad).long(),
        **vision,
    )


PHASES: dict[str, dict[str, int]] = {
    "perceive": {"image": 50, "twin": 25, "drill": 25},
    "continue": {
        "image": 20,
        "twin": 10,
        "drill": 30,
        "continue image": 20,
        "continue twin": 20,
    },
    "rows": {
        "image": 12,
        "twin": 8,
        "drill": 10,
        "row drill": 40,
        "continue image": 15,
        "continue twin": 15,
    },
    "practice": {
        "image": 12,
        "twin": 8,
        "drill": 45,
        "row drill": 15,
        "continue image": 10,
        "continue twin": 10,
    },
}
"""Share of each kind of batch in each phase."""


def train(output: Path, phase: str, *, seed: int, steps: int, stop_at: int, lr: float) -> None:
    """One phase on the model in ``output``, which is replaced (bfloat16 on disk).

    Args:
        steps: length of the rate's cosine.
        stop_at: step to stop at, before the cosine ends if that is enough.
    """
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        Qwen2_5_VLForConditionalGeneration,
    )

    tokenizer = AutoTokenizer.from_pretrained(output)
    image_processor = AutoImageProcessor.from_pretrained(output, backend="pil")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(output, dtype=torch.float32)
    model.train()
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    kinds = PHASES[phase]
    started = time.time()
    running: dict[str, float] = {}
    for step in range(stop_at):
        kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
        size = BATCH * 2 if "drill" in kind else BATCH
        batch = make_batch(rng, kind, tokenizer, image_processor, size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running[kind] = 0.9 * running.get(kind, loss.item()) + 0.1 * loss.item()
        if step % 50 == 0 or step == stop_at - 1:
            losses = " ".join(f"{name} {value:.4f}" for name, value in sorted(running.items()))
            seconds = time.time() - started
            print(f"{phase} step {step} loss: {losses} {seconds:.0f} s", flush=True)
    model.bfloat16().save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ovr_fast.toy.base", description="Make the toy base model."
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", choices=PHASES, help="run one phase on the model that is in --output already"
    )
    parser.add_argument(
        "--new-tokenizer",
        action="store_true",
        help="train a tokenizer on the toy world's words instead of keeping the shipped one",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    declare_if_broken()
    output, seed = arguments.output, arguments.seed
    if output.resolve() == SHIPPED:
        parser.error(f"--output {output} is the shipped base; write another folder and compare")
    if arguments.only is None:
        if arguments.new_tokenizer:
            build_processor(output)
        else:
            copy_processor(output)
        build_model(output, seed).save_pretrained(output)
    schedule: dict[str, Any] = {
        "perceive": dict(steps=6000, stop_at=3200, lr=1.5e-3),
        "continue": dict(steps=1100, stop_at=1100, lr=1.2e-3),
        "rows": dict(steps=1400, stop_at=1400, lr=1.2e-3),
        "practice": dict(steps=2000, stop_at=2000, lr=1.2e-3),
    }
    for number, (phase, settings) in enumerate(schedule.items()):
        if arguments.only in (None, phase):
            train(output, phase, seed=seed + number, **settings)


if __name__ == "__main__":
    main()
