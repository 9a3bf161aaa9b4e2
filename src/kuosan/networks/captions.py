"""Networks that read captions: what an image is to show, as a vector for each word and one for the whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kuosan.networks.parts import Block, check_size


def check_captions(condition: object, batch: int, device: torch.device) -> Tensor:
    """Token ids (B, L), -1 after the end of each; nothing at all, or a row of -1, is the empty caption.

    Raises:
        ValueError: not whole numbers of shape (B, L), or not one caption for each example.
    """
    if condition is None:
        return torch.full((batch, 1), -1, device=device)
    if not isinstance(condition, Tensor) or condition.is_floating_point() or condition.ndim != 2:
        got = f"{condition.dtype} of shape {tuple(condition.shape)}" if isinstance(condition, Tensor) else condition
        raise ValueError(f"captions are token ids (B, L), -1 after the end of each; got {got}")
    if len(condition) != batch:
        raise ValueError(f"one caption for each of {batch} examples expected, got {len(condition)}")
    return condition


class Reader(nn.Module):
    """A transformer over the words of a caption, trained along with the network that it reads for.

    A learned token stands before the words. It is all that is left of the empty caption, and what it becomes says what
    the whole is about.

    Args:
        vocabulary: number of tokens.
        length: most tokens of a caption.
        width, depth, heads: of the transformer.
        dropout: after each attention and each MLP.

    Raises:
        ValueError: an impossible size, or a width that heads do not divide.
    """

    def __init__(
        self, vocabulary: int, length: int, width: int = 192, depth: int = 2, heads: int = 4, dropout: float = 0.0
    ):
        super().__init__()
        check_size(width, depth)
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        if vocabulary < 1 or length < 1:
            raise ValueError(f"captions have at least one token of one, got {vocabulary} and length {length}")
        self.vocabulary, self.length, self.width = vocabulary, length, width
        self.token = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.token.weight, std=0.5)
        self.whole = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, length, width))
        self.always = nn.Parameter(0.5 * torch.randn(1, width))  # what blocks are given in the place of a time
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors (B, 1 + L, width), the whole's before those of the words; bool (B, 1 + L), true after the end).

        Args:
            ids: int64 (B, L), -1 after the end.

        Raises:
            ValueError: captions that are too long, or tokens that do not exist.
        """
        length = ids.shape[1]
        if length > self.length:
            raise ValueError(f"captions of this network have at most {self.length} tokens, got {length}")
        if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= self.vocabulary):
            raise ValueError(f"tokens are 0 to {self.vocabulary - 1}, or -1 after the end; got {ids.unique().tolist()}")
        words = self.token(ids.clamp_min(0)) + self.position[:, :length]
        h = torch.cat([self.whole.expand(len(ids), -1, -1), words], dim=1)
        ended = torch.cat([ids.new_zeros(len(ids), 1, dtype=torch.bool), ids < 0], dim=1)
        for block in self.blocks:
            h = block(h, self.always, ended[:, None, None])
        return self.norm(h), ended


class Pretrained(nn.Module):
    """A text encoder of the library transformers, from files on this machine, which stays as it is.

    What it said of a caption is remembered, so that each caption of the training data is read once.

    Args:
        path: a folder with the model's config.json and model.safetensors, or an installed package that holds one.
        length: most tokens of a caption.
        remembered: captions.

    Raises:
        ValueError: there is no such encoder, or not with safetensors.
        ImportError: transformers is not installed.
    """

    def __init__(self, path: str, length: int, remembered: int = 50_000):
        super().__init__()
        from kuosan.bridge.encoders import load_encoder

        self.encoder = load_encoder(path).requires_grad_(False)
        self.length, self.remembered = length, remembered
        self.width = int(self.encoder.config.hidden_size)
        self._said: dict[bytes, Tensor] = {}

    def train(self, mode: bool = True) -> Pretrained:
        return super().train(False)  # dropout would make it say something else each time

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors (B, 1 + L, width), the mean before those of the tokens; bool (B, 1 + L), true after the end)."""
        if ids.shape[1] > self.length:
            raise ValueError(f"captions of this network have at most {self.length} tokens, got {ids.shape[1]}")
        keys = [row[row >= 0].numpy(force=True).tobytes() for row in ids]
        said = {key: self._said[key] for key in keys if key in self._said}
        unread = {key: row for key, row in zip(keys, ids, strict=True) if key and key not in said}
        if unread:
            said |= self._read(list(unread), torch.stack(list(unread.values())))
        ended = torch.cat([ids.new_zeros(len(ids), 1, dtype=torch.bool), ids < 0], dim=1)
        vectors = torch.zeros(len(ids), 1 + ids.shape[1], self.width, device=ids.device)
        for row, key in zip(vectors, keys, strict=True):
            if key:  # of the empty caption nothing is said: 0
                row[: len(said[key])] = said[key].to(row)
        return vectors, ended

    @torch.no_grad()
    def _read(self, keys: list[bytes], ids: Tensor) -> dict[bytes, Tensor]:
        there = ids >= 0
        with torch.autocast(ids.device.type, enabled=False):
            said = self.encoder(input_ids=ids.clamp_min(0), attention_mask=there.long()).last_hidden_state.float()
        words = [vectors[known] for vectors, known in zip(said, there, strict=True)]
        found = {key: torch.cat([one.mean(0, keepdim=True), one]).cpu() for key, one in zip(keys, words, strict=True)}
        if len(self._said) + len(found) > self.remembered:
            self._said.clear()
        self._said |= found
        return found


class Captions(nn.Module):
    """What a reader says of captions, in a network's own width.

    Args:
        reader: called with ids (B, L); has a ``width``.
        width: of the network.
    """

    def __init__(self, reader: nn.Module, width: int):
        super().__init__()
        self.reader = reader
        size: int = reader.width  # type: ignore[assignment]
        self.words, self.whole = nn.Linear(size, width), nn.Linear(size, width)

    def forward(self, condition: object, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(words (B, 1 + L, width), bool (B, 1 + L): after the end, whole (B, width)), L of the longest caption.

        Raises:
            ValueError: as :func:`check_captions`, and of the reader.
        """
        ids = check_captions(condition, batch, self.words.weight.device)
        longest = int((ids != -1).any(0).sum())  # what is after the end of all of them says nothing, and costs
        vectors, ended = self.reader(ids[:, :longest])
        return self.words(vectors), ended, self.whole(vectors[:, 0])
