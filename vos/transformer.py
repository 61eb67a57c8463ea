"""MTTR's transformer: each frame's cells and the sentence's tokens in one encoder, queries for objects in a decoder.

    encoder    x = norm1(x + A(x + pos, x + pos, x)); x = norm2(x + linear2(relu(linear1 x)))            post-norm
    decoder    x = norm1(x + A(x + query, x + query, x)); x = norm2(x + A(x + query, memory + pos, memory)); norm3(...)

Frames never attend to one another: each is a sequence of its own, N of them. What binds an object over time is that
every frame has the same queries. Attention has no dropout of its own, so that its probabilities never exist. Botach et
al., "End-to-End Referring Video Object Segmentation with Multimodal Transformers", arXiv 2111.14821; parameter names of
the official code. Not here: the text encoder (`engine.backbones.text`), masks and losses (`head.py`).
"""

import torch
from torch import Tensor, nn

import dr2net
from engine.detr.positions import sine_of_cells
from vos.configs import Model as Settings

TEMPERATURE = 10000.0
NUM_WORDS = 2049  # rows of the table of words, the first for what is no word
TEXT_EPSILON = 1e-12  # of the norm of the text, as officially


class EncoderLayer(nn.Module):
    """x (N, S, C) with position (N, S, C) and padding (N, S), True where padded -> (N, S, C)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        q = x + position
        found = self.self_attn(q, q, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(x + self.dropout(found))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class DecoderLayer(nn.Module):
    """x (N, Q, C) with what the queries are (N, Q, C) and the encoder's memory (N, S, C) -> (N, Q, C)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        q = x + query
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, need_weights=False)[0]))
        q, keys = x + query, memory + position
        found = self.multihead_attn(q, keys, memory, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm2(x + self.dropout(found))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class Encoder(nn.Module):
    """All layers, each given the same positions."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, padding)
        return x


class Decoder(nn.Module):
    """Queries from zero through all layers; what each layer says, normed: (L, N, Q, C)."""

    def __init__(self, layers: list[DecoderLayer], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, memory: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        x, contents = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, query, memory, position, padding)
            contents.append(self.norm(x))
        return torch.stack(contents)


class TextProjection(nn.Module):
    """Features of tokens (B, S, D) -> (B, S, C)."""

    def __init__(self, text_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Linear(text_width, width)
        self.layer_norm = nn.LayerNorm(width, eps=TEXT_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor) -> Tensor:
        return self.dropout(self.layer_norm(self.fc(text)))


class WordTable(nn.Module):
    """Numbers of words (B, S), 0 for none, -> features (B, S, D), learned: of the word, and of its place."""

    def __init__(self, max_words: int, text_width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, text_width)
        self.places = nn.Embedding(max_words, text_width)

    def forward(self, words: Tensor) -> Tensor:
        return self.words(words) + self.places.weight[: words.shape[1]]


class MultimodalTransformer(nn.Module):
    """See the module's docstring; what a row's `finetuning.also` may name, to be recomputed in backward."""

    def __init__(self, own: Settings) -> None:
        super().__init__()
        sizes = (own.width, own.heads, own.feedforward, own.dropout)
        self.encoder = Encoder([EncoderLayer(*sizes) for _ in range(own.encoder_layers)])
        self.decoder = Decoder([DecoderLayer(*sizes) for _ in range(own.decoder_layers)], own.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.txt_proj = TextProjection(own.text_width, own.width, own.dropout)
        self.width = own.width

    def forward(
        self, maps: Tensor, padding: Tensor, text: Tensor, text_padding: Tensor, sample: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Frames' maps (N, C, h, w) and padding (N, h, w); text of the samples (B, S, D) and its padding (B, S); whose
        frame each is, (N,); queries (Q, C) -> contents (L, N, Q, C), and the maps after the encoder (N, C, h, w).
        """
        number, _, height, width = maps.shape
        words = self.txt_proj(text)[sample]
        x = torch.cat([maps.flatten(2).transpose(1, 2), words], dim=1)
        blocked = torch.cat([padding.flatten(1), text_padding[sample]], dim=1)
        with torch.autocast(maps.device.type, enabled=False):
            cells = sine_of_cells(padding, self.width, TEMPERATURE).flatten(1, 2)
        position = torch.cat([cells, cells.new_zeros(words.shape)], dim=1)
        memory = self.encoder(x, position, blocked)
        contents = self.decoder(queries.expand(number, -1, -1), memory, position, blocked)
        seen = memory[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        return contents, seen

    def recompute(self, chunk_mib: float | None) -> None:
        """Keep only what comes into each layer; layers run whole."""
        for layer in (*self.encoder.layers, *self.decoder.layers):
            dr2net.recompute(layer)
