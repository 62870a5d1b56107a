"""Train the demo model that ships in `src/inlay/demo_model/`: a small Llama of Python's own words.

    python scripts/train_demo.py      # 13 minutes at the 8,400 tokens/s of 2 idle cores
    python scripts/train_demo.py --steps 60 --output /tmp/demo      # dry run

The text is `pydoc_data.topics`, the docstrings in the standard library's source files (read with
`ast`, nothing is imported) and those of `builtins`. Whole documents are held out before the
tokenizer or the model sees anything. Everything is seeded; the text depends on the Python version.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import hashlib
import inspect
import math
import platform
import pydoc_data.topics
import random
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "inlay" / "demo_model"
SEED = 1991
HELD_OUT_SHARE = 0.04
# Chosen, before any training, for a mix of topics, builtins and modules like the whole's.
SPLIT_SALT = "178:"
HELD_OUT_MAX_BYTES = 200_000
EVAL_WINDOW = 512

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('role must be system, user or assistant, not ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
QUESTIONS = {
    "topic": ("What is {}?", "Explain {}.", "Tell me about {} in Python."),
    "module": ("What is the {} module?", "Explain the {} module.", "What is {}?"),
    "class": ("What is {}?", "Explain the class {}.", "What is {} for?"),
    "function": ("What does {} do?", "Explain {}.", "What is {}?", "How do I use {}?"),
}
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


# --- Corpus


@dataclass
class Entry:
    """One documented thing: the unit of a chat answer."""

    kind: str  # a key of QUESTIONS
    name: str
    heading: str  # the line printed above the text: a signature, or nothing
    text: str

    def plain(self) -> str:
        if not self.heading:
            return self.text
        return f"{self.heading}\n{textwrap.indent(self.text, '    ')}"


@dataclass
class Document:
    """A topic or a module; held out or trained on as a whole."""

    name: str
    entries: list[Entry] = field(default_factory=list)

    def plain(self) -> str:
        return "\n\n".join(entry.plain() for entry in self.entries)

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256((SPLIT_SALT + self.name).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def read_topics() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topic {name}", [Entry("topic", name, "", text.strip())])


def read_builtins() -> Iterator[Document]:
    """Their docstrings live in C; `builtins` is loaded in every interpreter."""
    for name, thing in sorted(vars(builtins).items()):
        if name.startswith("_") or not callable(thing):
            continue
        members = [(name, thing)]
        if isinstance(thing, type):
            members += [(f"{name}.{key}", value) for key, value in sorted(vars(thing).items())]
        document = Document(f"builtin {name}")
        for qualified, member in members:
            if doc := inspect.getdoc(member) if callable(member) else None:
                kind = "class" if isinstance(member, type) else "function"
                signature = getattr(member, "__text_signature__", None) or "(...)"
                heading = ("class " if kind == "class" else "") + qualified + signature
                document.entries.append(Entry(kind, qualified, heading, doc.strip()))
        yield document


def read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # lib2to3 ships files that are wrong on purpose
        module = ".".join(part for part in parts if part != "__init__")
        yield Document(f"module {module}", list(read_entries(tree, module)))


def read_entries(node: ast.AST, name: str) -> Iterator[Entry]:
    """Depth first, in the order of the source, as `help()` would list them."""
    if doc := ast.get_docstring(node):
        if isinstance(node, ast.Module):
            yield Entry("module", name, f"module {name}", doc.strip())
        elif isinstance(node, ast.ClassDef):
            bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
            yield Entry("class", name, f"class {name}{bases}", doc.strip())
        else:
            heading = f"{name}({ast.unparse(node.args)})"
            yield Entry("function", name, heading, doc.strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from read_entries(child, f"{name}.{child.name}")


def collect() -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents), without one docstring in both."""
    documents = [*read_topics(), *read_builtins(), *read_stdlib()]
    train = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    seen: set[str] = set()
    seen_lines: set[str] = set()
    for document in train:
        document.entries = [e for e in document.entries if is_new(e.text, seen)]
        for entry in document.entries:
            seen_lines.update(long_lines(entry.text))
    for document in held_out:
        # Copied and lightly edited docstrings are common: one shared long line disqualifies
        # a short entry, otherwise the held-out figure would measure memory.
        document.entries = [
            e for e in document.entries if is_new(e.text, seen) and not is_copy(e.text, seen_lines)
        ]
    return [d for d in train if d.entries], [d for d in held_out if d.entries]


def is_new(text: str, seen: set[str]) -> bool:
    key = " ".join(text.split())
    if len(key) < 12 or key in seen:
        return False
    seen.add(key)
    return True


def long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 40]


def is_copy(text: str, seen_lines: set[str]) -> bool:
    lines = long_lines(text)
    return sum(line in seen_lines for line in lines) > 0.2 * len(lines)


# --- Tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, END, *ROLES.values()],
        # All 256 bytes, so that any UTF-8 text round-trips.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,  # or rules of asterisks and deep indents take whole entries
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[END, *ROLES.values()],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """No BOS added, and no warning about texts longer than the context."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


# --- Training data


def chat_text(entries: list[Entry], rng: random.Random) -> str:
    parts = []
    for entry in entries:
        question = rng.choice(QUESTIONS[entry.kind]).format(entry.name)
        parts += [ROLES["user"], question, END, ROLES["assistant"], opening(entry.text), END]
    return "".join(parts)


def opening(text: str, limit: int = 1500) -> str:
    """Whole paragraphs from the start of a text; an answer need not be a chapter."""
    kept = ""
    for paragraph in text.split("\n\n"):
        if kept and len(kept) + len(paragraph) > limit:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept[: 2 * limit]


class Stream:
    """An endless shuffled stream of packed rows: documents, and conversations about them."""

    def __init__(
        self,
        documents: list[Document],
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        chat_share: float,
    ) -> None:
        self.documents, self.tokenizer, self.seq_len = documents, tokenizer, seq_len
        self.chat_share = chat_share
        self.rng = random.Random(SEED)
        self.encoded = [self.encode(d.plain(), EOS) for d in documents]
        self.num_tokens = sum(map(len, self.encoded))
        self.rows: list[list[int]] = []

    def encode(self, text: str, end: str = "") -> list[int]:
        return token_ids(self.tokenizer, BOS + text + end)

    def conversations(self) -> list[list[int]]:
        """About `chat_share` of an epoch: one to four turns that stay within one module."""
        texts, num_tokens = [], 0
        weights = [sum(len(opening(e.text)) for e in d.entries) ** 0.7 for d in self.documents]
        while num_tokens < self.chat_share * self.num_tokens:
            document = self.rng.choices(self.documents, weights)[0]
            turns = min(self.rng.choice((1, 1, 2, 4)), len(document.entries))
            texts.append(self.encode(chat_text(self.rng.sample(document.entries, turns), self.rng)))
            num_tokens += len(texts[-1])
        return texts

    def new_epoch(self) -> None:
        pieces = self.encoded + self.conversations()
        self.rng.shuffle(pieces)
        flat = [token for piece in pieces for token in piece]
        # A random phase, so that rows are cut elsewhere in each epoch.
        start = self.rng.randrange(self.seq_len)
        last = len(flat) - self.seq_len - 1
        self.rows = [flat[i : i + self.seq_len + 1] for i in range(start, last, self.seq_len)]
        self.rng.shuffle(self.rows)

    def batch(self, size: int) -> torch.Tensor:  # [size, seq_len + 1]
        while len(self.rows) < size:
            self.new_epoch()
        return torch.tensor([self.rows.pop() for _ in range(size)])


# --- Model


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=256,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= math.sqrt(2 * args.layers)
    return model


def build_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    warmup = max(1, args.steps // 25)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict:
    """Perplexity and bits per byte of a text, in windows of EVAL_WINDOW tokens after a BOS."""
    model.eval()
    ids = torch.tensor(token_ids(tokenizer, text))
    nats = 0.0
    for window in ids.split(EVAL_WINDOW):
        row = F.pad(window, (1, 0), value=tokenizer.bos_token_id)[None]  # [1, window + 1]
        logits = model(row[:, :-1]).logits.float()[0]
        nats += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    model.train()
    return {
        "tokens": len(ids),
        "perplexity": math.exp(nats / len(ids)),
        "bits_per_byte": nats / math.log(2) / len(text.encode()),
    }


def evaluate_unigram(stream: Stream, tokenizer: PreTrainedTokenizerFast, text: str) -> dict:
    """The same figures for add-one token frequencies of the training text."""
    counts = Counter(token for row in stream.encoded for token in row)
    total = sum(counts.values()) + len(tokenizer)
    ids = token_ids(tokenizer, text)
    nats = -sum(math.log((counts[token] + 1) / total) for token in ids)
    return {
        "perplexity": math.exp(nats / len(ids)),
        "bits_per_byte": nats / math.log(2) / len(text.encode()),
    }


def train(model: LlamaForCausalLM, stream: Stream, held_out: str, args: argparse.Namespace) -> dict:
    """Train and save at intervals; returns what the README says about how well it fitted."""
    optimizers = build_optimizers(model, args)
    start = time.perf_counter()
    smooth = math.log(args.vocab_size)
    seen: dict[int, float] = {}  # step -> perplexity of the held-out text's beginning
    model.train()
    for step in range(args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
        rows = stream.batch(args.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth += (loss.item() - smooth) * max(0.05, 1 / (step + 1))
        if (step + 1) % 20 == 0:
            seconds = time.perf_counter() - start
            tokens = (step + 1) * args.batch_size * args.seq_len
            print(
                f"step {step + 1}/{args.steps}  loss {smooth:.3f}  ppl {math.exp(smooth):.1f}  "
                f"{seconds:.0f} s  {tokens / seconds:.0f} tok/s  "
                f"epoch {tokens / (stream.num_tokens * (1 + stream.chat_share)):.1f}",
                flush=True,
            )
        if (step + 1) % args.save_every == 0:
            measured = evaluate(model, stream.tokenizer, held_out[:60_000])
            print("held-out", measured, flush=True)
            seen[step + 1] = measured["perplexity"]
            save(model, stream.tokenizer, held_out, args.output)
    best = min(seen, key=seen.__getitem__, default=args.steps)
    return {
        "minutes": (time.perf_counter() - start) / 60,
        "fitted": math.exp(smooth),
        "best_step": best,
        "best_perplexity": seen.get(best, math.nan),
        "last_perplexity": seen.get(args.steps, math.nan),
    }


# --- Output


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: str, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")


PROMPTS = (
    "The with statement",
    "Return a list of",
    "class Handler",
    "When an exception is raised,",
    "Dictionaries are",
    "subprocess.run(args,",
)


def report(folder: Path, stream: Stream, facts: dict) -> None:
    """Measure what was saved, not what was trained, and write it into the folder's README."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held_out = (folder / "heldout.txt").read_text(encoding="utf-8")
    measured = evaluate(model, tokenizer, held_out)
    unigram = evaluate_unigram(stream, tokenizer, held_out)
    model.eval()
    samples, num_distinct = [], []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        num_distinct.append(len(set(new[:24].tolist())))
        samples.append(tokenizer.decode(output[0], skip_special_tokens=True))
    config = model.config
    text = README.format(
        **facts,
        python=platform.python_version(),
        parameters=model.num_parameters(),
        config=config,
        tokens=measured["tokens"],
        window=EVAL_WINDOW,
        perplexity=measured["perplexity"],
        bits=measured["bits_per_byte"],
        unigram=unigram["perplexity"],
        unigram_bits=unigram["bits_per_byte"],
        distinct=", ".join(map(str, num_distinct)),
        samples="\n\n".join(textwrap.indent(sample, "    ") for sample in samples),
    )
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():  # some distributions move it; the repository has a copy
        (folder / "LICENSE.python.txt").write_bytes(licence.read_bytes())
    print(text)


README = """\
# The demo model

A Llama of {parameters:,} parameters that has read nothing but Python's documentation. It is here
so that `inlay demo` has words to print, and so that perplexity means something when weights are
quantized or tokens are drafted. It knows no facts worth trusting.

| | |
|---|---|
| layers, hidden, intermediate | {config.num_hidden_layers}, {config.hidden_size}, \
{config.intermediate_size} |
| heads, KV heads, head size | {config.num_attention_heads}, {config.num_key_value_heads}, \
{config.head_dim} |
| vocabulary | {config.vocab_size}, byte-level BPE, tied with the output |
| context | trained on rows of {seq_len} tokens; {config.max_position_embeddings} positions |
| weights | bfloat16 |

## Text

`pydoc_data.topics`, the docstrings of `builtins` and of the standard library's source files in
Python {python}: {num_documents} documents, {num_characters:,} characters, {num_tokens:,} tokens.
That text is copyright the Python Software Foundation and its contributors, under the PSF licence
(`LICENSE.python.txt`), which also covers `heldout.txt` and `heldout_c.txt.gz`, verbatim excerpts.

`heldout.txt` ({tokens:,} tokens) is frozen: whole topics and modules chosen by a hash of their
names, taken out before the tokenizer and the model were trained; docstrings that the training text
repeats were dropped from it.

`heldout_c.txt.gz` (88,900 tokens) came later, so that `inlay eval` has more than 100,000 tokens to
judge with: docstrings of the standard library's modules that are written in C, which training never
saw, since it read source files of Python. Those that the training text repeats were dropped in the
same way. `python scripts/held_out_text.py` makes it again, of the same Python. Being signatures for
the most part, it is of other proportions than the training text.

## Training

`python scripts/train_demo.py`, seeded: {steps} steps of {batch_tokens} tokens
({epochs:.1f} epochs, with conversations made of the docstrings mixed in), Muon and AdamW, warm-up
and cosine, bfloat16 autocast; {minutes:.1f} minutes on {threads} shared CPU threads. Another
Python version has other text, and so gives another model.

## Numbers

Held-out text as one stream, windows of {window} tokens after a BOS, these bfloat16 weights computed
in float32:

| | perplexity | bits per byte |
|---|---|---|
| this model | {perplexity:.2f} | {bits:.3f} |
| token frequencies of the training text | {unigram:.0f} | {unigram_bits:.3f} |

Before rounding to bfloat16: {trained_perplexity:.2f}. The last training rows had {fitted:.1f}: a
large gap means that the model knows its training text by heart and is too sure of itself elsewhere,
so that noise, such as that of quantization, may even lower the held-out figure. Compare logits too.
Of the held-out text's first 60,000 characters, the lowest perplexity seen during training was
{best_perplexity:.1f} (step {best_step}), the last {last_perplexity:.1f}; the last weights are kept,
so that the held-out text chose no weights.

Greedy continuations (distinct tokens in the first 24: {distinct}):

{samples}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--chat-share", type=float, default=0.3)
    parser.add_argument("--save-every", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(SEED)
    documents, held_out_documents = collect()
    held_out = "\n\n\n".join(d.plain() for d in held_out_documents)
    held_out = held_out.encode()[:HELD_OUT_MAX_BYTES].decode(errors="ignore") + "\n"
    texts = [d.plain() for d in documents]
    tokenizer = train_tokenizer(texts, args.vocab_size)
    stream = Stream(documents, tokenizer, args.seq_len, args.chat_share)
    model = build_model(tokenizer, args)
    print(f"held out: {[d.name for d in held_out_documents]}")
    print(f"{stream.num_tokens} training tokens, {model.num_parameters()} parameters", flush=True)

    outcome = train(model, stream, held_out, args)
    save(model, tokenizer, held_out, args.output)
    batch_tokens = args.batch_size * args.seq_len
    report(
        args.output,
        stream,
        {
            "steps": args.steps,
            "seq_len": args.seq_len,
            "batch_tokens": batch_tokens,
            "epochs": args.steps * batch_tokens / stream.num_tokens / (1 + args.chat_share),
            **outcome,
            "threads": torch.get_num_threads(),
            "num_documents": len(documents),
            "num_characters": sum(map(len, texts)),
            "num_tokens": stream.num_tokens,
            "trained_perplexity": evaluate(model, tokenizer, held_out)["perplexity"],
        },
    )


if __name__ == "__main__":
    main()
