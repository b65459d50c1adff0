"""Tiny tokenizers of each kind, trained in the process."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat, and the dog ran to Paris.",
    "def area(self):\n    return self.width\n",
    "Zürich é 日本",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template that puts a BOS first, and an EOS behind each message."""


def wrapped(tokenizer: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    """Returns a tokenizer as transformers has it."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**NAMES, **settings})


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: a character may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    every = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=every, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return wrapped(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """BPE on words with `▁` in front and bytes as a last resort, as Llama's: it puts a space before a text."""
    bytes_ = [f"<0x{index:02X}>" for index in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([word for text in CORPUS * 3 for word in text.split()], trainer)
    return wrapped(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece, as BERT's: what continues a word is marked, and white space is not kept."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return wrapped(tokenizer, clean_up_tokenization_spaces=True)


def words(vocabulary: list[str], **settings: object) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words, by white space."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer, **settings)


def characters(alphabet: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single characters, as models of proteins have."""
    tokenizer = Tokenizer(models.WordLevel({one: i for i, one in enumerate([*SPECIAL, *alphabet])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrapped(tokenizer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
    "words": lambda: words([*SPECIAL, *(f"w{index}" for index in range(20))]),
    "characters": lambda: characters("ACDEFGHIKLMNPQRSTVWY"),
}
"""A tokenizer of each kind."""
