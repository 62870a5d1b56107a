"""Small tokenizers of the kinds that language models use."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import Decoder
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Größe, naïve, façade: 你好, 世界。 Привет мир. 👍🏽 👨‍👩‍👧 😀😃",
    "def main():\n    return [x ** 2 for x in range(10)]\n",
]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As in GPT-2, Llama 3 and Qwen: every byte is a token, merges cross no characters' rules."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As in Llama 2: words carry their space, what has no token is spelled in bytes."""
    words = ["▁the", "▁fox", "▁a", "the", "fox", "a", "▁", ".", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _of_words(tokens: list[str], decoder: Decoder) -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(["<unk>", "</s>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """As in BERT: words are joined by spaces, their inner pieces begin with ##."""
    words = ["the", "fox", "##es", "##é", "##", ".", "!", "n't", "'", "do", "not", "##n ' t", "你"]
    return _of_words(words, decoders.WordPiece())


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As in T5 and XLM-R: words carry their space as a mark."""
    words = ["▁the", "▁fox", "es", "▁", "▁▁", "a▁b", "é", "👍🏽", "<0x41>"]
    return _of_words(words, decoders.Metaspace())


@cache
def word_ends() -> PreTrainedTokenizerFast:
    """As in the first GPT: a word's last piece carries its end; no token has a text of its own."""
    return _of_words(["the</w>", "fox</w>", "fo", "x", "é</w>", "👍"], decoders.BPEDecoder())
