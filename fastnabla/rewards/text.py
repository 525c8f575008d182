"""Prompts for the text towers: tokenizers, prompt cleaning, and a cache of encoded prompts."""

import html
import json
import re
import unicodedata
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Tokenize = Callable[[str], list[int]]
"""Prompt → token ids, including start and end, truncated to the text tower's maximum length."""


class PromptCache:
    """A least-recently-used cache of results by prompt.

    Each prompt is computed by itself, not in a batch, so that its result is bitwise independent of other prompts.

    Args:
        compute: prompt → tensor; called without gradients.
        size: largest number of prompts kept.
    """

    def __init__(self, compute: Callable[[str], Tensor], size: int = 4096) -> None:
        self.compute, self.size = compute, size
        self.results: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompt: str) -> Tensor:
        if prompt not in self.results:
            # A tensor created in inference mode cannot enter a later graph.
            with torch.inference_mode(False), torch.no_grad():
                self.results[prompt] = self.compute(prompt)
            if len(self.results) > self.size:
                self.results.popitem(last=False)
        self.results.move_to_end(prompt)
        return self.results[prompt]


def clip_tokenizer(vocab: Path, merges: Path, tokens: int, max_length: int) -> Tokenize:
    """CLIP's tokenizer.

    Args:
        vocab: path of vocab.json.
        merges: path of merges.txt.
        tokens: required vocabulary size.
        max_length: largest number of token ids, including start and end.

    Raises:
        ValueError: the files are not a CLIP vocabulary.
    """
    from transformers import CLIPTokenizer

    try:
        ids = json.loads(vocab.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        tokenizer = CLIPTokenizer(vocab=ids, merges=pairs)
        end = ids["<|endoftext|>"]
    except Exception as error:
        raise ValueError(f"{vocab} and {merges.name} are not a CLIP vocabulary ({error!r}).") from error
    if len(ids) != tokens or end != tokens - 1:
        raise ValueError(
            f"{vocab} has {len(ids)} tokens, the last of them {end}, but the text tower {tokens}; give its vocabulary."
        )
    return lambda prompt: tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"]


def bert_tokenizer(vocab: Path, tokens: int, max_length: int) -> Tokenize:
    """BERT's lower-case WordPiece tokenizer.

    Args:
        vocab: path of vocab.txt.
        tokens: required vocabulary size.
        max_length: largest number of token ids, including [CLS] and [SEP].

    Raises:
        ValueError: the file is not a BERT vocabulary.
    """
    from transformers import BertTokenizer

    try:
        lines = vocab.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{vocab} is not a BERT vocabulary ({error}).") from error
    ids = {token: i for i, token in enumerate(lines)}
    if missing := [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in ids]:
        raise ValueError(f"{vocab} is not a BERT vocabulary: it has no {', '.join(missing)}.")
    if len(ids) != tokens:
        raise ValueError(f"{vocab} has {len(ids)} tokens, but the text tower {tokens}; give its vocabulary.")
    tokenizer = BertTokenizer(vocab=ids)
    return lambda prompt: tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"]


def hash_tokenizer(start: int, end: int, low: int, high: int, max_length: int) -> Tokenize:
    """A hashing tokenizer that needs no vocabulary: each word or punctuation mark maps to an id in [low, high).

    For random weights only. The ids match no trained model, but they are deterministic, one per word.
    """

    def tokenize(prompt: str) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", prompt.lower())[: max_length - 2]
        return [start, *(low + zlib.crc32(word.encode()) % (high - low) for word in words), end]

    return tokenize


_LETTERS = str.maketrans(dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"') | {"ﬅ": "ſt"})
_WIDE = re.compile("[ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ\u3000\uff01-\uffef]+")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def clean_prompt(prompt: str) -> str:
    """Straighten quotes, expand ligatures and full-width forms, decode HTML entities, and remove control characters.

    This is open_clip's cleaning with the package ftfy, except that text decoded with the wrong encoding ("cafÃ©") is left
    unchanged; ftfy repairs it.
    """
    for _ in range(2):
        prompt = html.unescape(prompt)
    prompt = _WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), _CONTROL.sub("", prompt))
    return unicodedata.normalize("NFC", prompt.translate(_LETTERS)).strip()
