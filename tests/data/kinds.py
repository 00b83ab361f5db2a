"""Small tokenizers of the kinds that models have, trained on a few lines."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "Hello there!",
    "To be, or not to be: that is the question.",
    "I do not know. It's 1234 past noon",
    "A list:\n\n- one\n- two\n\n\tindented   text",
    "Café naïve, Straße, 東京 and 🙂",
    "x" * 50 + " and so on",
    "  white space at both ends\n",
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """Like GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        tokenizer,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet),
    )


def sentencepiece() -> Tokenizer:
    """Like Llama 2: a BPE of SentencePiece, with bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ascii_texts = [text for text in TEXTS if text.isascii()]
    _trained(tokenizer, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False), ascii_texts)
    description = json.loads(tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    description["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(description))


def unigram() -> Tokenizer:
    """Like T5: NFKC, and one blank for each run of white space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    return _trained(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False, unk_token="<unk>"),
    )


def wordpiece() -> Tokenizer:
    """Like BERT: lower case, no accents, no white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False))


def words() -> Tokenizer:
    """Like a laboratory's: whole words, and the decoder that joins them with blanks."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


KINDS = {kind.__name__: kind for kind in (byte_level, sentencepiece, unigram, wordpiece, words)}


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer, texts: tuple[str, ...] | list[str] = TEXTS) -> Tokenizer:
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
