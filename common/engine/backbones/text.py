"""Frozen text encoders as features of tokens, kept on disk, and hashed words for a table that is learned.

    text = build_text("roberta-base", 64, cache=root / "text_features")   # a name on the hub
    text = build_text("minilm", 64, cache=...)                # what scripts bring to MINILM_FOLDER
    text = build_text("encoders/mine", 64, cache=...)         # a folder: config.json, model.safetensors, tokenizer
    text.prepare(sentences)                                   # what is not on disk yet, all at once
    text.features("the red star")                             # (S, D) float32, first and last token included
    build_text("words", 64).features("the red star")          # (S,) int64 ids

An encoder runs in eval mode, in float32, one sentence at a time, so its features are a function of the sentence and the
encoder's files; on disk they stand under the checksum of both. It is in memory only while something is computed. Not
here: what is done with the features, and sentences (the tasks).
"""

import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.data.workers import tracked
from engine.files import appearing, require_file
from engine.weights import read_tensors, refuse_non_finite, write_tensors

MINILM_FOLDER = Path("data/minilm")  # below the repository's root
VOCABULARY = 2048  # hashed words; ids are 1 to this, 0 is padding
VERSION = 1  # raise it when a change here changes the features
SHARD = 512  # sentences per file
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",))
ON_HUB = ["*.json", "*.txt", "*.model", "model*.safetensors"]
OTHERS = "--data.text FOLDER of an encoder, minilm (brought by prepare --preset laptop), or words"


class Text(Protocol):
    """What a task needs of a text encoder."""

    width: int  # channels of a token's features; 0: ids, for a table that is learned

    def features(self, sentence: str) -> Tensor:
        """(S, width) float32, or (S,) int64 ids; S >= 1."""

    def prepare(self, sentences: Iterable[str]) -> None:
        """Compute what is not known yet."""


def build_text(name: str, max_words: int, *, cache: Path | None = None) -> Text:
    """The encoder of this name; no weights are loaded yet.

    max_words: tokens of a sentence, the special ones included; the rest is cut, with a warning. cache: the folder in
    which features are kept; None: in memory only. ValueError, with the files that are wanted, if it is not there.
    """
    if name == "words":
        return HashedWords(max_words)
    return FrozenText(_folder_of(name), max_words, cache)


def words(sentence: str) -> list[str]:
    """The lower-cased words; one with hyphens, as counter-clockwise, is one. What has no word is a word itself."""
    return re.findall(r"\w+(?:[-']\w+)*", sentence.lower()) or [sentence.lower()]


class HashedWords:
    """Words as numbers, without a list of words: crc32 modulo VOCABULARY, plus 1."""

    width = 0

    def __init__(self, max_words: int) -> None:
        self.max_words = max_words

    def features(self, sentence: str) -> Tensor:
        """(S,) int64."""
        found = words(sentence)
        if len(found) > self.max_words:
            _warn_of_cut(sentence, len(found), self.max_words)
        return torch.tensor([zlib.crc32(word.encode()) % VOCABULARY + 1 for word in found[: self.max_words]])

    def prepare(self, sentences: Iterable[str]) -> None:
        """Nothing is to be done."""


class FrozenText:
    """An encoder of transformers from the files of a folder."""

    def __init__(self, folder: Path, max_words: int, cache: Path | None) -> None:
        self.folder, self.max_words = folder, max_words
        self.width = _width_of(folder)
        self.fingerprint = _fingerprint(folder, max_words)
        self.cache = None if cache is None else cache / self.fingerprint
        self.memory: dict[str, Tensor] = {}
        self.encoder: tuple[Any, Any] | None = None
        self._read_cache()

    def features(self, sentence: str) -> Tensor:
        """(S, width) float32."""
        key = _key(sentence)
        if key not in self.memory:
            self.prepare([sentence])
        return self.memory[key]

    def prepare(self, sentences: Iterable[str]) -> None:
        """Encode what is not on disk, and let go of the encoder if that was much."""
        missing = list(
            {_key(sentence): sentence for sentence in sentences if _key(sentence) not in self.memory}.items()
        )
        if not missing:
            return
        if self.encoder is None:
            self.encoder = _load(self.folder)
        show = tracked(f"encoding sentences for {self.cache or 'this run'}", missing) if len(missing) > 64 else missing
        fresh: dict[str, Tensor] = {}
        for key, sentence in show:
            fresh[key] = self._encode(sentence)
            if len(fresh) == SHARD:
                self._keep(fresh)
                fresh = {}
        self._keep(fresh)
        if len(missing) > 1:
            self.encoder = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the encoder: a worker that needs one loads it."""
        return {**self.__dict__, "encoder": None}

    @torch.no_grad()
    def _encode(self, sentence: str) -> Tensor:
        assert self.encoder is not None
        tokenizer, model = self.encoder
        limit = min(self.max_words, _positions(model.config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tokenizer's own, of long sentences, names no sentence
            ids = tokenizer(sentence, truncation=True, max_length=limit, return_tensors="pt")
            whole = len(tokenizer(sentence, truncation=False)["input_ids"])
        if whole > limit:
            _warn_of_cut(sentence, whole, limit)
        found = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[0]
        return found.float().contiguous()

    def _read_cache(self) -> None:
        for path in sorted(self.cache.glob("[0-9a-f]*.safetensors")) if self.cache is not None else []:
            try:
                tensors = read_tensors(path)
                refuse_non_finite(tensors, str(path))
            except ValueError as error:
                warnings.warn(f"{error}; its features are computed again", stacklevel=4)
                path.unlink(missing_ok=True)
                continue
            self.memory |= {key: value for key, value in tensors.items() if value.shape[1:] == (self.width,)}

    def _keep(self, fresh: dict[str, Tensor]) -> None:
        self.memory |= fresh
        if self.cache is None or not fresh:
            return
        name = hashlib.sha256(" ".join(sorted(fresh)).encode()).hexdigest()[:16]
        try:
            with appearing(self.cache / f"{name}.safetensors") as temporary:
                write_tensors(fresh, temporary)
        except OSError as error:
            warnings.warn(f"{self.cache}: text features cannot be kept there ({error}); computed anew", stacklevel=4)


def _key(sentence: str) -> str:
    return hashlib.sha256(sentence.encode()).hexdigest()[:32]


def _warn_of_cut(sentence: str, length: int, limit: int) -> None:
    text = f"a sentence of {length} tokens is cut to {limit}: {sentence[:60]!r}..."
    warnings.warn(f"{text}; --data.max-words sets the limit", stacklevel=4)


def _folder_of(name: str) -> Path:
    """Where the encoder's files are; those of a name on the hub are fetched if they are not on this machine."""
    if name == "minilm":
        if not MINILM_FOLDER.is_dir():
            remedy = "run the task's prepare --preset laptop in the repository's root"
            raise ValueError(f"{MINILM_FOLDER}: the text encoder minilm is not there; {remedy}, or give {OTHERS}")
        folder = MINILM_FOLDER
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _from_hub(name)
    tokenizer = any(all((folder / file).is_file() for file in files) for files in TOKENIZERS)
    lacking = [file for file in ("config.json",) if not (folder / file).is_file()]
    lacking += [] if list(folder.glob("model*.safetensors")) else ["model.safetensors"]
    lacking += [] if tokenizer else ["tokenizer.json (or vocab.json and merges.txt, or vocab.txt)"]
    if lacking:
        raise ValueError(f"{folder}: the text encoder lacks {', '.join(lacking)}; put them there, or give {OTHERS}")
    return folder


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("text encoders need transformers; install it with: pip install 'dr2net[engine]'") from error
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"--data.text {name}: no such folder; give {OTHERS}")
    reason = ""
    for local in (True, False):
        try:
            return Path(snapshot_download(name, allow_patterns=ON_HUB, local_files_only=local))
        except Exception as error:  # of several libraries, without a common type
            reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
    raise ValueError(
        f"--data.text {name}: is no folder, and the hub did not bring it ({reason}). Without a network, put its "
        "config.json, model.safetensors and tokenizer.json (or vocab.json and merges.txt) into a folder, and give "
        f"{OTHERS}"
    )


def _config_of(folder: Path) -> dict[str, Any]:
    from engine.files import read_json

    content = read_json(folder / "config.json", f"give {OTHERS}")
    if not isinstance(content, dict):
        raise ValueError(f"{folder / 'config.json'}: is not the configuration of an encoder; give {OTHERS}")
    return content


def _width_of(folder: Path) -> int:
    width = _config_of(folder).get("hidden_size")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"{folder / 'config.json'}: has no hidden_size, so it is no text encoder; give {OTHERS}")
    return width


def _positions(config: Any) -> int:
    """Tokens that the encoder has positions for; RoBERTa's count begins behind that of its padding."""
    count = getattr(config, "max_position_embeddings", None) or 512
    padding = getattr(config, "pad_token_id", None) or 0
    return int(count) - (int(padding) + 1 if "roberta" in str(getattr(config, "model_type", "")) else 0)


def _fingerprint(folder: Path, max_words: int) -> str:
    """Of everything that the features depend on but the sentence."""
    digest = hashlib.sha256(json.dumps([VERSION, max_words]).encode())
    known = {
        "config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        *(n for group in TOKENIZERS for n in group),
    }
    for path in sorted(p for p in folder.iterdir() if p.name in known or p.match("model*.safetensors")):
        require_file(path, "give a folder of an encoder")
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model, in eval mode, without gradients. ValueError if the files are not those of an encoder."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("text encoders need transformers; install it with: pip install 'dr2net[engine]'") from error
    quiet = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # of several libraries, without a common type
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise ValueError(f"{folder}: transformers cannot load this text encoder ({reason}); give {OTHERS}") from error
    finally:
        logging.set_verbosity(quiet)
        logging.enable_progress_bar()
    lost = sorted(key for key in report["missing_keys"] if not key.startswith("pooler"))
    if lost or report.get("mismatched_keys"):
        raise ValueError(f"{folder}: its weights do not fit its config.json: {', '.join(lost[:4]) or 'other shapes'}")
    refuse_non_finite(model.state_dict(), str(folder))
    return tokenizer, model.eval().requires_grad_(False)
