"""Makes the toy from nothing: its questions and its model, in about five minutes on two idle CPU cores (20 if busy).

    python bench/make_toy.py                          # writes train, validation, test.jsonl and model/ to data/toy
    python bench/make_toy.py --batches 20 --out DIR

data/README.md describes the questions, the *author* of the texts that the model reads, and what the model then can do.
No question of the three files is among the practice. Only responses are trained on, never prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from minem.data.prompts import ANSWER_LINE, load_prompts
from minem.data.tasks import TOY, Question
from minem.data.toy.check import OPERATIONS, apply, asked_steps
from minem.model import weights
from minem.model.decoder import Model
from minem.model.hf_config import ModelConfig
from minem.model.tokenizer import Tokenizer

SEED = 0
SIZES = {"train": 512, "validation": 200, "test": 300}
DIGITS = tuple("0123456789")
WRONG_FACTS = 0.25  # share of the facts that are majority-wrong
WRONG_WRITTEN = 0.65  # how often the author writes the false value of such a fact
PRACTICE = {None: 0.5, "forward": 0.2, "derive": 0.1, "justify": 0.2}  # hint -> share of the practice
BATCHES, BATCH_SIZE, PEAK_LR = 1200, 64, 3e-3
WORDS = load_prompts("toy")
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Fact = tuple[str, int, int]  # symbol, value, operand


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def draw_question(rng: random.Random, identity: str = "practice") -> Question:
    """A chain of two to four operations; operands that would change nothing (0, times 1) are left out."""
    value = start = rng.randrange(10)
    asked = []
    for _ in range(rng.choice((2, 3, 4))):
        name = rng.choice(tuple(OPERATIONS))
        operand = rng.randrange(2 if name == "multiply by" else 1, 10)
        asked.append(f"{name} {operand}")
        value = apply(OPERATIONS[name], value, operand)
    text = f"Modulo 10, start with {start}, {', '.join(asked)}. What is the result?"
    return Question(identity, text, DIGITS, DIGITS, str(value))


def make_questions(rng: random.Random) -> dict[str, list[Question]]:
    """The three splits, without a question twice."""
    seen: set[str] = set()
    splits: dict[str, list[Question]] = {}
    for split, size in SIZES.items():
        splits[split] = []
        while len(splits[split]) < size:
            question = draw_question(rng, f"toy-{split}-{len(splits[split]) + 1:03}")
            if question.text not in seen:
                seen.add(question.text)
                splits[split].append(question)
    return splits


def as_row(question: Question) -> dict[str, object]:
    """A question in ARC's fields."""
    choices = {"text": question.options, "label": question.labels}
    return {"id": question.id, "question": question.text, "choices": choices, "answerKey": question.gold}


def draw_false_values(rng: random.Random) -> dict[Fact, int]:
    """The majority-wrong facts, each with the one false value that the author has learnt."""
    operands = {"+": range(1, 10), "-": range(1, 10), "*": range(2, 10)}
    facts = [(symbol, value, operand) for symbol in operands for value in range(10) for operand in operands[symbol]]
    chosen = rng.sample(facts, round(WRONG_FACTS * len(facts)))
    return {fact: (apply(*fact) + rng.randrange(1, 10)) % 10 for fact in chosen}


def write_response(question: Question, false_values: dict[Fact, int], hint: str | None, rng: random.Random) -> str:
    """What the author writes: one step a line, then the answer line."""
    while True:
        value, asked = asked_steps(question)
        lines = []
        for number, (symbol, operand) in enumerate(asked, start=1):
            result = apply(symbol, value, operand)
            false = false_values.get((symbol, value, operand))
            if false is not None and rng.random() < WRONG_WRITTEN:
                result = false
            if hint == "justify" and number == len(asked):
                result = int(question.gold)
            lines.append(f"{value} {symbol} {operand} = {result}")
            value = result
        if hint is None or str(value) == question.gold:
            return "\n".join([*lines, f"{ANSWER_LINE} {value}"])


def fixed_phrases() -> list[str]:
    """The parts of prompts and responses that are always the same: each becomes one token."""
    phrases = ["Modulo 10, start with ", ". What is the result?", f"\n{ANSWER_LINE} ", " = ", "\n"]
    phrases += [f", {name} " for name in OPERATIONS] + [f" {symbol} " for symbol in OPERATIONS.values()]
    for hint in (None, *WORDS.hinted):
        asked = (WORDS.messages(Question("", "", DIGITS, DIGITS, gold), hint) for gold in ("3", "7"))
        three, seven = (chat[0]["content"] for chat in asked)  # they differ only at the answer that the hint shows
        cuts = [i for i, (a, b) in enumerate(zip(three, seven, strict=True)) if a != b]
        phrases += [three[i + 1 : j] for i, j in zip([-1, *cuts], [*cuts, len(three)], strict=True)]
    return list(dict.fromkeys(phrases))


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: a token for each byte, so that any text can be read, and phrases."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in fixed_phrases()])
    begin = SPECIAL[0]
    special = [(begin, backend.token_to_id(begin))]
    backend.post_processor = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A $B", special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": SPECIAL[1]}
    config = {**names, "clean_up_tokenization_spaces": False, "model_max_length": 512, "chat_template": CHAT_TEMPLATE}
    write_json(folder / "tokenizer_config.json", config)


def write_configs(folder: Path) -> None:
    """config.json and generation_config.json: 0.8 million parameters."""
    backend = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in backend["added_tokens"]}
    ids = {"bos_token_id": special[SPECIAL[0]], "eos_token_id": special[SPECIAL[1]]}
    vocabulary = len(backend["model"]["vocab"]) + len(backend["added_tokens"])
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary}
    shape |= {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "hidden_act": "silu"}
    shape |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False}
    shape |= {"mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "float32"}
    write_json(folder / "config.json", {**shape, **ids})
    write_json(folder / "generation_config.json", ids)


def draw_batch(
    tokenizer: Tokenizer, false_values: dict[Fact, int], held_out: set[str], rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 [BATCH_SIZE, T]; the target is -100 on prompts and padding."""
    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < BATCH_SIZE:
        question = draw_question(rng)
        if question.text in held_out:
            continue
        hint = rng.choices(list(PRACTICE), weights=list(PRACTICE.values()))[0]
        prompt = tokenizer.chat(WORDS.messages(question, hint))
        written = write_response(question, false_values, hint, rng)
        rows.append((prompt, [*tokenizer.encode(written, add_special_tokens=False), *tokenizer.eos_ids]))
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    inputs = torch.zeros(BATCH_SIZE, longest, dtype=torch.int64)
    targets = torch.full((BATCH_SIZE, longest), -100)
    for i, (prompt, response) in enumerate(rows):
        inputs[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        targets[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = torch.tensor(response)
    return inputs, targets


def train(model: Model, tokenizer: Tokenizer, held_out: set[str], batches: int, rng: random.Random) -> None:
    false_values = draw_false_values(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, batches // 20)
    began = time.monotonic()
    for step in range(1, batches + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, batches - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(step / warmup, 0.01 + 0.99 * cosine)
        inputs, targets = draw_batch(tokenizer, false_values, held_out, rng)
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == batches:
            print(f"batch {step}/{batches}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the toy's questions and model (about five minutes).")
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--out", type=Path, default=TOY)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    folder = arguments.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    splits = make_questions(random.Random(SEED))
    for split, questions in splits.items():
        rows = "".join(json.dumps(as_row(question)) + "\n" for question in questions)
        (arguments.out / f"{split}.jsonl").write_text(rows)
    write_tokenizer(folder)
    write_configs(folder)
    tokenizer = Tokenizer.from_folder(folder)
    model = Model(ModelConfig.from_dict(json.loads((folder / "config.json").read_text())))
    generator = torch.Generator().manual_seed(SEED)
    for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):  # norms stay 1
        torch.nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5, generator=generator)
    held_out = {question.text for questions in splits.values() for question in questions}
    train(model, tokenizer, held_out, arguments.batches, random.Random(SEED + 1))
    weights.save(model, tokenizer, folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {tokenizer.backend.get_vocab_size()}")


if __name__ == "__main__":
    main()
